"""What the report makes of run folders, whole and broken, against hand-worked values; no browser."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.statistics import bootstrap_mean, paired_bootstrap
from rl.report.__main__ import main
from rl.report.document import report_document
from rl.report.gallery import gallery
from rl.report.page import json_block, render_page
from rl.report.pictures import Shelf
from rl.report.reading import thinned
from rl.report.runs import read_run, run_labels
from tests.rl.report.report_runs import HOSTILE, PROMPTS, picture, write_run

REPORT = Path(__file__).resolve().parents[3] / "rl" / "report"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, read only."""
    return write_run(tmp_path_factory.mktemp("made"), shift=0.1)


@pytest.fixture(scope="module")
def run(made):
    return report_document([made], [None])["runs"][0]


def only_run(folder):
    return report_document([folder], [None])["runs"][0]


def test_columns_hold_what_was_logged_and_gaps_where_nothing_was(run):
    table = run["train"]
    assert (table["steps"], table["stageSteps"]) == ([1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3])
    assert table["stages"] == ["edit"] * 3 + ["t2i"] * 3
    assert table["columns"]["reward/mean"] == [0.1, None, 0.3, 0.4, 0.5, 0.6]
    assert table["columns"]["policy/kl"] == [1e-6, 2e-6, 3e-6, 4e-6, None, 6e-6]


