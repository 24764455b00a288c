"""Everything that can be found wrong before a GPU is taken or Ray is asked for anything, in one list."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import recipes
from core.logs import relative_path_problems
from core.output import output_problems
from core.prompts import Prompt, PromptFileError, load_prompts, reference_problems
from core.recipe import value_problems
from rewards.base import RewardSet
from rewards.checks import check_rewards
from rl.recipe.inputs import start_from
from rl.recipe.plan import disk_needs
from rl.recipe.reward_sets import part_reward_set, scored_parts
from rl.recipe.schema import EvaluationTaskConfig, ModelConfig, RunConfig
from rl.recipe.shapes import shape_problems, shape_rule
from rl.recipe.stage_parts import StagePart, stage_parts
from rl.recipe.validate import find_problems
from rollout.shapes import ShapeRule

log = logging.getLogger(__name__)

_SIZE_KEYS = ("model.height, model.width", "model.sizes", "model.longer_edge")
_REMEDY = "set model.longer_edge, with which edits keep the proportions of their pictures"


@dataclass(frozen=True)
class Preflight:
    """problems: one line each, empty when the run may start; reward_sets: what the reward workers load."""

    problems: list[str]
    reward_sets: list[RewardSet]


def preflight(config: RunConfig) -> Preflight:
    """Check keys, paths, prompts, reference images, rewards (with a dry call), model folder and LoRA targets."""
    problems = find_problems(config)
    problems += _check_paths(config)
    model_problems = _check_model(config)
    needs = None if problems or model_problems else disk_needs(config)
    folder = Path(config.output_dir) / str(config.name)
    problems += output_problems(f"output_dir={config.output_dir!r}", folder, needs)
    problems += model_problems
    # Of a size that the model cannot draw, no reference has the proportions.
    shapes = None if any(p.startswith(_SIZE_KEYS) for p in model_problems) else shape_rule(config.model)
    reward_sets = []
    for part in scored_parts(config):
        found, prompts = _check_prompts(part, shapes)
        problems += [p for p in found if p not in problems]
        # What a reward's keys say has been looked at above, and that there is one at all.
        sound = [reward for reward in part.rewards if not value_problems(reward)]
        if part.task not in ("edit", "t2i") or not sound:
            continue
        reward_set = part_reward_set(replace(part, rewards=sound), prompts, config)
        problems += [p for p in check_rewards(reward_set, prompts=prompts) if p not in problems]
        reward_sets.append(reward_set)
    return Preflight(problems, reward_sets)


def _check_paths(config: RunConfig) -> list[str]:
    read = {
        key: getattr(config.model, key.partition(".")[2])
        for key in ("model.path", "model.vlm", "model.adapter")
    }
    parts = [part for stage in config.stages for part in stage_parts(stage) if part.prompts]
    read |= {f"prompts of stage {part.label!r}": part.prompts for part in parts}
    read |= {f"prompts of evaluation {task.task!r}": task.prompts for task in config.evaluation.tasks}
    return relative_path_problems(
        {f"output_dir={config.output_dir!r}": config.output_dir},
        read={f"{key}={path!r}": path for key, path in read.items()},
    )


def _check_prompts(
    part: StagePart | EvaluationTaskConfig, shapes: ShapeRule | None
) -> tuple[list[str], list[Prompt]]:
    if part.task not in ("edit", "t2i") or not part.prompts:
        return [], []
    try:
        prompts = load_prompts(recipes.resolve(part.prompts), part.task)  # type: ignore[arg-type]
    except PromptFileError as error:
        return error.problems, []
    problems = []
    if part.task == "edit":
        fixed = shapes.fixed[::-1] if shapes and shapes.longer_edge is None else None
        unreadable, squashed = reference_problems(prompts, fixed, _REMEDY)
        problems += unreadable + squashed
    if shapes:
        problems += shape_problems(shapes, prompts)
    wanted = getattr(part, "num_prompts", 0)
    if wanted > len(prompts):
        problems.append(f"{part.prompts} holds {len(prompts)} prompts, num_prompts={wanted} asks for more")
    return problems, prompts


def _check_model(config: RunConfig) -> list[str]:
    from models.preflight import model_problems

    folder, vlm = recipes.resolve(config.model.path), config.model.vlm
    vlm_folder = None if vlm is None else recipes.resolve(vlm)
    problems = model_problems(folder, vlm_folder, model_key="model.path", vlm_key="model.vlm")
    return problems or [*_check_lora(config, folder), *_check_sizes(config.model, folder)]


def _check_lora(config: RunConfig, folder: Path) -> list[str]:
    """LoRA targets against the real modules, built without memory on the meta device."""
    from models.components import transformer_shell
    from models.lora.attach import attach_lora

    problems = []
    try:
        lora = config.model.lora
        attach_lora(transformer_shell(folder), rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    except (ValueError, RuntimeError) as error:
        problems.append(f"model.lora: {error}")
    else:
        try:
            start_from(config.model)
        except (ValueError, OSError) as error:
            problems.append(f"model.adapter: {error}")
    return problems


def _check_sizes(model: ModelConfig, folder: Path) -> list[str]:
    """The recipe's sizes against what the model makes."""
    from models.sizes import check_size, geometry, longer_edge_size

    problems = []
    sizes = {_SIZE_KEYS[0]: (model.height, model.width)}
    sizes |= {f"{_SIZE_KEYS[1]}[{i}]": (size.height, size.width) for i, size in enumerate(model.sizes)}
    for key, size in sizes.items():
        try:
            check_size(geometry(folder), *size)
        except (ValueError, KeyError) as error:
            problems.append(f"{key}: {error}")
    if model.longer_edge is not None:
        try:
            check_size(geometry(folder), *longer_edge_size(1, 1, model.longer_edge, geometry(folder).step))
        except (ValueError, KeyError) as error:
            problems.append(f"{_SIZE_KEYS[2]}: {error}")
    return problems
