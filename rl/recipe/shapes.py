"""The shapes of a run's pictures: the rule that its recipe gives, how many prompts have which, and which have none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import recipes
from core.prompts import Prompt, PromptFileError, few, load_prompts
from models.sizes import geometry
from rl.recipe.schema import EvaluationTaskConfig, ModelConfig, RunConfig
from rl.recipe.stage_parts import StagePart, stage_parts
from rollout.shapes import Shape, ShapeRule, UnreadableError

Part = StagePart | EvaluationTaskConfig


def shape_rule(model: ModelConfig) -> ShapeRule:
    """How the recipe chooses the size of a prompt's pictures."""
    return ShapeRule(
        recipes.resolve(model.path),
        (model.height, model.width),
        tuple((size.height, size.width) for size in model.sizes),
        tuple(size.weight for size in model.sizes),
        model.longer_edge,
        model.reference_pixels,
    )


def part_shapes(part: Part, rule: ShapeRule) -> dict[Shape, float]:
    """How many prompts have each shape; where it is drawn, on average. What the preflight refuses is left out; where
    nothing is left, the rule's fixed size stands for it."""
    found: dict[Shape, float] = defaultdict(float)
    for prompt in _readable(part):
        try:
            shapes = rule.possible(prompt)
        except ValueError:
            continue
        weights = rule.weights if len(shapes) > 1 else (1.0,)
        for shape, weight in zip(shapes, weights, strict=True):
            found[shape] += weight / sum(weights)
    return found or {Shape(rule.fixed, (rule.fixed,) if part.task == "edit" else ()): 0.0}


def trained_shapes(config: RunConfig) -> list[list[Shape]]:
    """Of each part of the stages, those of fewest pixels first."""
    rule = shape_rule(config.model)
    return [
        sorted(part_shapes(part, rule), key=lambda shape: (shape.pixels, shape)) for part in _trained(config)
    ]


def count_shapes(config: RunConfig) -> int:
    """Of everything that the run draws."""
    rule = shape_rule(config.model)
    parts: list[Part] = [*_trained(config), *config.evaluation.tasks]
    return len({shape for part in parts for shape in part_shapes(part, rule)})


def shape_problems(rule: ShapeRule, prompts: Sequence[Prompt]) -> list[str]:
    """Lines whose pictures have no size, or one that the model cannot make. Unreadable pictures are not told here, nor
    what is wrong with the model or with the recipe's own sizes."""
    try:
        geometry(rule.folder)
    except (OSError, ValueError, KeyError):
        return []
    problems = []
    for prompt in prompts:
        if prompt.size is None and rule.longer_edge is None and len(prompt.references) < 2:
            continue
        try:
            rule.check(prompt)
        except UnreadableError:
            continue
        except ValueError as error:
            problems.append(f"{prompt.name}: {error}")
    return few(problems, "lines more without a size that can be drawn")


def _trained(config: RunConfig) -> list[StagePart]:
    return [part for stage in config.stages for part in stage_parts(stage)]


def _readable(part: Part) -> list[Prompt]:
    try:
        prompts = load_prompts(recipes.resolve(part.prompts), part.task)  # type: ignore[arg-type]
    except (PromptFileError, OSError):
        return []
    return prompts[: part.num_prompts] if isinstance(part, EvaluationTaskConfig) else prompts
