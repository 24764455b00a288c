import numpy as np
import pytest

from worlds.shapes.scenes.edits import KINDS, Edit, sample_edit
from worlds.shapes.scenes.render import render, render_batch
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.components import analyse
from worlds.shapes.scoring.verifier import EditScore, verify

RED, BLUE = Shape("circle", "red", 8.0, 8.0), Shape("square", "blue", 24.0, 24.0)
GREEN = Shape("triangle", "green", 24.0, 8.0)
PAIR = Scene("white", (RED, BLUE))


def judge(result: Scene | np.ndarray, edit: Edit, source: Scene = PAIR) -> EditScore:
    image = render(result) if isinstance(result, Scene) else result
    return verify(analyse(image[None])[0], edit, source)


def at(item: Shape, x: float, y: float) -> Shape:
    return Shape(item.shape, item.color, x, y)


def scores(kind: str, sigma: float, which: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    examples = [sample_edit(rng, "train", kind) for _ in range(100)]
    images = render_batch([getattr(example, which) for example in examples])
    images = np.clip(images + rng.normal(0, sigma, images.shape), 0, 255).astype(np.uint8)
    judged = [
        verify(picture, *Edit.from_json(example.metadata["edit"]))
        for picture, example in zip(analyse(images), examples, strict=True)
    ]
    return np.array([item.score for item in judged])


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_edits_score_full_marks(kind):
    assert scores(kind, 0.0, "target").min() >= 0.96
    assert scores(kind, 25.0, "target").mean() >= 0.96


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_changes_nothing_scores_zero(kind):
    assert scores(kind, 0.0, "source").max() == 0
    assert scores(kind, 25.0, "source").mean() < 0.005


RECOLOUR = Edit("recolour", 0, Shape("circle", "green", 8.0, 8.0))
REPLACE = Edit("replace", 0, Shape("cross", "green", 8.0, 8.0))
ADD = Edit("add", None, GREEN)
ADD_ANYWHERE = Edit("add", None, GREEN, anywhere=True)
REMOVE = Edit("remove", 0)
MOVE = Edit("move", 0, at(RED, 24.0, 8.0))
BACKGROUND = Edit("background", background="black")


@pytest.mark.parametrize(
    ("edit", "result", "instruction", "preservation"),
    [
        # The bystander is gone, elsewhere, recoloured; the background changed; a stranger appeared.
        (RECOLOUR, Scene("white", (RECOLOUR.result,)), 1, 0),
        (RECOLOUR, Scene("white", (RECOLOUR.result, at(BLUE, 24.0, 16.0))), 1, 0),
        (RECOLOUR, Scene("white", (RECOLOUR.result, Shape("square", "red", 24.0, 24.0))), 1, 0),
        (RECOLOUR, Scene("grey", (RECOLOUR.result, BLUE)), 1, 0),
        (RECOLOUR, Scene("white", (RECOLOUR.result, BLUE, GREEN)), 1, 0.5),
        # A recoloured object must keep its shape and its place.
        (RECOLOUR, Scene("white", (Shape("square", "green", 8.0, 8.0), BLUE)), 0, 1),
        (RECOLOUR, Scene("white", (at(RECOLOUR.result, 8.0, 24.0), BLUE)), 0, 0.5),
        # Half a replacement: the colour alone, the shape alone.
        (REPLACE, Scene("white", (Shape("circle", "green", 8.0, 8.0), BLUE)), 0.5, 1),
        (REPLACE, Scene("white", (Shape("cross", "red", 8.0, 8.0), BLUE)), 0.5, 1),
        # Added in another place than stated: a stranger. Unstated: any place is right.
        (ADD, Scene("white", (*PAIR.objects, at(GREEN, 8.0, 24.0))), 0, 0.5),
        (ADD_ANYWHERE, Scene("white", (*PAIR.objects, at(GREEN, 8.0, 24.0))), 1, 1),
        (ADD_ANYWHERE, Scene("white", (*PAIR.objects, Shape("triangle", "red", 8.0, 24.0))), 0.5, 1),
        (ADD_ANYWHERE, Scene("white", (*PAIR.objects, GREEN, at(GREEN, 8.0, 24.0))), 1, 0.5),
        # Everything removed: the instruction is fulfilled and nothing is preserved.
        (REMOVE, Scene("white", ()), 1, 0),
        (REMOVE, Scene("white", (RED,)), 0, 0),
        (REMOVE, Scene("white", (Shape("cross", "green", 8.0, 8.0), BLUE)), 0, 1),
        # A copy is half a move; vanishing is none.
        (MOVE, Scene("white", (*PAIR.objects, MOVE.result)), 0.5, 1),
        (MOVE, Scene("white", (BLUE,)), 0, 1),
        # Painting everything over is not a change of background alone.
        (BACKGROUND, Scene("black", ()), 1, 0),
        (BACKGROUND, Scene("black", (RED,)), 1, 0.5),
        (BACKGROUND, Scene("grey", PAIR.objects), 0, 1),
    ],
)
def test_partial_edits(edit, result, instruction, preservation):
    judged = judge(result, edit)
    assert judged.instruction == pytest.approx(instruction, abs=0.02)
    assert judged.preservation == pytest.approx(preservation, abs=0.02)
    assert judged.score == judged.instruction * judged.preservation


def test_removing_all_objects_of_three_keeps_a_share():
    three = Scene("white", (RED, BLUE, GREEN))
    assert judge(Scene("white", (GREEN,)), REMOVE, three).preservation == pytest.approx(0.5)


def test_a_move_to_the_next_cell_leaves_its_old_place():
    source = Scene("grey", (at(RED, 8.0, 8.0),))
    edit = Edit("move", 0, at(RED, 16.0, 8.0))
    assert judge(edit.apply(source), edit, source).score >= 0.96
    assert judge(source, edit, source).score == 0


@pytest.mark.parametrize("share", np.linspace(0, 1, 11))
def test_credit_rises_smoothly_with_the_colour(share):
    source, target = render(PAIR).astype(float), render(RECOLOUR.apply(PAIR)).astype(float)
    mixed = np.round((1 - share) * source + share * target).astype(np.uint8)
    score = judge(mixed, RECOLOUR).score
    if share in (0, 1):
        assert score == share
    # Red to green is 251 apart: full credit within 30 of green, none beyond 85.
    distance = (1 - share) * np.linalg.norm(np.subtract((220, 16, 40), (16, 160, 60)))
    assert score == pytest.approx(np.clip((85 - distance) / 55, 0, 1), abs=0.1)


def test_credit_falls_smoothly_with_the_distance():
    edit = Edit("move", 0, at(RED, 24.0, 8.0))
    credit = [judge(Scene("white", (at(RED, 24.0, 8.0 + d), BLUE)), edit).score for d in range(6)]
    assert credit[0] == credit[1] == 1 and credit[5] == 0
    assert all(a >= b for a, b in zip(credit, credit[1:], strict=False))
    assert 0 < credit[3] < 1
