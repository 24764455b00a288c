"""The Ray actor: rewards load from a file inside it, and images, references and failures pass through it."""

import asyncio

import numpy as np
import pytest
import ray
from PIL import Image

from core.failures import DataFailure
from core.prompts import Prompt
from rewards.base import FatalRewardError, RewardLoadError, RewardSet, RewardSpec
from rewards.inputs import reward_inputs
from rewards.worker import RewardScorer, RewardWorker

CODE = """
    def level({KEYWORDS}):
        levels = [image.getpixel((0, 0))[0] for image in images]
        return RewardOutput([level / 10 for level in levels], {"width": [image.width for image in images]})

    class Same:
        def __init__(self):
            self.threads = __import__("os").environ["OMP_NUM_THREADS"]
        async def score(self, {KEYWORDS}):
            if prompts[0] == "stop":
                raise FatalRewardError("quota exhausted")
            assert self.threads == "3" and metadata[0] == {"k": 1}
            same = [i.getpixel((0, 0)) == r.getpixel((0, 0)) for i, (r,) in zip(images, references)]
            return [1.0 if found else None for found in same]
""".replace("{KEYWORDS}", "*, images, prompts, references, metadata")


def images(*levels):
    return np.stack([np.full((4, 6, 3), level, np.uint8) for level in levels])


def sets(path, task="edit"):
    specs = [RewardSpec(f"{path}:level", weight=0.5), RewardSpec(f"{path}:Same")]
    return [RewardSet("stage", task, specs, example_metadata={"k": 1}), RewardSet("level", task, specs[:1])]


def edit_prompts(tmp_path, count, text="make it grey"):
    Image.new("RGB", (4, 4), (3, 3, 3)).save(tmp_path / "reference.png")
    return [Prompt(0, "edit", text, (str(tmp_path / "reference.png"),), {"k": 1})] * count


def test_a_group_is_scored_inside_the_actor(ray_session, reward_file, tmp_path):
    path = reward_file(CODE)
    worker = RewardWorker.options(max_concurrency=4).remote(sets(path), threads=3)
    info = ray.get(worker.ready.remote(), timeout=240)
    source = info.sources["stage"]["level"]
    assert source.path == str(path) and len(source.sha256) == 64
    assert ray.get(worker.ping.remote(), timeout=240) == info

    chunks = [ray.put(images(3, 3)), ray.put(images(3, 4))]
    prompts = edit_prompts(tmp_path, 4)
    both, one = ray.get(
        [worker.score.remote((1, 2), name, prompts, *chunks) for name in ("stage", "level")], timeout=240
    )
    assert both.group_id == (1, 2)
    assert both.components == {
        "level": [0.3, 0.3, 0.3, 0.4],
        "level/width": [6.0] * 4,
        "Same": [1.0, 1.0, 1.0, None],
    }
    assert both.rewards == [1.15, 1.15, 1.15, None] and both.failures == {"Same/none": 1}
    assert one.rewards == [0.15, 0.15, 0.15, 0.2]

    with pytest.raises(FatalRewardError, match="quota exhausted"):
        ray.get(worker.score.remote(0, "stage", edit_prompts(tmp_path, 4, "stop"), *chunks), timeout=240)
    with pytest.raises(DataFailure, match="gone.png of prompt 5"):
        gone = [Prompt(5, "edit", "p", (str(tmp_path / "gone.png"),))] * 4
        ray.get(worker.score.remote(0, "stage", gone, *chunks), timeout=240)


