"""Grids show every sample at its stated place, and the sheet compares like with like."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl.record.gallery import MAX_SIDE, MIN_SIDE, GallerySample, _font, _wrap, before_after_sheet, save_grid
from rl.record.metrics import MetricsWriter


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def samples(count: int, side: int = 32, *, references: bool = False) -> list[GallerySample]:
    return [
        GallerySample(
            prompt=f"a photo of {i} red circles left of a blue square",
            seed=100 + i,
            image=picture(side, side, i),
            reward=None if i == 1 else i / 4,
            reference=picture(side, side, 50 + i) if references else None,
        )
        for i in range(count)
    ]


def cut(path: Path, box: list[int]) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").crop(tuple(box))  # type: ignore[arg-type]


@pytest.mark.parametrize("references", [False, True])
def test_the_index_leads_to_every_sample(tmp_path: Path, references: bool) -> None:
    path = tmp_path / "edit" / "step_000003.png"
    drawn = samples(5, references=references)
    save_grid(drawn, path, step=3, stage="edit", columns=2)
    index = json.loads(path.with_suffix(".json").read_text())
    assert (index["step"], index["stage"], len(index["samples"])) == (3, "edit", 5)
    for sample, entry in zip(drawn, index["samples"], strict=True):
        assert (entry["prompt"], entry["seed"], entry["reward"]) == (
            sample.prompt,
            sample.seed,
            sample.reward,
        )
        pairs = [(sample.image, entry["box"])]
        if references:
            pairs.append((sample.reference, entry["reference_box"]))
            assert entry["reference_box"][2] < entry["box"][0], "the reference stands on the left"
        else:
            assert entry["reference_box"] is None
        for original, box in pairs:
            shown = np.asarray(cut(path, box))
            assert shown.shape == (MIN_SIDE, MIN_SIDE, 3)
            # Nearest neighbour by a whole factor: every fourth pixel is the original.
            np.testing.assert_array_equal(shown[::4, ::4], original)
            np.testing.assert_array_equal(shown[3::4, 3::4], original)


def test_boxes_do_not_overlap_and_stay_inside(tmp_path: Path) -> None:
    path = tmp_path / "t2i" / "step_000001.png"
    mixed = [GallerySample("wide", i, picture(40, 64 + 60 * i, i), 0.5) for i in range(6)]
    save_grid(mixed, path, step=1, stage="t2i", columns=3)
    with Image.open(path) as image:
        covered = np.zeros((image.height, image.width), dtype=int)
    for entry in json.loads(path.with_suffix(".json").read_text())["samples"]:
        x0, y0, x1, y1 = entry["box"]
        assert 0 <= x0 < x1 <= covered.shape[1] and 0 <= y0 < y1 <= covered.shape[0]
        covered[y0:y1, x0:x1] += 1
    assert covered.max() == 1


def test_large_images_are_shrunk_with_their_aspect_ratio(tmp_path: Path) -> None:
    path = tmp_path / "t2i" / "step_000001.png"
    save_grid([GallerySample("wide", 0, picture(384, 512, 0), 0.5)], path, step=1, stage="t2i")
    (entry,) = json.loads(path.with_suffix(".json").read_text())["samples"]
    assert cut(path, entry["box"]).size == (MAX_SIDE, MAX_SIDE * 3 // 4)


def test_the_grid_reaches_tensorboard(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path)) as writer:
        for step in (1, 2):
            path = tmp_path / "samples" / "t2i" / f"step_{step:06d}.png"
            save_grid(samples(2), path, step=step, stage="t2i", log_image=writer.log_image)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "t2i"))
    events.Reload()
    shown = events.Images("samples/t2i")
    with Image.open(path) as image:
        assert [(e.step, e.width, e.height) for e in shown] == [(1, *image.size), (2, *image.size)]


@pytest.mark.parametrize(
    "text", ["two circles", "x" * 60, "a " * 80, "", "move the Supercalifragilistic square"]
)
def test_captions_fit_their_width(text: str) -> None:
    lines = _wrap(text, 100, 4)
    assert 1 <= len(lines) <= 4
    assert all(_font().getlength(line) <= 100 for line in lines)
    joined = "".join(lines).replace(" ", "")
    assert text.replace(" ", "").startswith(joined.removesuffix("…"))
    assert joined == text.replace(" ", "") or joined.endswith("…")


def test_the_sheet_has_a_row_per_prompt_and_a_column_per_moment(tmp_path: Path) -> None:
    before = samples(3, references=True)
    after = [GallerySample(s.prompt, s.seed, s.image[::-1].copy(), 1.0, s.reference) for s in before]
    before_after_sheet({"before": before, "after edit": after}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    for sample, other in zip(before, after, strict=True):
        rows, places = set(), []
        for shown in (sample.reference, sample.image, other.image):
            assert shown is not None
            (row, column), *more = find(sheet, np.kron(shown, np.ones((4, 4, 1), dtype=int)))
            assert not more
            rows.add(row)
            places.append(column)
        assert len(rows) == 1 and places == sorted(places)


def find(sheet: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """Every place at which `part` stands in `sheet`."""
    height, width = part.shape[:2]
    corners = np.argwhere((sheet[: -height + 1, : -width + 1] == part[0, 0]).all(axis=-1))
    return [(int(y), int(x)) for y, x in corners if (sheet[y : y + height, x : x + width] == part).all()]


def test_the_sheet_refuses_to_compare_different_draws(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'after' has other prompts or seeds than column 'before'"):
        before_after_sheet({"before": samples(2), "after": samples(3)[1:]}, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="at least one"):
        before_after_sheet({"before": []}, tmp_path / "sheet.png")


def test_bad_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"image of 'a cat' must be uint8 \[H, W, 3\], not float32 \[8, 8, 3\]"
    ):
        GallerySample("a cat", 0, np.zeros((8, 8, 3), np.float32), 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reference of 'a cat' must be .* not uint8 \[8, 8\]"):
        GallerySample("a cat", 0, picture(8, 8, 0), 0.0, reference=np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="at least one sample"):
        save_grid([], tmp_path / "grid.png", step=1, stage="edit")
