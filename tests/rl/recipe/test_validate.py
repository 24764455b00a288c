"""Every rule that joins keys of a recipe is tripped here, and a last test says that none was forgotten."""

import ast
import inspect
import re
import sys
from types import FrameType
from typing import Any

import pytest

from rewards.recipe import RewardConfig, ServiceConfig, StagePartConfig
from rl.recipe import validate
from rl.recipe.schema import (
    EvaluationTaskConfig,
    KeepBestConfig,
    ModelConfig,
    RehearsalConfig,
    RunConfig,
    StageConfig,
)
from rl.recipe.validate import find_problems


def sound_config(**changes: Any) -> RunConfig:
    """A consistent two-stage recipe; `changes` are dotted keys with `__` for dots, digits index lists."""
    reward = [RewardConfig("shapes")]
    config = RunConfig(
        name="run",
        model=ModelConfig(path="model"),
        stages=[StageConfig(task, task, f"{task}.jsonl", 5, list(reward)) for task in ("edit", "t2i")],
    )
    tasks = [EvaluationTaskConfig(task, f"{task}.jsonl", 8, list(reward)) for task in ("edit", "t2i")]
    config.evaluation.tasks = tasks
    for key, value in changes.items():
        node: Any = config
        *parents, last = key.split("__")
        for part in parents:
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        setattr(node, last, value)
    return config


def served(name: str, unavailable_s: float = 120.0, **settings: Any) -> list[RewardConfig]:
    """A stage's rewards: one, served elsewhere."""
    service = ServiceConfig(["http://host:8100"], unavailable_s=unavailable_s)
    return [RewardConfig(name, service=service, **settings)]