def test_a_step_that_is_not_on_record_breaks_the_curves(tmp_path):
    out = write_run(tmp_path)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] not in (2, 3)]
    (out / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    table = only_run(out)["train"]
    assert table["steps"] == [1, 2, 4, 5, 6]
    assert table["columns"]["policy/ratio_min"] == [0.99, None, 0.99, None, 0.99]


def test_panels_name_each_metric_once_and_in_order(made):
    panels = {panel["title"]: panel for panel in report_document([made], [None])["panels"]}
    assert [m["name"] for m in panels["Training reward, stage edit"]["metrics"]] == ["reward/mean"]
    gaps = panels["Log-probability gap by denoising step"]["metrics"]
    assert [m["label"] for m in gaps] == ["0", "10"]
    parts = panels["Parts of the reward, stage t2i"]["metrics"]
    assert [m["name"] for m in parts] == ["reward/redness/component/warm"]
    assert panels["Ratio"]["band"] == ("policy/ratio_min", "policy/ratio_max")
    assert "Loss" not in panels, "nothing was logged for it"


def test_held_out_scores_have_their_intervals_and_paired_changes(run):
    before = [i / PROMPTS for i in range(PROMPTS)]
    before[3] = None
    after = [None if value is None else value + 0.1 for value in before]
    points = run["evaluation"]["edit"]
    assert [(p["step"], p["stage"], p["n"]) for p in points] == [
        (0, "before", 11), (3, "edit", 11), (6, "t2i", 11)
    ]  # fmt: skip
    estimate, change = bootstrap_mean(after), paired_bootstrap(before, after)
    assert points[2]["mean"] == pytest.approx(estimate.mean, rel=1e-5)
    assert (points[2]["low"], points[2]["high"]) == pytest.approx((estimate.low, estimate.high), rel=1e-5)
    assert points[2]["change"] == pytest.approx([0.1, change.low, change.high], rel=1e-4)
    assert [p["mean"] for p in run["evaluation"]["edit/other"]] == [0.5, 0.5, 0.5]
    changes = {(c["over"], c["name"]): c for c in run["changes"]}
    assert set(changes) == {
        (over, name)
        for over in ("stage edit", "stage t2i", "whole run")
        for name in ("edit", "edit/other", "t2i", "t2i/other")
    }
    assert changes["stage t2i", "edit"]["change"] == [0.0, 0.0, 0.0]
    whole = changes["whole run", "t2i"]
    assert (whole["n"], whole["missing"]) == (11, 1) and whole["change"][0] == pytest.approx(0.1)


def test_the_gallery_is_cut_into_the_pictures_that_were_drawn(made, run):
    pictures = report_document([made], [None])["pictures"]
    task = run["gallery"]["edit"]
    assert [sample["prompt"] for sample in task["samples"]] == list(HOSTILE)
    assert task["samples"][0]["seed"] == str(7 + 2**60)
    assert [frame["step"] for frame in task["frames"]] == [0, 1, 2, 3, 6]
    number, reference, reward = task["frames"][3]["cells"][1]
    assert reward == pytest.approx(1.3)
    assert task["frames"][1]["cells"][1][2] is None, "not scored is no number"
    for found, expected in ((number, picture(3, 1)), (reference, picture(0, 4))):
        decoded = Image.open(io.BytesIO(base64.b64decode(pictures[found].partition(",")[2]))).convert("RGB")
        assert decoded.size == (128, 128) and (np.asarray(decoded) == expected[0, 0]).all()
    assert len({frame["cells"][1][1] for frame in task["frames"]}) == 1, "one reference, stored once"
    assert all(cell[1] is None for frame in run["gallery"]["t2i"]["frames"] for cell in frame["cells"])


def test_best_and_worst_groups_with_what_each_sample_earned(run):
    entry = run["groups"][2]
    assert (entry["step"], entry["stage"], entry["groups"], entry["equal"]) == (3, "edit", 3, 2)
    assert (entry["best"]["group"], entry["best"]["mean"]) == (30, 0.95)
    assert (entry["worst"]["group"], entry["worst"]["rewards"]) == (31, [0.0, None])
    assert entry["worst"]["components"] == {"redness": [0.0, None], "redness/warm": [0.25, None]}
    assert len(entry["best"]["pictures"]) == 2 and entry["best"]["reference"] is not None
    assert run["groups"][0]["best"]["pictures"] is None, "pictures were kept at the ends of stages only"


def test_prompts_that_never_had_spread_are_listed(run):
    assert (run["flat"]["count"], run["flat"]["of"]) == (2, 4)
    assert run["flat"]["shown"] == [
        {"stage": stage, "prompt": HOSTILE[1], "groups": 3, "mean": 0.0} for stage in ("edit", "t2i")
    ]


def test_the_time_line_leaves_out_the_pause_and_names_the_workers(run):
    timeline = run["timeline"]
    assert [(r["label"], r["worker"], r["idle"]) for r in timeline["rows"]] == [
        ("controller", "controller", None),
        ("rollout 0", "host:7", 0.6),
        ("rollout 1", "host:12", 0.8),
        ("reward", "reward", 0.8),
        ("learner", "learner-0", 0.5),
    ]
    assert [step["step"] for step in timeline["steps"]] == [1, 2, 3, 4, 5, 6]
    assert timeline["steps"][3]["spans"][0] == [1, 0, 30_000, 4_000], "step 4 follows step 3 at once"


def test_runs_that_differ_by_seed_share_a_row_of_the_ablation(tmp_path):
    folders = [
        write_run(tmp_path, name="a", shift=0.1),
        write_run(tmp_path, name="b", shift=0.3, seed=1),
        write_run(tmp_path, name="c", shift=-0.2, learner=_weaker()),
    ]
    document = report_document(folders, [None] * 3)
    first, second = document["ablation"]
    assert (first["runs"], second["runs"]) == (["a", "b"], ["c"])
    assert first["setting"] == "edit 3: redness → t2i 3: redness"
    cell = first["scores"]["edit"]
    assert cell["change"] == pytest.approx([0.2] * 3) and cell["seeds"] == pytest.approx([0.1, 0.3])
    before = [i / PROMPTS for i in range(PROMPTS) if i != 3]
    assert cell["mean"] == pytest.approx(np.mean(before) + 0.2, rel=1e-5)
    assert second["scores"]["t2i"]["change"][0] == pytest.approx(-0.2)
    settings = {entry["key"]: entry["values"] for entry in document["settings"]}
    assert settings == {"learner.kl_beta": ["0.04", "0.04", "0.5"], "seed": ["0", "1", "0"]}


def _weaker():
    from rl.recipe.schema import LearnerConfig

    return LearnerConfig(kl_beta=0.5)


def test_a_run_that_stopped_says_why_and_how_it_goes_on(tmp_path):
    out = write_run(tmp_path, finish=False)
    (out / "summary.json").write_text('{"finished": false}')
    command = "python -m rl.train a.yaml --resume auto"
    status = {"state": "stopped", "cause": "SIGTERM", "resume_command": command}
    (out / "status.json").write_text(json.dumps(status))
    run = only_run(out)
    assert run["state"] == f"not finished, 6 of 6 steps; stopped (SIGTERM), continue with: {command}"
    assert not run["finished"]


@pytest.mark.parametrize("score", [0.25, "high"])
def test_the_best_checkpoint_is_named(tmp_path, score):
    out = write_run(tmp_path, finish=False)
    best = {"path": "/r/checkpoints/step_000020", "step": 20, "task": "edit", "reward": None, "score": score}
    (out / "summary.json").write_text(json.dumps({"finished": False, "best": best}))
    notes = [note for note in only_run(out)["notes"] if "best" in note]
    expected = (
        "best checkpoint: step 20, edit 0.250 on held-out prompts; draw with it: python -m models.generate "
    )
    assert notes == ([expected + "--adapter /r/checkpoints/step_000020/adapter"] if score == 0.25 else [])


def test_a_run_in_progress_says_so_and_shows_what_there_is(tmp_path):
    out = write_run(tmp_path, finish=False)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "reward/mean": 0.')
    with open(out / "spans.jsonl", "a") as file:
        file.write('{"step": 7, "name": "walk", "worker": "x", "start": 0, "end": 1}\n')
    (out / "evaluations" / "after_edit" / "t2i.json").unlink()
    (out / "samples" / "edit" / "step_000002.png").write_bytes(b"no picture")
    (out / "groups.jsonl").write_text("nothing\n" + (out / "groups.jsonl").read_text())
    run = only_run(out)
    assert run["state"] == "not finished, 6 of 6 steps"
    notes = "\n".join(run["notes"])
    for text in (
        "metrics.jsonl: the last line is torn",
        "spans.jsonl: a record of step 7 is no span",
        "evaluations/after_edit/t2i.json is missing",
        "step_000002.png cannot be cut",
        "groups.jsonl: line 1 is not a record",
    ):
        assert text in notes
    assert [f["step"] for f in run["gallery"]["edit"]["frames"]] == [0, 1, 3, 6]
    assert run["evaluation"]["t2i"][1]["mean"] is not None, "metrics.jsonl still has the mean"
    assert run["evaluation"]["t2i"][1]["change"] is None, "a missing change is a gap"
    assert ("so far", "t2i") in {(c["over"], c["name"]) for c in run["changes"]}


def test_an_empty_run_is_a_page_of_notes(tmp_path):
    (tmp_path / "config.yaml").write_text("stages: [oops\n")
    document = report_document([tmp_path], [None])
    notes = "\n".join(document["runs"][0]["notes"])
    for text in ("config.yaml cannot be read", "metrics.jsonl is missing", "spans.jsonl is missing", "no gallery",
                 "groups.jsonl is missing"):  # fmt: skip
        assert text in notes
    assert "<html" in render_page(document)


def test_numbers_that_json_does_not_know_are_missing(tmp_path):
    out = write_run(tmp_path)
    with open(out / "metrics.jsonl", "a") as file:
        file.write(
            '{"step": 7, "stage": "t2i", "reward/mean": NaN, "policy/kl": Infinity, "loss/total": "x"}\n'
        )
    document = report_document([out], [None])
    columns = document["runs"][0]["train"]["columns"]
    assert [columns[name][-1] for name in ("reward/mean", "policy/kl", "loss/total")] == [None] * 3
    assert "NaN" not in json_block(document)


def test_prompts_cannot_leave_the_data_block(made):
    page = render_page(report_document([made], [None]))
    assert page.count("</script>") == 2 and "<img" not in page
    block = page.split('id="document">')[1].split("</script>")[0]
    samples = json.loads(block)["runs"][0]["gallery"]["edit"]["samples"]
    assert [sample["prompt"] for sample in samples] == list(HOSTILE)
    assert not set("<>&\u2028\u2029") & set(block)


def test_the_page_names_no_address_and_runs_only_its_own_script(made):
    page = render_page(report_document([made], [None]))
    assert set(re.findall(r"https?://[^\s'\"<>]+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a place
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy and re.fullmatch(
        r"default-src 'none'; img-src data:; script-src 'sha256-\S+'; style-src 'sha256-\S+'", policy[1]
    )
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|fetch\(", page)


def test_the_trace_lies_beside_the_page(made, tmp_path, capsys):
    assert main([str(made)]) == 0
    assert (made / "report.html").is_file() and "report.html: 0." in capsys.readouterr().out
    unfinished = write_run(tmp_path, name="late", finish=False)
    page = tmp_path / "pages" / "both.html"
    assert main([str(made), str(unfinished), "--output", str(page)]) == 0
    links = re.findall(r'"trace":"([^"]+)"', page.read_text())
    assert links == ["both_made_trace.json", "both_late_trace.json"]
    for link in links:
        events = json.loads((page.parent / link).read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == 36


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_labels_tell_folders_apart():
    assert run_labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert run_labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert run_labels([Path("/a/x"), Path("/a/x")]) == ["x (1)", "x (2)"]


def test_a_gallery_that_is_too_large_keeps_its_ends_and_says_so(made):
    run = read_run(made, "made")
    frames = gallery(run, Shelf(), budget=1)["t2i"]["frames"]
    assert [frame["step"] for frame in frames] == [0, 6]
    assert "2 of the 5 grids in samples/t2i/ are shown, to keep the page small" in run.notes


def test_thinning_keeps_both_ends():
    assert thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert thinned([1, 2], 2) == [1, 2]


@pytest.mark.parametrize("path", sorted(p for p in REPORT.iterdir() if p.suffix in (".js", ".css", ".html")))
def test_scripts_and_styles_keep_the_house_rules(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120
    starts = [i for i, line in enumerate(lines) if line.startswith("function ")]
    long = [lines[i] for i in starts if lines.index("}", i) - i >= 60]
    assert not long, "functions above 60 lines do not fit a screen"
