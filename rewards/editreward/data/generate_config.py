"""The schema of the section `generate`, and how a command reads its section of an EditReward recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MinLen
from omegaconf import MISSING

from core.keys import AtLeast0, Count, Device, Guidance, ModelDtype, NonNegative, Positive
from core.recipe import read_recipe
from rewards.editreward.config import OTHER_SECTIONS, Header, Recipe

BASE = "base"
"""In `adapters`: the model as it is, without an adapter."""

Section = TypeVar("Section")


@dataclass
class GenerateSection:
    """Where edits come from, and what is mixed so that their quality spreads.

    Of `num_steps`, `guidance_scale`, `noise_level` and `adapters` every edit gets one value each, drawn from (seed,
    prompt, k) alone; naming a value twice doubles its share. CPUs and GPUs are Ray's, for each worker.
    """

    model: str = MISSING
    """Folder of a Kontext checkpoint."""
    prompts: str = MISSING
    """JSONL file of edit prompts."""
    output: str | None = None
    """Folder of the shards; null: `edits/` in the run's folder."""
    num_prompts: AtLeast0 = 0
    """Prompts that are edited, from the first; 0: all of them."""
    edits_per_prompt: Count = 8
    """Edits of each prompt."""
    num_steps: Annotated[list[Count], MinLen(1)] = field(default_factory=lambda: [6, 10, 28])
    """Denoising steps."""
    guidance_scale: Annotated[list[Guidance], MinLen(1)] = field(default_factory=lambda: [1.5, 3.5, 5.0])
    """Classifier-free guidance; up to 1 there is none."""
    noise_level: Annotated[list[NonNegative], MinLen(1)] = field(default_factory=lambda: [0.0, 0.7])
    """0: ODE; above: SDE, as in RL rollouts."""
    adapters: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: [BASE])
    """PEFT folders, or `base`."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    edit_type_key: str = "edit_type"
    """Where a prompt's metadata name the kind of edit, dots for depth."""
    dtype: ModelDtype = "bfloat16"
    """Type that the model computes in."""
    height: Count = 512
    """Height of the edits, in pixels."""
    width: Count = 512
    """Width of the edits, in pixels."""
    max_sequence_length: Count = 256
    """T5 tokens of a prompt."""
    chunk_size: Count = 8
    """Edits of equal settings that are sampled together."""
    prompts_per_shard: Count = 32
    """Prompts of one shard, the unit that a killed run repeats."""
    device: Device = "cuda"
    """Where workers run."""
    workers: Count = 8
    """Processes that sample."""
    worker_cpus: NonNegative = 2.0
    """CPUs of each."""
    encode_workers: Count = 1
    """Processes that encode prompts."""
    encode_cpus: NonNegative = 2.0
    """CPUs of one of them."""
    encode_gpus: NonNegative = 0.0
    """GPUs of one of them."""
    threads: Count = 4
    """CPU threads that each process really uses."""
    embedding_cache_gib: NonNegative = 1.0
    """Host memory for embeddings of prompts that come again, in GiB."""
    max_restarts: AtLeast0 = 3
    """Times that a worker is started again after it died."""
    placement_timeout_s: Positive = 600.0
    """Longest wait for the cluster's resources, in seconds."""
    start_timeout_s: Positive = 1800.0
    """Longest wait for a worker to be ready, in seconds."""
    call_timeout_s: Positive = 1800.0
    """Longest wait for a worker's answer, in seconds."""


@functools.cache
def section_recipe(key: str, schema: type[Section]) -> type[Header]:
    """The schema of a recipe of which one command reads the section `key`."""
    keys = [(key, schema, field(default=MISSING))]
    return dataclasses.make_dataclass(f"{schema.__name__}Recipe", keys, bases=(Header,))


def output_folder(header: Header, output: str | None, usual: str) -> Path:
    """Where a command writes its shards: the section's `output`, else a folder of the run."""
    return Path(output).expanduser().absolute() if output else header.run_dir / usual


def load_section(
    path: str | Path, overrides: Sequence[str], key: str, schema: type[Section]
) -> tuple[Header, Section]:
    """The section `key` of a recipe with the shared keys; sections of other commands may stand beside it.

    Raises ConfigError listing every problem of the keys; values out of range are the command's to name.
    """
    others = {*OTHER_SECTIONS, *(item.name for item in dataclasses.fields(Recipe))}
    whole = section_recipe(key, schema)  # type: ignore[arg-type]
    recipe: Any = read_recipe(path, overrides, whole, others=sorted(others), defer_values=True)
    return recipe, getattr(recipe, key)
