"""EditReward on the shapes world, from nothing to a reward that was worth optimising: a user's commands in order.

generate, label (by the exact verifier behind the judge's wire protocol), train, export, evaluate; the same for a
regressor that sees the result alone; then vLLM serves the first, PDTR's editing stage is driven by it and judged by the
exact verifier; last, a reward that learned from a wrong judge provokes the alarm. Resumable: what is finished is kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.accept.commands import judge_endpoint, one_thread, process, train_once
from bench.accept.evidence import IMAGES, ROOT, Claim, Clock, above, claims_table, conclude, interval
from core.statistics import Difference, Estimate, paired_bootstrap
from rl.record.summary import run_finished
from worlds.shapes.scenes.prompts import edit_lines, write_lines

RUNS = ROOT / "runs" / "accept_editreward"
RECIPE = "recipes/shapes/editreward.yaml"
PROMPTS, PROMPT_SEED = 8192, 30
SPEARMAN, PAIRWISE = 0.7, 0.8
COMMAND_S = 7200.0
VIEWS = {
    "full": ["name=editreward"],
    "result": ["name=editreward-result", "input.view=result", "input.rubric=null"],
    "cautious": ["name=editreward-cautious", "train.steps=1500"],
}
"""What each regressor is: the reward; one that sees the result alone; one that a wrong judge has taught."""


def main() -> None:
    """Write `docs/evidence/editreward.md`; exits 1 when a part does not hold."""
    clock = Clock(RUNS / "seconds.json")
    make_data(clock)
    for view in VIEWS:
        train(view, clock)
    claims = regressor_claims()
    served = drive("edit_editreward", "full", clock)
    hacked = drive("reward_hacking", "cautious", clock)
    claims += run_claims(served, hacked)
    write_evidence(claims, clock, served, hacked)


# ---- the commands -----------------------------------------------------------------------------------------


def command(name: str, view: str, *words: str, accepted: tuple[int, ...] = (0,)) -> None:
    """One command of `rewards.editreward`, with all of its output. Raises for an exit code that is not accepted."""
    labels = run_folder("cautious" if view == "cautious" else "full") / "labelled"
    shards = [] if name in ("generate", "label") else [f"data.shards=[{labels}/*.tar]"]
    line = [sys.executable, "-m", "rewards.editreward", name, RECIPE, f"output_dir={RUNS}", *VIEWS[view]]
    done = subprocess.run(
        [*line, *shards, *words], cwd=ROOT, check=False, timeout=COMMAND_S, env=one_thread()
    )
    if done.returncode not in accepted:
        raise RuntimeError(
            f"{name} of {VIEWS[view][0]} ended with exit code {done.returncode}; see its output above"
        )


def make_data(clock: Clock) -> None:
    """Prompts that neither the training prompts of PDTR nor any held-out file contain, edits of them, labels."""
    prompts = RUNS / "prompts" / "edit_train.jsonl"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    write_lines(prompts, edit_lines("train", PROMPTS, PROMPT_SEED))
    if not labelled("full"):
        with clock.part("generate"):
            command("generate", "full", f"generate.prompts={prompts}")
        with clock.part("label"), judge_endpoint(RUNS) as url:
            command("label", "full", f"label.judge.base_url={url}")
    if not labelled("cautious"):
        some = ",".join(f"{RUNS}/editreward/edits/edits-000{tens}*.tar" for tens in range(4))
        with clock.part("label cautious"), judge_endpoint(RUNS, "--cautious") as url:
            command("label", "cautious", f"label.judge.base_url={url}", f"label.shards=[{some}]")


def labelled(view: str) -> bool:
    return (run_folder(view) / "labelled" / "labels.json").is_file()


def run_folder(view: str) -> Path:
    return RUNS / VIEWS[view][0].removeprefix("name=")


def train(view: str, clock: Clock) -> None:
    """Train, export and evaluate one regressor."""
    if not (run_folder(view) / "model").is_dir():
        with clock.part(f"train {view}"):
            command("train", view, "--resume", "auto")
        command("export", view)
    predictions = str(RUNS / "editreward/evaluation-test/predictions.jsonl")
    against = ["--against", predictions] if view == "result" else []
    # 1 is a failed probe, which the other two regressors are made to fail; 2 is an evaluation that could not run.
    command("evaluate", view, *against, accepted=(0, 1))


def drive(recipe: str, view: str, clock: Clock) -> Path:
    """Run PDTR's editing stage under a regressor served by vLLM; returns the run's folder."""
    folder = RUNS / recipe
    if run_finished(folder):
        return folder
    model = run_folder(view) / "model"
    with clock.part(recipe), served(model) as url:
        overrides = []
        for reward in ("stages[0].rewards[0]", "evaluation.tasks[0].rewards[2]"):
            overrides += [f"{reward}.params.model={model}", f"{reward}.params.urls=[{url}]"]
        return train_once(f"recipes/shapes/{recipe}.yaml", folder, *overrides, timeout_s=COMMAND_S)


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The model behind a real vLLM; yields its URL."""
    ready = RUNS / "serve.json"
    ready.unlink(missing_ok=True)
    line = [sys.executable, "-m", "rewards.editreward", "serve", str(model), "--device", "cpu", "--port", "0"]
    with process([*line, "--ready-file", str(ready)], ready):
        yield json.loads(ready.read_text())["urls"][0]


