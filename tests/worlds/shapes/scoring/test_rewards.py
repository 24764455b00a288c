import numpy as np
import pytest
from PIL import Image

from rewards.base import RewardOutput
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.edits import sample_edit
from worlds.shapes.scenes.render import render, stack
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.rewards import EditShapes, GenEvalShapes
from worlds.shapes.scoring.template import TemplateEdit, TemplateGenEval


def pictures(scenes) -> list[Image.Image]:
    return [Image.fromarray(render(scene)) for scene in scenes]


def call(reward, images, metadata) -> RewardOutput:
    references = [[]] * len(images)
    return reward.score(images=images, prompts=[""] * len(images), references=references, metadata=metadata)


@pytest.mark.parametrize("reward", [GenEvalShapes, TemplateGenEval])
def test_geneval_scores_right_and_wrong_pictures(reward):
    rng = np.random.default_rng(0)
    metadata, scenes = zip(*[sample_t2i(rng, "heldout") for _ in range(30)], strict=True)
    right = call(reward(), pictures(scenes), metadata)
    assert right.scores == [1.0] * 30
    assert set(right.components) == {"dense", "strict", "correct"}
    wrong = call(reward(), pictures(scenes[1:] + scenes[:1]), metadata)
    assert 0 < np.mean(wrong.scores) < 0.7
    assert all(0 <= score <= 1 for score in wrong.scores)
    assert wrong.scores == wrong.components["dense"]


def test_credit_chooses_the_score():
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    two = Scene("grey", (Shape("circle", "red", 8.0, 8.0), Shape("circle", "blue", 24.0, 16.0)))
    found = {
        credit: call(GenEvalShapes(credit), pictures([two]), [circle]).scores[0]
        for credit in ("dense", "strict", "correct", "flow_grpo_compat")
    }
    assert found == {"dense": 0.0, "strict": 0.0, "correct": 1.0, "flow_grpo_compat": 0.0}
    with pytest.raises(ValueError, match="credit: 'half'"):
        GenEvalShapes("half")


@pytest.mark.parametrize("reward", [EditShapes, TemplateEdit])
def test_edits_score_right_and_unchanged_pictures(reward):
    rng = np.random.default_rng(0)
    examples = [sample_edit(rng, "heldout") for _ in range(30)]
    metadata = [example.metadata for example in examples]
    right = call(reward(), pictures([e.target for e in examples]), metadata)
    assert min(right.scores) >= 0.96
    same = call(reward(), pictures([e.source for e in examples]), metadata)
    assert max(same.scores) == 0
    assert set(same.components) == {"instruction", "preservation"}
    products = np.multiply(same.components["instruction"], same.components["preservation"])
    assert list(products) == same.scores


def test_both_scorers_agree_on_random_results():
    rng = np.random.default_rng(1)
    examples = [sample_edit(rng, "train") for _ in range(60)]
    results = [e.target if i % 2 else examples[i - 1].target for i, e in enumerate(examples)]
    images, metadata = pictures(results), [e.metadata for e in examples]
    first, second = (call(reward(), images, metadata).scores for reward in (EditShapes, TemplateEdit))
    assert np.mean(np.abs(np.subtract(first, second)) < 0.1) > 0.95


@pytest.mark.parametrize("reward", [EditShapes, GenEvalShapes, TemplateEdit, TemplateGenEval])
def test_wrong_input_is_refused_and_an_empty_batch_is_not(reward):
    assert call(reward(), [], []).scores == []
    with pytest.raises(ValueError, match="64 x 48 px"):
        call(reward(), [Image.new("RGB", (64, 48))], [{}])
    with pytest.raises(ValueError, match="scene: missing|metadata.tag"):
        call(reward(), [Image.new("RGB", (32, 32))], [{}])


def test_pictures_of_other_modes_are_read_as_rgb():
    image = Image.fromarray(render(sample_edit(0, "train").source))
    assert (stack([image.convert("RGBA"), image])[0] == stack([image])[0]).all()
