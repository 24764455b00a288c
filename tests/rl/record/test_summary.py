"""summary.json keeps its form, and what is printed shows the same figures whole at any width."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.statistics import Difference
from rl.record.summary import (
    WIDEST,
    BestCheckpoint,
    GuidancePoint,
    RunSummary,
    StageSummary,
    duration,
    print_summary,
    write_summary,
)

EDIT = Difference(0.361, 0.420, 0.059, 0.038, 0.079, 512)
T2I = Difference(0.400, 0.387, -0.013, -0.049, 0.020, 500, 12)
NOTHING = Difference(None, None, None, None, None, 0, 512)


def make_summary(*stages: StageSummary) -> RunSummary:
    return RunSummary(
        name="demo",
        stages=stages,
        images=123_456,
        seconds=482.4,
        version="0.1.0",
        commit="0123456789abcdef",
        total={"edit": EDIT, "t2i": T2I},
        base_guidance={"edit": (GuidancePoint(1.0, 0.361, 512), GuidancePoint(3.5, 0.53, 512))},
    )


def printed(summary: RunSummary, width: int = 100) -> str:
    out = io.StringIO()
    print_summary(summary, Path("/runs/demo"), file=out, width=width)
    return out.getvalue()


def test_the_file_has_the_stated_form(tmp_path: Path) -> None:
    stage = StageSummary("edit_stage", "edit", 35, 276.5, {"edit": EDIT, "t2i": NOTHING}, reward_mean=0.45)
    path = write_summary(make_summary(stage), tmp_path)
    assert path == tmp_path / "summary.json"
    document = json.loads(path.read_text())
    assert document["images"] == 123_456 and document["seconds"] == 482.4
    (entry,) = document["stages"]
    assert [entry[key] for key in ("name", "task", "steps", "seconds")] == ["edit_stage", "edit", 35, 276.5]
    assert entry["reward_mean"] == 0.45
    assert entry["evaluations"] == {
        "edit": {
            "before": 0.361,
            "after": 0.420,
            "difference": 0.059,
            "low": 0.038,
            "high": 0.079,
            "num_prompts": 512,
            "missing": 0,
        },
        "t2i": {
            "before": None,
            "after": None,
            "difference": None,
            "low": None,
            "high": None,
            "num_prompts": 0,
            "missing": 512,
        },
    }
    assert document["total"]["t2i"]["difference"] == -0.013
    assert document["base_guidance"]["edit"][1] == {"guidance_scale": 3.5, "mean": 0.53, "num_prompts": 512}


GOLDEN = """\
Run demo: held-out prompts, before and after

stage edit (edit): 35 steps in 4m 36s, training reward 0.450 in the last
task   before    after           difference (95 %)    prompts
──────────────────────────────────────────────────────────────
edit    0.361    0.420     +0.059 [+0.038, +0.079]        512
t2i     0.400    0.387     -0.013 [-0.049, +0.020]    500/512

stage t2i (t2i): 53 steps in 3m 26s, training reward - in the last, 2.5% of its samples not scored
task   before    after           difference (95 %)    prompts
──────────────────────────────────────────────────────────────
edit        -        -                           -      0/512

whole run: 88 steps in 8m 02s
task   before    after           difference (95 %)    prompts
──────────────────────────────────────────────────────────────
edit    0.361    0.420     +0.059 [+0.038, +0.079]        512
t2i     0.400    0.387     -0.013 [-0.049, +0.020]    500/512

Intervals (95 %): paired bootstrap over prompts, not over training seeds.

Base model by guidance scale
task      1    3.5
───────────────────
edit  0.361  0.530

results: /runs/demo
look:    python -m rl.report /runs/demo
draw:    python -m models.generate --adapter /runs/demo/adapter
publish: python -m rl.export /runs/demo NEW_FOLDER
123,456 images in 8m 02s, 0 worker restarts, version 0.1.0, commit 0123456789ab
"""


def test_what_is_printed_shows_every_stage_and_task() -> None:
    summary = make_summary(
        StageSummary("edit", "edit", 35, 276.2, {"edit": EDIT, "t2i": T2I}, reward_mean=0.45),
        StageSummary("t2i", "t2i", 53, 206.0, {"edit": NOTHING}, missing_share=0.025),
    )
    for width in (100, 160):
        assert [line.rstrip() for line in printed(summary, width).splitlines()] == GOLDEN.splitlines()
    assert " ".join(printed(summary, 80).split()) == " ".join(GOLDEN.split()), "the same, but for line ends"


@pytest.mark.parametrize("width", [80, 100, 160])
def test_wide_content_is_whole_at_any_width(width: int) -> None:
    wide = Difference(-12.345, -99.999, -87.654, -99.998, -70.001, 9_000, 999)
    wider = Difference(123.456, 9876.5, 9753.04, 9000.4, 9999.4, 9_000, 999)
    name = "edit/a_reward_with_a_name_that_is_longer_than_a_narrow_terminal"
    stage = StageSummary("[b]_stage", "t2i", 30_530, 276_102.2, {"t2i": wide, name: wider}, -99.999)
    text = printed(make_summary(stage), width)
    rows = text[: text.index("results:")].splitlines()
    assert max(len(line) for line in rows) <= width
    assert "[b]" in text, "a stage's name is no markup"
    for figure in ("-87.654 [-99.998, -70.001]", "+9753 [+9000, +9999]", "9000/9999", "76h 42m", "30530"):
        assert figure in text
    assert "…" not in text
    room = min(len(name), min(width, WIDEST) - 60)
    folded = "".join(line[:room].strip() for line in rows)
    assert name in folded


def test_the_best_checkpoint_is_named_with_its_score_and_its_adapter(tmp_path: Path) -> None:
    best = BestCheckpoint("/runs/demo/checkpoints/step_000020", 20, "edit", "fit", 0.6123)
    summary = replace(make_summary(), best=best)
    assert (
        "best checkpoint: step 20, edit/fit 0.612 on held-out prompts; draw with it: python -m models.generate "
        "--adapter /runs/demo/checkpoints/step_000020/adapter\n" in printed(summary)
    )
    document = json.loads(write_summary(summary, tmp_path).read_text())
    assert BestCheckpoint(**document["best"]) == best
    assert "best checkpoint" not in printed(make_summary())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1m 00s"),
        (3599.4, "59m 59s"),
        (3599.6, "1h 00m"),
        (86_400, "24h 00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