# ---- the claims -------------------------------------------------------------------------------------------


def report(view: str) -> dict[str, Any]:
    return json.loads((run_folder(view) / "evaluation-test" / "report.json").read_text())


def regressor_claims() -> list[Claim]:
    """What the regressor has to be before it is a reward."""
    full, against = report("full"), report("result")["against"]
    claims = []
    for name, bound in (("spearman", SPEARMAN), ("pairwise", PAIRWISE)):
        figure = full["within_groups"][name]
        claims.append(
            Claim(
                f"{name} within groups of held-out sources, at least {bound:g}",
                show(figure),
                figure["mean"] >= bound,
            )
        )
        less = against[name]
        claims.append(
            Claim(
                f"{name} within groups: the regressor that sees the result alone, minus it; interval below 0",
                show(less),
                less["high"] is not None and less["high"] < 0,
            )
        )
    claims += [
        Claim(
            f"probe `{p['name']}`: fall in standard deviations of the score, at least 1",
            show(p["drop"]),
            p["passed"],
        )
        for p in full["probes"]
    ]
    return claims


def run_claims(served_run: Path, hacked: Path) -> list[Claim]:
    """What the reward has to do when it is optimised, and what the alarm has to notice."""
    exact, learned, second = changes(served_run, "after_edit")
    wrong_exact, wrong_learned, _ = changes(hacked, "after_edit")
    alarms = alarm_lines(hacked)
    return [
        Claim("driven by the served regressor: the exact verifier's held-out score; interval above 0",
              interval(exact, signed=True), above(exact.low)),
        Claim("the same by the second scorer; interval above 0", interval(second, signed=True), above(second.low)),
        Claim("the same by the regressor itself", interval(learned, signed=True), True),
        Claim("that run raises no alarm", f"{len(alarm_lines(served_run))} lines", not alarm_lines(served_run)),
        Claim("provoked: the reward that a wrong judge has taught rises on held-out prompts; interval above 0",
              interval(wrong_learned, signed=True), above(wrong_learned.low)),
        Claim("provoked: the exact verifier's score falls; interval below 0", interval(wrong_exact, signed=True),
              wrong_exact.high is not None and wrong_exact.high < 0),
        Claim("provoked: the alarm fires", alarms[0] if alarms else "silent", bool(alarms)),
    ]  # fmt: skip


def changes(run: Path, moment: str) -> tuple[Difference, Difference, Difference]:
    """Paired changes since before: the exact verifier, the learned reward, the second scorer."""
    before, after = (
        json.loads((run / "evaluations" / when / "edit.json").read_text()) for when in ("before", moment)
    )
    pairs = [(before["rewards"], after["rewards"])]
    pairs += [
        (before["components"][name], after["components"][name])
        for name in ("editreward", "edit_shapes_template")
    ]
    exact, learned, second = (paired_bootstrap(*pair) for pair in pairs)
    return exact, learned, second


def alarm_lines(run: Path) -> list[str]:
    path = run / "alarms.txt"
    return [line for line in path.read_text().splitlines() if "hacking" in line] if path.is_file() else []


def show(figure: dict[str, Any]) -> str:
    return interval(Estimate(figure["mean"], figure["low"], figure["high"], 0), signed=True)


def write_evidence(claims: list[Claim], clock: Clock, served_run: Path, hacked: Path) -> None:
    """The table of claims, what the steps took, and the curves' files."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copy(RUNS / "editreward/evaluation-test/calibration.png", IMAGES / "editreward_calibration.png")
    for name, run in (("editreward_edit", served_run), ("reward_hacking", hacked)):
        shutil.copy(run / "samples" / "before_after_edit.png", IMAGES / f"{name}.png")
    full = report("full")
    lines = [
        f"`{RECIPE}`: {PROMPTS} prompts of the training split, labels by the exact verifier behind the judge's wire "
        f"protocol; {full['samples']} held-out edits in {full['groups']} groups. Then "
        "`recipes/shapes/edit_editreward.yaml` and `recipes/shapes/reward_hacking.yaml` under a real vLLM. Intervals "
        "at 95 %: over sources, over prompts.",
        "",
        *claims_table(claims),
        "",
        f"Minutes: {clock.minutes()}.",
        "",
        "Pictures in `docs/images/`: `editreward_calibration.png`, `editreward_edit.png` (before and after), "
        "`reward_hacking.png`.",
    ]
    data = {"claims": [vars(claim) for claim in claims], "seconds": clock.seconds, "report": full}
    holds = all(claim.holds for claim in claims)
    conclude("editreward", "EditReward on the shapes world", lines, data, holds=holds)


if __name__ == "__main__":
    main()
