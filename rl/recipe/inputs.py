"""What a run reads beside its recipe: prompts, reference images, the base model, the code of rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import recipes
from core.files import file_sha256
from core.inputs import Inputs, folder_files, hash_files, hash_together, software
from core.prompts import load_prompts
from models.folders import METAQUERY_PARTS, PARTS
from models.lora.load import starting_adapter
from rewards.base import RewardSet
from rewards.inputs import all_reward_inputs, code_name
from rewards.recipe import reward_specs
from rl.recipe.reward_sets import scored_parts
from rl.recipe.schema import ModelConfig, RunConfig

if TYPE_CHECKING:
    from models.lora.attach import State

MODEL, VLM, ADAPTER = "model.path", "model.vlm", "model.adapter"
"""What names of the base model's files begin with."""


def run_inputs(config: RunConfig, reward_sets: Sequence[RewardSet], known: Inputs) -> Inputs:
    """Those of a run in which `preflight` found nothing wrong. `known`: what the run read before, which stands for
    served rewards until they have answered."""
    held: dict[str, str] = {}
    for part in scored_parts(config):
        if not part.prompts or f"prompts {part.prompts}" in held:
            continue
        path = recipes.resolve(part.prompts)
        held[f"prompts {part.prompts}"] = file_sha256(path)
        pictures = {picture for p in load_prompts(path, part.task) for picture in p.references}  # type: ignore[arg-type]
        files = [picture for picture in pictures if not picture.startswith("data:")]
        if files:
            held[f"reference images of {part.prompts}"] = hash_together(map(Path, files), path.parent)
    specs = [spec for reward_set in reward_sets for spec in reward_set.rewards]
    held |= all_reward_inputs(specs)
    for spec in specs:
        if spec.service is not None and (name := code_name(spec)) in known.held:
            held[name] = known.held[name]
    if (start := start_from(config.model)) is not None:
        from models.lora.attach import hash_state

        held[ADAPTER] = hash_state(start)
    return Inputs(held | hash_files(_model_files(config.model)), software())


def start_from(model: ModelConfig) -> State | None:
    """The tensors of `model.adapter`, None where a fresh adapter is trained. Raises as `starting_adapter` does."""
    if model.adapter is None:
        return None
    from models.lora.attach import LoraSettings

    lora = LoraSettings(model.lora.rank, model.lora.alpha, tuple(model.lora.targets))
    return starting_adapter(recipes.resolve(model.path), recipes.resolve(model.adapter), lora)


def evaluation_identity(config: RunConfig, held: Mapping[str, str]) -> str:
    """One sha256 of what scores on held-out prompts depend on beside the adapter and the recipe's keys: scores of
    another identity do not compare."""
    tasks = config.evaluation.tasks
    rewards = tuple(f" of reward {spec.name}" for task in tasks for spec in reward_specs(task.rewards))
    names = {f"{kind}{task.prompts}" for task in tasks for kind in ("prompts ", "reference images of ")}
    found = {
        name: digest
        for name, digest in held.items()
        if name in names or name.startswith((MODEL, VLM)) or any(reward in name for reward in rewards)
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _model_files(model: ModelConfig) -> dict[str, Path]:
    if model.vlm is None:
        return folder_files(MODEL, model.path, PARTS)
    return folder_files(MODEL, model.path, METAQUERY_PARTS) | folder_files(VLM, model.vlm)