def joint(*tasks: str, steps: int = 4, **settings: Any) -> list[StageConfig]:
    """A joint stage of these tasks; `settings` are further keys of the stage."""
    parts = [StagePartConfig(task, f"{task}.jsonl", [RewardConfig("shapes")]) for task in tasks]
    return [StageConfig("joint", "joint", steps=steps, **({"parts": parts} | settings))]


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "group too small": ({"rollout__group_size": 1, "rollout__chunk_size": 1}, "need at least 2 samples"),
    "chunk does not divide": ({"rollout__group_size": 12}, "group_size=12 does not divide .*chunk_size=8"),
    "updates do not divide": (
        {"rollout__prompts_per_rollout": 5}, "prompts_per_rollout=5 does not divide .*updates_per_rollout=2",
    ),
    "branch in bfloat16": ({"rollout__branch": True}, "rollout.branch=true .*set learner.old_log_prob=replay"),
    "chunks of another size in bfloat16": (
        {"rollout__chunk_size": 4}, "chunk_size=4 with learner.micro_batch_size=8 .*round differently",
    ),
    "gate at the clip range": (
        {"learner__log_prob_tolerance": 1e-4}, "log_prob_tolerance=0.0001 is not below learner.clip_range=0.0001",
    ),
    "clip range below the gate": ({"learner__clip_range": 5e-6}, "log_prob_tolerance=1e-05 is not below"),
    "negative window": ({"rollout__window_size": 2, "rollout__window_first": -1}, "window_first=-1 must be at least 0"),
    "negative window size": ({"rollout__window_size": -2}, "window_size=-2 must be at least 0"),
    "window beyond T": (
        {"rollout__window_size": 2, "rollout__window_last": 11, "learner__drop_last_steps": 0},
        "window_last=11 lies beyond rollout.num_steps=10",
    ),
    "window too long": (
        {"rollout__window_size": 4, "rollout__window_first": 6, "rollout__window_last": 9},
        "window_size=4 does not fit between rollout.window_first=6 and rollout.window_last=9",
    ),
    "cps noise level": (
        {"rollout__variant": "cps", "rollout__noise_level": 1.5, "learner__kl_beta": 0.0}, "CPS needs a value in",
    ),
    "ode trained": ({"rollout__variant": "ode"}, "cannot be trained"),
    "no noise trained": ({"rollout__noise_level": 0.0}, "cannot be trained"),
    "negative noise": ({"rollout__noise_level": -0.7}, "a noise level above 0"),
    "cps with kl": ({"rollout__variant": "cps"}, "does not apply to CPS; set learner.kl_beta=0"),
    "window into dropped steps": (
        {"rollout__window_size": 3, "rollout__window_last": 10}, "reaches into the last .*set rollout.window_last=9",
    ),
    "all steps dropped": ({"learner__drop_last_steps": 10}, "leaves none of rollout.num_steps=10"),
    "drop negative": ({"learner__drop_last_steps": -1}, "drop_last_steps=-1 must be at least 0"),
    "too many trained steps": ({"learner__train_steps": 10}, "train_steps=10: there are 9 stochastic steps"),
    "more trained steps than the window": (
        {"learner__train_steps": 4, "rollout__window_size": 3, "rollout__window_last": 9},
        "train_steps=4: there are 3 stochastic steps",
    ),
    "final rate above the first": (
        {"learner__final_learning_rate": 1e-3}, "final_learning_rate=0.001: must be .* at most .*=0.0003",
    ),
    "final rate of nothing": ({"learner__final_learning_rate": 0.0}, "final_learning_rate=0.0 must be above 0"),
    "negative kl": ({"learner__kl_beta": -0.1}, "kl_beta=-0.1 must be at least 0"),
    "ema never takes in": (
        {"learner__ema__every": 11}, "its 10 updates are fewer than learner.ema.every=11",
    ),
    "ema decay": ({"learner__ema__decay": 1.0}, r"ema.decay=1.0 must be in \[0, 1\)"),
    "no stages": ({"stages": []}, "stages: name at least one"),
    "same stage name": ({"stages__1__name": "edit"}, "the name 'edit' is used more than once"),
    "stage task": ({"stages__0__task": "video"}, r"stages\[0\].task='video' is not one of edit, t2i, joint"),
    "stage without prompts": ({"stages__0__prompts": None}, "stage 'edit': prompts is not set"),
    "parts of a stage of one task": (
        {"stages__0__parts": [StagePartConfig("t2i", "t.jsonl")]}, "stage 'edit': parts belong to .* task: joint",
    ),
    "rehearsal without strength": (
        {"stages__1__rehearsal": RehearsalConfig(0.0)}, r"stages\[1\].rehearsal.beta=0.0 must be above 0",
    ),
    "rehearsal of nothing": (
        {"stages__0__rehearsal": RehearsalConfig(1.0)}, "stage 'edit': rehearsal: no stage before it trains another",
    ),
    "rehearsal of another start": (
        {"stages__1__rehearsal": RehearsalConfig(1.0), "learner__kl_reference": "base"},
        "rehearsal holds the policy of the stage's start, learner.kl_reference='base' that of the run's",
    ),
    "joint with prompts": (
        {"stages": joint("edit", "t2i", prompts="e.jsonl")}, "stage 'joint': .* no prompts and rewards of its own",
    ),
    "joint with rewards": (
        {"stages": joint("edit", "t2i", rewards=[RewardConfig("a")])}, "a joint stage has no prompts and rewards",
    ),
    "joint without parts": ({"stages": joint()}, r"parts train \[\]; a joint stage needs two tasks or more"),
    "joint of one task": ({"stages": joint("edit")}, r"parts train \['edit'\]; a joint stage needs two"),
    "joint of a task twice": (
        {"stages": joint("edit", "edit")}, r"parts train \['edit', 'edit'\]; .* each once",
    ),
    "joint part of no task": ({"stages": joint("edit", "video")}, r"stages\[0\].parts\[1\].task='video' is not one of"),
    "joint too short": (
        {"stages": joint("edit", "t2i", steps=1), "learner__ema__enabled": False},
        "steps=1 end before each of its 2 parts had its turn",
    ),
    "joint part without rewards": (
        {"stages": joint("edit", "t2i", parts=[StagePartConfig(t, f"{t}.jsonl") for t in ("edit", "t2i")])},
        "stage 'joint.t2i': rewards is empty",
    ),
    "joint part with a stage's name": (
        {"stages": [*joint("edit", "t2i"), StageConfig("joint.edit", "edit", "e.jsonl", 5, [RewardConfig("a")])]},
        "the name 'joint.edit' is used more than once",
    ),
    "joint part that is not evaluated": (
        {"stages": joint("edit", "t2i"), "evaluation__tasks": []}, "stage 'joint.t2i' trains t2i, of which .* no",
    ),
    "stage steps": ({"stages__0__steps": 0}, r"stages\[0\].steps=0 must be at least 1"),
    "stage without rewards": ({"stages__0__rewards": []}, "stage 'edit': rewards is empty"),
    "weightless rewards": (
        {"stages__0__rewards": [RewardConfig("a", weight=0.0), RewardConfig("b", weight=0.0)]}, "has weight 0",
    ),
    "evaluation task twice": ({"evaluation__tasks__1__task": "edit"}, "task 'edit' is given more than once"),
    "evaluation task": ({"evaluation__tasks__0__task": "video"}, r"evaluation.tasks\[0\].task='video' is not one of"),
    "evaluation size": ({"evaluation__tasks__0__num_prompts": 1}, r"tasks\[0\].num_prompts=1 must be at least 2"),
    "evaluation rewards": ({"evaluation__tasks__0__rewards": []}, "evaluation of edit: rewards is empty"),
    "nothing to draw in a stage": ({"evaluation__tasks": []}, "stage 'edit' trains edit, of which .* no prompts"),
    "best by a task that is not evaluated": (
        {"checkpoint__keep_best": KeepBestConfig("edit"), "evaluation__tasks": []},
        "keep_best.task='edit': the tasks of evaluation.tasks are none",
    ),
    "best by a reward that is not there": (
        {"checkpoint__keep_best": KeepBestConfig("t2i", "shape"), "checkpoint__every": 2, "evaluation__every": 2},
        "keep_best.reward='shape': the evaluation of t2i has shapes; name one",
    ),
    "best of none": (
        {"checkpoint__keep_best": KeepBestConfig("t2i"), "checkpoint__every": 2},
        r"has a score of t2i: with checkpoint.every=2 and evaluation.every=0 no stage that trains it \(\[5\]\)",
    ),
    "saved and evaluated at different steps": (
        {"checkpoint__keep_best": KeepBestConfig("t2i"), "checkpoint__every": 2, "evaluation__every": 3},
        "checkpoint.every=2 and evaluation.every=3 no stage",
    ),
    "how many best": ({"checkpoint__keep_best": KeepBestConfig("t2i", count=0)}, "count=0 must be at least 1"),
    "services under one label": (
        {"stages__0__rewards": served("a:judge"), "evaluation__tasks__1__rewards": served("b:judge")},
        r"label 'judge' means a:judge {} in stage 'edit' and b:judge {} in evaluation of t2i",
    ),
    "params under one label": (
        {"stages__0__rewards": served("judge"), "stages__1__rewards": served("judge", params={"x": 1})},
        r"means judge {} in stage 'edit' and judge {'x': 1} in stage 't2i'",
    ),
    "service waited for longer than a start": (
        {"stages__0__rewards": served("judge", unavailable_s=850.0)},
        "reward 'judge' of stage 'edit': .* = 910 s reach resources.start_timeout_s=900",
    ),
    "zero 3 in process": (
        {"resources__placement": "inprocess", "learner__zero_stage": 3}, "weights are spread over the others",
    ),
    "compiled, with the rollout's log-probabilities": ({"model__compile": True}, "set learner.old_log_prob=replay"),
    "compiled under zero 3": (
        {"model__compile": True, "learner__old_log_prob": "replay", "learner__zero_stage": 3},
        "hooks that a compiled block does not call",
    ),
    "workers in process": (
        {"resources__placement": "inprocess", "rollout__workers": 4}, "4 must equal learner.ranks=8",
    ),
    "idle GPUs": ({"rollout__workers": 4}, "workers=4 < learner.ranks=8: some GPUs would stand idle"),
    "floor above the pool": ({"resources__min_rollout_workers": 9}, "is more than rollout.workers=8"),
}  # fmt: skip


