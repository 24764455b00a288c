"""The pictures of the longer setting's proof: the same prompts and noise on both sides."""

import numpy as np
from PIL import Image

from bench.accept import learning_pictures
from bench.accept.learning_pictures import BASE, blocks, draw_pictures, tiled
from worlds.shapes.training.evaluate import Base, heldout_questions


def test_both_tasks_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(learning_pictures, "IMAGES", tmp_path)
    monkeypatch.setattr(learning_pictures, "PROMPTS", 1)
    draw_pictures(BASE, seed=3)
    widths = {task: Image.open(tmp_path / f"learning_{task}.png").width for task in ("t2i", "edit")}
    assert widths["edit"] > widths["t2i"]  # the reference stands before the two columns


def test_the_same_model_gives_the_same_block_and_its_samples_differ():
    questions = heldout_questions("edit", 1, 3)
    first, second = (blocks("edit", questions, Base.load(BASE))[0] for _ in range(2))
    assert np.array_equal(first.image, second.image) and first.reward == second.reward
    assert not np.array_equal(first.image[:32, :32], first.image[:32, 34:])


def test_samples_are_tiled_row_by_row():
    whole = tiled(np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 2, 3, 3), dtype=np.uint8))
    assert whole.shape == (6, 8, 3)
    assert [int(whole[y, x, 0]) for y, x in ((0, 0), (0, 7), (5, 0), (5, 7), (2, 0), (0, 3))] == [
        0,
        1,
        2,
        3,
        255,
        255,
    ]
