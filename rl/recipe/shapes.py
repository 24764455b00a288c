"""The shapes of a run's pictures: the rule that its recipe gives, and which lines it has no shape for."""

from __future__ import annotations

from collections.abc import Sequence

import recipes
from core.prompts import Prompt, few
from models.sizes import geometry
from rl.recipe.schema import ModelConfig
from rollout.shapes import ShapeRule, UnreadableError


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


def shape_problems(rule: ShapeRule, prompts: Sequence[Prompt]) -> list[str]:
    """Lines whose pictures have no size, or one that the model cannot make. Unreadable pictures are not told here, nor
    what is wrong with the recipe's own sizes."""
    try:
        geometry(rule.folder)
    except (OSError, ValueError, KeyError):
        return []  # told of the model
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