def test_a_consistent_recipe_has_no_problem():
    assert find_problems(sound_config()) == []


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trips(rule):
    changes, expected = RULES[rule]
    problems = "\n".join(find_problems(sound_config(**changes)))
    assert re.search(expected, problems), problems


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.position_mode": ("flat", "mrope"),
    "rollout.variant": ("sde", "cps", "ode"),
    "learner.zero_stage": (1, 2, 3),
    "learner.kl_form": ("without_dt", "exact"),
    "learner.kl_reference": ("stage_start", "base"),
    "learner.advantage_std": ("group", "batch"),
    "learner.cfg_gradient": ("conditional", "both"),
    "learner.old_log_prob": ("rollout", "replay"),
    "alarms.reward_hacking": ("warn", "stop"),
    "resources.device": ("cuda", "cpu"),
    "resources.placement": ("shared", "separate", "inprocess"),
}

POSITIVE = (
    "model.height", "model.width", "model.max_sequence_length", "model.lora.rank", "model.lora.alpha",
    "model.longer_edge", "model.reference_pixels",
    "rollout.workers", "rollout.num_steps", "rollout.group_size", "rollout.prompts_per_rollout",
    "rollout.chunk_size", "learner.ranks", "learner.micro_batch_size", "learner.updates_per_rollout",
    "learner.learning_rate", "learner.clip_range", "evaluation.num_steps", "evaluation.batch_size",
    "learner.advantage_eps", "learner.advantage_clip", "learner.ema.every", "resources.threads",
    "resources.reward_workers", "resources.reward_concurrency", "resources.min_rollout_workers",
    "resources.placement_timeout_s", "resources.start_timeout_s", "resources.call_timeout_s",
    "checkpoint.every", "checkpoint.keep_last", "gallery.every",
)  # fmt: skip


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_outside_the_choices_names_them(key):
    problems = find_problems(sound_config(**{key.replace(".", "__"): "nonsense"}))
    assert f"{key}='nonsense' is not one of {', '.join(map(str, CHOICES[key]))}" in problems


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("key", POSITIVE)
def test_numbers_that_must_be_above_zero(key, value):
    problems = "\n".join(find_problems(sound_config(**{key.replace(".", "__"): value})))
    assert re.search(rf"{re.escape(key)}.*['=]{value}\b.* must be .*(at least 1|above 0)", problems), problems


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__window_size": 3, "rollout__window_last": 9},
        {"rollout__branch": True, "learner__old_log_prob": "replay"},
        {"rollout__branch": True, "model__dtype": "float32"},
        {"rollout__window_size": 3, "rollout__window_last": 10, "learner__drop_last_steps": 0},
        {"rollout__variant": "cps", "learner__kl_beta": 0.0},
        {"learner__train_steps": 9},
        {"learner__final_learning_rate": 3e-5},
        {"learner__zero_stage": 3, "resources__placement": "separate", "rollout__workers": 3},
        {"resources__placement": "inprocess"},
        {"model__compile": True, "learner__old_log_prob": "replay"},
        {"stages": joint("edit", "t2i")},
        {"stages": joint("t2i", "edit", steps=5)},
        {"rollout__workers": 16},
        {
            "checkpoint__keep_best": KeepBestConfig("t2i", "shapes"),
            "checkpoint__every": 4,
            "evaluation__every": 2,
        },
        {"stages__1__rehearsal": RehearsalConfig(1.0)},
        {"evaluation__tasks": [], "gallery__prompts": 0},
        {"stages__0__rewards": served("a:judge"), "stages__1__rewards": served("a:judge", weight=0.5)},
        {"stages__0__rewards": served("a:judge"), "stages__1__rewards": [RewardConfig("b:judge")]},
    ],
)
def test_legitimate_variants_pass(changes):
    assert find_problems(sound_config(**changes)) == []


def test_all_problems_come_in_one_list():
    config = sound_config(
        rollout__group_size=12, learner__kl_beta=-1.0, stages__0__steps=0, model__dtype="fp8"
    )
    problems = "\n".join(find_problems(config))
    for expected in ("group_size=12", "kl_beta=-1", "stages[0].steps=0", "model.dtype='fp8'"):
        assert expected in problems


def test_no_rule_is_left_untested():
    """Every `yield` in rl/recipe/validate.py was reached by a case above."""
    tree = ast.parse(inspect.getsource(validate))
    sites = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Yield)}
    reached: set[int] = set()

    def follow(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename == validate.__file__:
            reached.add(frame.f_lineno)
            return follow
        return None

    cases = [sound_config(**changes) for changes, _ in RULES.values()]
    cases += [sound_config(model__dtype="fp8", model__height=0)]
    before = sys.gettrace()
    sys.settrace(follow)
    try:
        for config in cases:
            find_problems(config)
    finally:
        sys.settrace(before)
    assert len(sites) > 20
    assert sites <= reached, f"rules of rl/recipe/validate.py without a case: lines {sorted(sites - reached)}"
