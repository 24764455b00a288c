"""A joint stage: two tasks that take turns by rollout step, as numbers, as alarms, in the report, and as a real run."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from core.files import atomic_write_json
from core.prompts import load_prompts
from models.lora.attach import hash_state
from models.lora.files import read_adapter
from rewards.base import FatalRewardError
from rewards.scoring import GroupScore
from rl.loop.checkpoint import read_state
from rl.loop.schedule import StageSchedule
from rl.recipe.plan import describe_run
from rl.recipe.preflight import preflight
from rl.recipe.reward_plan import reward_lines
from rl.recipe.schema import (
    EvaluationTaskConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    StageConfig,
    StagePartConfig,
    load_config,
)
from rl.recipe.stage_parts import stage_parts, steps_of
from rl.record.evaluation import TaskScores
from rl.record.results import RunResults
from rl.record.state import RunState, StageProgress
from rl.report.curves import drawn_panels
from rl.report.document import report_document
from rl.train import train
from rollout.prompts import GroupSampler

SHAPES = Path(__file__).resolve().parents[3] / "recipes" / "shapes"
PARTS = {"edit": "edit_shapes", "t2i": "geneval_shapes"}
STEPS = 4


def prompts(task: str, split: str = "train") -> str:
    return f"{SHAPES}/prompts/{task}_{split}.jsonl"


def joint_stage(steps: int = STEPS) -> StageConfig:
    parts = [StagePartConfig(task, prompts(task), [RewardConfig(reward)]) for task, reward in PARTS.items()]
    return StageConfig("joint", "joint", None, steps, parts=parts)


def joint_config(steps: int = STEPS) -> RunConfig:
    config = RunConfig(name="run", model=ModelConfig(path=f"{SHAPES}/base", height=32, width=32))
    config.rollout.prompts_per_rollout, config.rollout.group_size = 3, 4
    config.stages = [joint_stage(steps)]
    config.evaluation.tasks = [
        EvaluationTaskConfig(task, prompts(task, "heldout"), 10, [RewardConfig(reward)])
        for task, reward in PARTS.items()
    ]
    return config


def joint_recipe(folder: Path) -> Path:
    """Two parts of two steps each on the shapes base, with checkpoints after every step."""
    tasks = [{"task": task, "rewards": [{"name": reward}]} for task, reward in PARTS.items()]
    recipe = {
        "base": f"{SHAPES}/pdtr.yaml",
        "name": "joint",
        "output_dir": str(folder / "runs"),
        "model": {"path": f"{SHAPES}/base"},
        "rollout": {"workers": 1, "num_steps": 4, "group_size": 4, "prompts_per_rollout": 2, "chunk_size": 4}
        | {"window_size": 0, "window_last": 0},
        "learner": {"ranks": 1, "micro_batch_size": 4},
        "stages": [
            {"name": "joint", "task": "joint", "steps": STEPS}
            | {"parts": [part | {"prompts": prompts(part["task"])} for part in tasks]}
        ],
        "evaluation": {
            "tasks": [
                part | {"prompts": prompts(part["task"], "heldout"), "num_prompts": 4} for part in tasks
            ],
            "num_steps": 2,
            "baseline_guidance": [],
            "every": 2,
        },
        "checkpoint": {"every": 1},
        "gallery": {"prompts": 2, "every": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_parts_take_turns_and_each_visits_its_own_prompts_without_a_gap():
    config = joint_config()
    schedule = StageSchedule(config.stages[0], config)
    assert [schedule.part(step).part.label for step in range(5)] == [
        "joint.edit", "joint.t2i", "joint.edit", "joint.t2i", "joint.edit"
    ]  # fmt: skip
    for number, task in enumerate(PARTS):
        alone = GroupSampler(1024, 3, 4, config.seed, f"joint.{task}")
        own = load_prompts(prompts(task), task)
        for step in range(3):
            expected = alone.groups(own, step)
            found = schedule.groups(2 * step + number)
            assert [g.prompt for g in found] == [g.prompt for g in expected]
            assert [g.seeds for g in found] == [g.seeds for g in expected]
    ids = [group.id for step in range(6) for group in schedule.groups(step)]
    assert ids == list(range(18)), "a group's number names it within the stage"


def test_a_stage_of_one_task_samples_what_it_always_did():
    config = joint_config()
    stage = StageConfig("edit", "edit", prompts("edit"), 5, [RewardConfig("edit_shapes")])
    expected = GroupSampler(1024, 3, 4, config.seed, "edit")
    own = load_prompts(prompts("edit"), "edit")
    for step in range(4):
        assert StageSchedule(stage, config).groups(step) == expected.groups(own, step)


def test_each_parts_rewards_are_watched_apart():
    config = joint_config()
    schedule = StageSchedule(config.stages[0], config)
    assert schedule.part(0).monitor is schedule.part(2).monitor is not schedule.part(1).monitor


def test_a_run_that_is_killed_after_every_step_still_stops_for_a_constant_reward(tmp_path):
    """Through the file, as a resumed run reads it; one from before it held the counts starts with none."""
    config, state = joint_config(), RunState(stages=[StageProgress("joint")])
    spec = config.stages[0].parts[0].rewards[0]
    score = GroupScore(0, [0.5] * 2, [True] * 2, {spec.name: [0.5] * 2}, {}, {}, {}, False, "")
    for step in range(spec.constant_steps):
        monitor = StageSchedule(config.stages[0], config, state.stages[0]).part(0).monitor
        with (
            pytest.raises(FatalRewardError, match=r"last 10 steps is 0\.5")
            if step == spec.constant_steps - 1
            else nullcontext()
        ):
            monitor.observe([score])
        atomic_write_json(tmp_path / "state.json", asdict(state))
        state = read_state(tmp_path)
    document = json.loads((tmp_path / "state.json").read_text())
    del document["stages"][0]["rewards"]
    atomic_write_json(tmp_path / "state.json", document)
    StageSchedule(config.stages[0], config, read_state(tmp_path).stages[0]).part(0).monitor.observe([score])


@pytest.mark.parametrize(("steps", "expected"), [(2, [1, 1]), (5, [3, 2]), (8, [4, 4])])
def test_steps_are_shared_out(steps, expected):
    stage = joint_stage(steps)
    schedule = StageSchedule(stage, joint_config(steps))
    counted = [sum(schedule.part(s).part == part for s in range(steps)) for part in stage_parts(stage)]
    assert [steps_of(stage, part) for part in range(2)] == counted == expected


def test_the_plan_and_the_preflight_know_both_tasks():
    config = joint_config(5)
    config.gallery.prompts, config.gallery.every = 2, 2
    assert describe_run(config)[0] == "run run: joint (edit + t2i, 5 steps)"
    assert [line for line in reward_lines(config) if line.startswith("reward")] == [
        "reward edit_shapes, stage joint.edit: 36 images",
        "reward geneval_shapes, stage joint.t2i: 24 images",
        # 10 prompts before and after, and 2 of the gallery at steps 2 and 4
        "reward edit_shapes, evaluation of edit: 24 images",
        "reward geneval_shapes, evaluation of t2i: 24 images",
    ]
    names = [rewards.name for rewards in preflight(config).reward_sets]
    assert names == ["stage:joint.edit", "stage:joint.t2i", "evaluation:edit", "evaluation:t2i"]
    config.stages[0].parts[1].prompts = "absent.jsonl"
    assert any("absent.jsonl" in problem for problem in preflight(config).problems)


def test_in_a_joint_stage_every_task_is_anothers_other_task(tmp_path):
    results = RunResults(joint_config(), None, tmp_path)
    for moment, edit, t2i in (("before", 0.5, 0.5), ("after_joint", 0.9, 0.3)):
        results.add(
            moment,
            {
                "edit": TaskScores(moment, "edit", "sha", 1.0, 0, [edit] * 4, {}),
                "t2i": TaskScores(moment, "t2i", "sha", 1.0, 0, [t2i] * 4, {}),
            },
        )
    (alarm,) = results.cross_task_alarms(0)
    assert "stage 'joint' trained edit and t2i, and t2i fell by 0.2000" in alarm.line


def test_a_parts_reward_that_rises_alone_is_reported_for_that_part(tmp_path):
    results = RunResults(joint_config(), None, tmp_path)
    rng = np.random.default_rng(0).uniform(0, 0.05, 40)
    for moment, trusted, learned in (("before", 0.5, 0.2), ("after_joint", 0.3, 0.6)):
        found = {}
        for task, label in PARTS.items():
            rewards = list(trusted + rng) if task == "t2i" else [0.5] * 40
            found[task] = TaskScores(moment, task, "s", 1.0, 4, rewards, {label: list(learned + rng)})
        results.add(moment, found)
    (alarm,) = results.stage_alarms(0, results.moments["after_joint"])
    assert "stage 'joint.t2i'" in alarm.line and "geneval_shapes" in alarm.line


@pytest.fixture(scope="module")
def straight(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("joint")
    recipe = joint_recipe(folder)
    assert train(load_config(recipe)) == 0
    return folder, recipe


def records(folder: Path) -> list[dict]:
    """What must be equal between two runs: all but times, counts of workers and where it ran."""
    lines = (folder / "runs" / "joint" / "metrics.jsonl").read_text().splitlines()
    skipped = ("time", "throughput/", "workers/", "policy/version")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(skipped)} for line in lines]


def adapter_hash(folder: Path) -> str:
    return hash_state(read_adapter(folder / "runs" / "joint" / "adapter")[0])


def test_both_tasks_train_in_turns_and_are_evaluated_together(straight):
    folder, _ = straight
    out = folder / "runs" / "joint"
    steps = [record for record in records(folder) if "loss/total" in record]
    assert [(r["stage"], r["part"]) for r in steps] == [("joint", "edit"), ("joint", "t2i")] * 2
    for record in steps:
        other = PARTS["t2i" if record["part"] == "edit" else "edit"]
        assert f"reward/{PARTS[record['part']]}/mean" in record and f"reward/{other}/mean" not in record
    assert {path.name for path in (out / "tensorboard").iterdir()} == {
        "before", "joint", "joint.edit", "joint.t2i"
    }  # fmt: skip
    for moment in ("before", "step_000002", "after_joint"):
        assert {p.stem for p in (out / "evaluations" / moment).glob("*.json")} == {"edit", "t2i"}
    (stage,) = json.loads((out / "summary.json").read_text())["stages"]
    assert stage["task"] == "joint" and set(stage["evaluations"]) == {"edit", "t2i"}
    drift = [record["policy/kl"] for record in steps]
    assert 0 < drift[0] < min(drift[1:]), "one reference, that of the stage's start, for both tasks"


def test_resume_in_the_middle_of_a_turn_equals_the_straight_run(straight, tmp_path):
    folder, recipe = straight
    shutil.copytree(folder / "runs", tmp_path / "runs")
    out = tmp_path / "runs" / "joint"
    for checkpoint in (out / "checkpoints").iterdir():
        if checkpoint.name != "step_000001":
            shutil.rmtree(checkpoint)
    for name in ("adapter", "transformer"):
        shutil.rmtree(out / name)
    (out / "summary.json").unlink()
    assert train(load_config(recipe, [f"output_dir={tmp_path / 'runs'}"]), resume="auto") == 0
    assert adapter_hash(tmp_path) == adapter_hash(folder)
    assert records(tmp_path) == records(folder)


def test_the_report_draws_the_parts_rewards_apart(straight):
    folder, _ = straight
    document = report_document([folder / "runs" / "joint"], [None])
    (run,) = document["runs"]
    assert run["train"]["stages"] == ["joint"] * 4
    assert run["train"]["parts"] == ["joint.edit", "joint.t2i"] * 2
    assert run["stages"][0]["parts"] == ("joint.edit", "joint.t2i")
    panels = drawn_panels([run["train"]], ["joint.edit", "joint.t2i"])
    drawn = {p["stage"]: [m["name"] for m in p["metrics"]] for p in islice(panels, 2)}
    assert drawn == {"joint.edit": ["reward/mean"], "joint.t2i": ["reward/mean"]}
    assert run["notes"] == []
