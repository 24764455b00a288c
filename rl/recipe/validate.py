"""Rules that join several keys of a recipe. Each finds one problem and says which key to change; pure, no torch.

What a single value may be stands beside its key, in `rl/recipe/schema.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from core.recipe import value_problems
from rewards.base import RewardSpec, reward_label
from rewards.recipe import RewardConfig
from rl.recipe.schema import RunConfig, StageConfig
from rl.recipe.stage_parts import JOINT, rehearsed_parts, stage_parts, stage_tasks


def find_problems(config: RunConfig) -> list[str]:
    """Every value out of its range and every rule that the recipe breaks; empty when it is consistent."""
    return value_problems(config) + broken_rules(config)


def broken_rules(config: RunConfig) -> list[str]:
    """What keys break together. Bears values that are out of range."""
    rules = (
        _batches, _sampling, _objective, _log_probs, _stages, _evaluation, _keep_best, _services, _resources
    )  # fmt: skip
    return [problem for rule in rules for problem in rule(config)]


def _batches(config: RunConfig) -> Iterator[str]:
    r, learner = config.rollout, config.learner
    if r.group_size < 2:
        yield f"rollout.group_size={r.group_size}: group-relative advantages need at least 2 samples a group"
    if r.chunk_size > 0 and r.group_size % r.chunk_size:
        yield (
            f"rollout.group_size={r.group_size} does not divide into chunks of rollout.chunk_size={r.chunk_size}; "
            "make the chunk a divisor of the group"
        )
    if learner.updates_per_rollout > 0 and r.prompts_per_rollout % learner.updates_per_rollout:
        yield (
            f"rollout.prompts_per_rollout={r.prompts_per_rollout} does not divide into "
            f"learner.updates_per_rollout={learner.updates_per_rollout} updates of whole groups"
        )


def _sampling(config: RunConfig) -> Iterator[str]:
    r = config.rollout
    if r.window_size:
        if r.window_last > r.num_steps:
            yield f"rollout.window_last={r.window_last} lies beyond rollout.num_steps={r.num_steps}"
        if r.window_last - r.window_first < r.window_size:
            yield (
                f"rollout.window_size={r.window_size} does not fit between rollout.window_first={r.window_first} and "
                f"rollout.window_last={r.window_last}"
            )
    if r.variant == "cps" and not 0 < r.noise_level <= 1:
        yield f"rollout.noise_level={r.noise_level}: CPS needs a value in (0, 1]"


def _objective(config: RunConfig) -> Iterator[str]:
    r, learner = config.rollout, config.learner
    if r.variant == "ode" or r.noise_level <= 0:
        yield (
            f"rollout.variant={r.variant!r} with rollout.noise_level={r.noise_level:g} samples ODE steps, which have "
            "no log-probability and cannot be trained; use 'sde' or 'cps' with a noise level above 0"
        )
    if r.variant == "cps" and learner.kl_beta > 0:
        yield (
            f"rollout.variant='cps' with learner.kl_beta={learner.kl_beta:g}: the KL penalty is that of the SDE and "
            "does not apply to CPS; set learner.kl_beta=0"
        )
    if r.window_size and r.window_last - r.window_size > 0 and learner.drop_last_steps:
        overlap = r.window_last - (r.num_steps - learner.drop_last_steps)
        if overlap > 0:
            yield (
                f"rollout.window_last={r.window_last} reaches into the last learner.drop_last_steps="
                f"{learner.drop_last_steps} steps, which are not trained, so groups would train unequal numbers of "
                f"steps; set rollout.window_last={r.num_steps - learner.drop_last_steps}"
            )
    if learner.drop_last_steps >= r.num_steps:
        yield f"learner.drop_last_steps={learner.drop_last_steps} leaves none of rollout.num_steps={r.num_steps}"
    stochastic = r.window_size or r.num_steps - learner.drop_last_steps
    if learner.train_steps > stochastic:
        yield f"learner.train_steps={learner.train_steps}: there are {stochastic} stochastic steps to train on"
    final = learner.final_learning_rate
    if final is not None and final > learner.learning_rate:
        yield (
            f"learner.final_learning_rate={final:g}: must be above 0 and at most learner.learning_rate="
            f"{learner.learning_rate:g}; null keeps the rate constant"
        )


def _log_probs(config: RunConfig) -> Iterator[str]:
    """What would make rounding, or a stale replica, look like a change of policy."""
    r, learner, dtype = config.rollout, config.learner, config.model.dtype
    if learner.old_log_prob != "rollout":
        return
    bound = learner.log_prob_bound(dtype)
    if bound >= learner.clip_range:
        yield (
            f"learner.log_prob_tolerance={bound:g} is not below learner.clip_range={learner.clip_range:g}, so a gap "
            "that the gate lets pass would be clipped as a change of policy; lower the first, or set "
            "learner.old_log_prob=replay"
        )
    if dtype != "bfloat16":
        return
    if r.chunk_size != learner.micro_batch_size:
        yield (
            f"rollout.chunk_size={r.chunk_size} with learner.micro_batch_size={learner.micro_batch_size} and "
            "learner.old_log_prob='rollout' in bfloat16: batches of another size round differently, which would be "
            "told as a change of policy; make them equal, or set learner.old_log_prob=replay"
        )
    if r.branch:
        yield (
            "rollout.branch=true with learner.old_log_prob='rollout' in bfloat16: the learner replays a group's shared "
            "step in batches of another size, whose rounding would be told as a change of policy; set "
            "learner.old_log_prob=replay"
        )


def _stages(config: RunConfig) -> Iterator[str]:
    if not config.stages:
        yield "stages: name at least one, for example stages: [{name: edit, task: edit, ...}]"
    names = [part.label for stage in config.stages for part in stage_parts(stage)]
    names += [stage.name for stage in config.stages if stage.task == JOINT]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"stages: the name {name!r} is used more than once"
    for stage in config.stages:
        yield from _tasks(stage)
        ema, updates = config.learner.ema, stage.steps * config.learner.updates_per_rollout
        if ema.enabled and updates < ema.every:
            yield (
                f"stage {stage.name!r}: its {updates} updates are fewer than learner.ema.every={ema.every}, so the "
                "shipped average would be the adapter it started from; lower learner.ema.every or set "
                "learner.ema.enabled=false"
            )
        for part in stage_parts(stage):
            yield from _rewards(f"stage {part.label!r}", part.rewards)
    yield from _rehearsals(config)


def _rehearsals(config: RunConfig) -> Iterator[str]:
    for index, stage in enumerate(config.stages):
        if stage.rehearsal is None:
            continue
        where = f"stage {stage.name!r}: rehearsal"
        if not rehearsed_parts(config.stages, index):
            yield f"{where}: no stage before it trains another task, so there is nothing to keep; take it out"
        if config.learner.kl_reference == "base":
            yield (
                f"{where} holds the policy of the stage's start, learner.kl_reference='base' that of the run's; set "
                "learner.kl_reference=stage_start, or take the rehearsal out"
            )


def _tasks(stage: StageConfig) -> Iterator[str]:
    """What a stage trains: one task, or the different ones of a joint stage."""
    where, tasks = f"stage {stage.name!r}", stage_tasks(stage)
    if stage.task != JOINT:
        if not stage.prompts:
            yield f"{where}: prompts is not set; name its JSONL file"
        if stage.parts:
            yield f"{where}: parts belong to a stage with task: joint; set that, or take them out"
        return
    if stage.prompts or stage.rewards:
        yield f"{where}: a joint stage has no prompts and rewards of its own; give them to its parts"
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        yield f"{where}: parts train {tasks}; a joint stage needs two tasks or more, each once"
    if 1 <= stage.steps < len(tasks):
        yield f"{where}: steps={stage.steps} end before each of its {len(tasks)} parts had its turn"


def _evaluation(config: RunConfig) -> Iterator[str]:
    tasks = [task.task for task in config.evaluation.tasks]
    for task in sorted({t for t in tasks if tasks.count(t) > 1}):
        yield f"evaluation.tasks: task {task!r} is given more than once"
    for task_config in config.evaluation.tasks:
        yield from _rewards(f"evaluation of {task_config.task}", task_config.rewards)
    if config.evaluation.every or config.gallery.prompts:
        for part in [part for stage in config.stages for part in stage_parts(stage)]:
            if part.task not in tasks:
                yield (
                    f"stage {part.label!r} trains {part.task}, of which evaluation.tasks holds no prompts to draw "
                    "while it runs; add them, or set evaluation.every=0 and gallery.prompts=0"
                )


def _keep_best(config: RunConfig) -> Iterator[str]:
    """What would leave every checkpoint within a stage without the score; those of stage borders are kept anyway."""
    best = config.checkpoint.keep_best
    if best is None:
        return
    task = next((task for task in config.evaluation.tasks if task.task == best.task), None)
    if task is None:
        known = " and ".join(task.task for task in config.evaluation.tasks) or "none"
        yield f"checkpoint.keep_best.task={best.task!r}: the tasks of evaluation.tasks are {known}; add it, or name one"
        return
    labels = [reward_label(RewardSpec(reward.name, label=reward.label)) for reward in task.rewards]
    if best.reward is not None and best.reward not in labels:
        yield (
            f"checkpoint.keep_best.reward={best.reward!r}: the evaluation of {best.task} has {', '.join(labels)}; name "
            "one of these, or null for their weighted sum"
        )
    saved, evaluated = config.checkpoint.every, config.evaluation.every
    lengths = [stage.steps for stage in config.stages if best.task in stage_tasks(stage)]
    if saved >= 1 and evaluated >= 0 and not any(0 < math.lcm(saved, evaluated) < steps for steps in lengths):
        yield (
            f"checkpoint.keep_best: no checkpoint within a stage has a score of {best.task}: with checkpoint.every="
            f"{saved} and evaluation.every={evaluated} no stage that trains it ({lengths or 'there is none'}) has a "
            "step, before its last, at which both are due; make one of the two keys a multiple of the other, below the "
            "stage's steps"
        )


def _rewards(where: str, rewards: list[RewardConfig]) -> Iterator[str]:
    if not rewards:
        yield f"{where}: rewards is empty; name at least one"
    elif all(reward.weight == 0 for reward in rewards):
        yield f"{where}: every reward has weight 0, so nothing would be learned or compared"


def _services(config: RunConfig) -> Iterator[str]:
    known: dict[str, tuple[str, RewardConfig]] = {}
    parts = [
        (f"stage {part.label!r}", part.rewards) for stage in config.stages for part in stage_parts(stage)
    ]
    parts += [(f"evaluation of {task.task}", task.rewards) for task in config.evaluation.tasks]
    for where, reward in [(where, reward) for where, rewards in parts for reward in rewards]:
        if reward.service is None:
            continue
        label = reward_label(RewardSpec(reward.name, label=reward.label))
        waits, limit = reward.service.unavailable_s + 60, config.resources.start_timeout_s
        if waits >= limit:
            yield (
                f"reward {label!r} of {where}: service.unavailable_s and a minute = {waits:g} s reach "
                f"resources.start_timeout_s={limit:g}, so a service that is away would be told as a reward worker that "
                f"hangs; raise resources.start_timeout_s or lower service.unavailable_s"
            )
        first, other = known.setdefault(label, (where, reward))
        if (reward.name, reward.params) != (other.name, other.params):
            yield (
                f"reward label {label!r} means {other.name} {other.params} in {first} and {reward.name} "
                f"{reward.params} in {where}; a service knows a reward by its label, so give each a label of its own"
            )


def _resources(config: RunConfig) -> Iterator[str]:
    resources, learner = config.resources, config.learner
    if config.model.compile:
        if learner.old_log_prob != "replay":
            yield (
                f"model.compile=true with learner.old_log_prob={learner.old_log_prob!r}: compiled graphs with and "
                "without gradient round differently, by more than the clip range; set learner.old_log_prob=replay"
            )
        if learner.zero_stage == 3:
            yield (
                "model.compile=true with learner.zero_stage=3: ZeRO-3 gathers weights in hooks that a compiled block "
                "does not call; use ZeRO 1 or 2, or model.compile=false"
            )
    if resources.placement == "inprocess":
        if learner.zero_stage == 3:
            yield (
                "resources.placement='inprocess' with learner.zero_stage=3: a rank cannot sample alone while its "
                "weights are spread over the others; use ZeRO 1 or 2, or another placement"
            )
        if config.rollout.workers != learner.ranks:
            yield (
                f"resources.placement='inprocess': the learner's ranks sample, so rollout.workers="
                f"{config.rollout.workers} must equal learner.ranks={learner.ranks}"
            )
    if resources.placement == "shared" and config.rollout.workers < learner.ranks:
        yield (
            f"resources.placement='shared' with rollout.workers={config.rollout.workers} < learner.ranks="
            f"{learner.ranks}: some GPUs would stand idle during the rollout; raise rollout.workers"
        )
    if resources.min_rollout_workers > config.rollout.workers:
        yield (
            f"resources.min_rollout_workers={resources.min_rollout_workers} is more than rollout.workers="
            f"{config.rollout.workers}"
        )