@pytest.fixture
def scorer(reward_file, monkeypatch):
    """The actor's class in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back after the constructor has set it
    return lambda task="edit": RewardScorer(sets(reward_file(CODE), task), threads=3)


def test_a_reward_that_sets_share_is_loaded_once(scorer):
    rewards = scorer()._rewards
    assert rewards["stage"][0] is rewards["level"][0]


def test_a_reward_gets_every_reference_of_a_sample_in_order(reward_file, tmp_path):
    path = reward_file(
        """
        def seen(*, images, prompts, references, metadata):
            levels = [[picture.getpixel((0, 0))[0] for picture in pictures] for pictures in references]
            references[0].clear()  # its own copy, as every sample's
            return [sum(level * 10**k for k, level in enumerate(row)) for row in levels]
        """
    )
    for level in (1, 2, 3):
        Image.new("RGB", (6, 4), (level,) * 3).save(tmp_path / f"{level}.png")
    scorer = RewardScorer([RewardSet("edit", "edit", [RewardSpec(f"{path}:seen")])])
    orders = ("1", "12", "21", "21", "312")
    prompts = [Prompt(0, "edit", "p", tuple(str(tmp_path / f"{k}.png") for k in order)) for order in orders]
    found = asyncio.run(scorer.score(0, "edit", prompts, images(*[9] * 5)))
    assert found.rewards == [1.0, 21.0, 12.0, 12.0, 213.0]


PAID = """
    made, probed, shared = [], [], []

    class Paid:
        def __init__(self, model="a"):
            made.append(model)
        async def readiness(self, task):
            probed.append(task)
            return []
        def share_rates(self, clients):
            shared.append(clients)
        def score(self, *, images, prompts, references, metadata):
            return [1.0] * len(images)
"""


def test_one_reward_with_two_weights_is_one_model_probed_once_for_each_task(reward_file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    name = f"{reward_file(PAID)}:Paid"
    paid = RewardSpec(name, weight=0.5, timeout_s=5.0)
    listed = RewardSpec(name, weight=1.0, label="listed", on_missing="stop")
    other = RewardSpec(name, params={"model": "b"}, label="other")
    sets = [
        RewardSet("stage", "t2i", [paid, other]),
        RewardSet("held out", "t2i", [listed]),
        RewardSet("edits", "edit", [listed]),
    ]
    scorer = RewardScorer(sets, workers=3)
    state = scorer._rewards["stage"][0].function.__globals__
    assert state["made"] == ["a", "b"] and set(state["shared"]) == {3}
    asyncio.run(scorer.ready())
    asyncio.run(scorer.ready())
    assert sorted(state["probed"]) == ["edit", "t2i", "t2i"]
    (mine,), (first, _) = scorer._rewards["held out"], scorer._rewards["stage"]
    assert (mine.label, mine.spec, mine.owner) == ("listed", listed, first.owner)
    group = asyncio.run(scorer.score(0, "held out", [Prompt(0, "t2i", "grey")] * 2, images(1, 2)))
    assert group.components == {"listed": [1.0, 1.0]}


def test_without_references_a_text_to_image_group_is_scored(scorer):
    prompts = [Prompt(0, "t2i", "grey")] * 2
    group = asyncio.run(scorer("t2i").score(0, "level", prompts, images(1, 2)))
    assert group.rewards == [0.05, 0.1]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([images(1)], "1 images came for 2 prompts"),
        ([images(1, 2).astype(np.float32)], r"uint8 array \[n, H, W, 3\], got float32 \[2, 4, 6, 3\]"),
        ([images(1, 2)[..., 0]], r"got uint8 \[2, 4, 6\]"),
    ],
)
def test_images_of_another_number_or_kind_are_refused(scorer, chunks, expected):
    with pytest.raises(ValueError, match=expected):
        asyncio.run(scorer("t2i").score(0, "level", [Prompt(0, "t2i", "grey")] * 2, *chunks))


def test_a_worker_whose_rewards_fail_their_trial_is_not_ready(reward_file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = reward_file("def a(**_): return []\ndef b(**_): raise ValueError('no')")
    scorer = RewardScorer([RewardSet("s", "t2i", [RewardSpec(f"{path}:a"), RewardSpec(f"{path}:b")])])
    with pytest.raises(
        RewardLoadError, match="(?s)'a' returned 0 scores.*'b': the dry call raised ValueError"
    ):
        asyncio.run(scorer.ready())


def test_a_bad_set_is_named_when_the_worker_is_made(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RewardLoadError, match="reward set 'stage/edit': no reward has a weight"):
        RewardScorer([RewardSet("stage/edit", "edit", [])])


def test_a_worker_that_starts_again_takes_no_other_code(reward_file):
    path = reward_file(CODE)
    held = {name: value for spec in sets(path)[0].rewards for name, value in reward_inputs(spec).items()}
    RewardScorer(sets(path), threads=3, held=held)
    path.write_text(path.read_text().replace("level / 10", "level / 5"))
    with pytest.raises(
        RewardLoadError, match=f"code of reward {path}:level, .*:Same is another than when the run began"
    ):
        RewardScorer(sets(path), threads=3, held=held)
