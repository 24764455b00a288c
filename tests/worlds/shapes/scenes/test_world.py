import itertools
import json

import numpy as np
import pytest

from worlds.shapes.scenes.render import HALF_EXTENT, render, render_batch, silhouette
from worlds.shapes.scenes.world import (
    BACKGROUNDS,
    COLORS,
    GRID,
    JITTER,
    PLACES,
    SHAPES,
    SIZE,
    Scene,
    Shape,
    layouts,
    sample_scene,
)


def test_colours_are_well_separated():
    names = {**COLORS, **BACKGROUNDS}
    apart = {
        (a, b): float(np.linalg.norm(np.subtract(names[a], names[b])))
        for a, b in itertools.combinations(names, 2)
    }
    assert min(apart.values()) > 105, min(apart, key=apart.__getitem__)


def test_layouts_keep_objects_apart():
    assert [len(layouts(n)) for n in (1, 2, 3)] == [9, 32, 48]
    widest = 2 * max(max(extent) for extent in HALF_EXTENT.values())
    for cells in layouts(3):
        for a, b in itertools.combinations(cells, 2):
            gap = max(8 * abs(a % 3 - b % 3), 8 * abs(a // 3 - b // 3)) - 2 * JITTER
            assert gap >= widest + 2


def test_scenes_lie_on_the_grid_and_repeat_with_their_seed():
    scenes = [sample_scene(seed) for seed in range(300)]
    assert scenes == [sample_scene(np.random.default_rng(seed)) for seed in range(300)]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    for item in (item for scene in scenes for item in scene.objects):
        column, row = item.cell % 3, item.cell // 3
        assert max(abs(item.x - GRID[column]), abs(item.y - GRID[row])) <= JITTER
    assert {item.cell for scene in scenes for item in scene.objects} == set(range(len(PLACES)))
    for scene in scenes:
        assert len({(item.shape, item.color) for item in scene.objects}) == len(scene.objects)


def test_json_round_trip_is_exact():
    for seed in range(50):
        scene = sample_scene(seed)
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"background": "white"}, "missing objects"),
        ({"background": "pink", "objects": []}, "background: 'pink'"),
        ({"background": "white", "objects": [["star", "red", 1, 2]]}, "shape: 'star'"),
        ({"background": "white", "objects": [["circle", "teal", 1, 2]]}, "color: 'teal'"),
        ({"background": "white", "objects": [["circle", "red"]]}, "expected \\[shape"),
    ],
)
def test_malformed_scenes_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        Scene.from_json(record)


def test_render_draws_each_shape_with_its_area_and_centre():
    width, height = HALF_EXTENT["triangle"]
    arm, reach = 1.75, HALF_EXTENT["cross"][0]
    areas = {
        "circle": np.pi * 25,
        "square": 81.0,
        "triangle": 2 * width * height,
        "cross": 4 * (2 * arm * reach - arm**2),
    }
    ys, xs = np.mgrid[:SIZE, :SIZE] + 0.5
    for shape in SHAPES:
        scene = Scene("black", (Shape(shape, "yellow", 15.75, 16.375),))
        step = np.subtract(COLORS["yellow"], BACKGROUNDS["black"])
        cover = (render(scene) - np.asarray(BACKGROUNDS["black"])) @ step / (step @ step)
        assert cover.sum() == pytest.approx(areas[shape], rel=0.02)
        assert (cover * xs).sum() / cover.sum() == pytest.approx(15.75, abs=0.05)
        # A triangle's mass lies a sixth of its height below the middle of its box.
        low = height / 3 if shape == "triangle" else 0.0
        assert (cover * ys).sum() / cover.sum() == pytest.approx(16.375 + low, abs=0.05)


def test_render_batch_equals_single_renders():
    scenes = [sample_scene(seed) for seed in range(20)]
    batch = render_batch(scenes)
    assert batch.dtype == np.uint8 and batch.shape == (20, SIZE, SIZE, 3)
    assert all((render(scene) == image).all() for scene, image in zip(scenes, batch, strict=True))


def test_objects_beyond_the_edge_are_cut_off():
    inner = silhouette(Shape("square", "red", 16.0, 16.0)).sum()
    assert 0 < silhouette(Shape("square", "red", 0.0, 16.0)).sum() < inner
    assert silhouette(Shape("square", "red", -40.0, 16.0)).sum() == 0
