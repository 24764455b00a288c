"""The schema of the section `generate`, and how a command reads its section of an EditReward recipe."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf

import recipes
from core.recipe import ConfigError, node_problems, read_over_bases
from rewards.editreward.config import OTHER_SECTIONS, Recipe

BASE = "base"
"""In `adapters`: the model as it is, without an adapter."""


@dataclass
class GenerateSection:
    """Where edits come from, and what is mixed so that their quality spreads.

    Of `num_steps`, `guidance_scale`, `noise_level` (0: ODE; above: SDE, as in RL rollouts) and `adapters` (PEFT
    folders, or `base`), every edit gets one value each, drawn from (seed, prompt, k) alone; naming a value twice
    doubles its share. The first `num_prompts` lines of `prompts` are edited, 0: all of them. `chunk_size` edits of
    equal settings are sampled together. `prompts_per_shard` prompts make one shard, the unit that a killed run
    repeats. `edit_type_key`: where a prompt's metadata name the kind of edit, dots for depth. `output: null` is
    `edits/` in the run's folder. CPUs and GPUs are Ray's, for each worker.
    """

    model: str = MISSING
    prompts: str = MISSING
    output: str | None = None
    num_prompts: int = 0
    edits_per_prompt: int = 8
    num_steps: list[int] = field(default_factory=lambda: [6, 10, 28])
    guidance_scale: list[float] = field(default_factory=lambda: [1.5, 3.5, 5.0])
    noise_level: list[float] = field(default_factory=lambda: [0.0, 0.7])
    adapters: list[str] = field(default_factory=lambda: [BASE])
    negative_prompt: str = ""
    edit_type_key: str = "edit_type"
    dtype: str = "bfloat16"
    height: int = 512
    width: int = 512
    max_sequence_length: int = 256
    chunk_size: int = 8
    prompts_per_shard: int = 32
    device: str = "cuda"
    workers: int = 8
    worker_cpus: float = 2.0
    encode_cpus: float = 2.0
    encode_gpus: float = 0.0
    threads: int = 4
    embedding_cache_gib: float = 1.0
    max_restarts: int = 3
    placement_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    call_timeout_s: float = 1800.0


@dataclass(frozen=True)
class Header:
    """The keys that all sections share. Everything is written under `output_dir/name`."""

    name: str
    output_dir: str
    seed: int

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name


Section = TypeVar("Section")


def load_section(
    path: str | Path, overrides: list[str], key: str, schema: type[Section]
) -> tuple[Header, Section]:
    """The section `key` of a recipe with the shared keys; sections of other commands may stand beside it.

    Raises ConfigError listing every problem of the keys.
    """
    file = recipes.resolve(path)
    if not file.is_file():
        raise ConfigError([f"recipe {path} does not exist (looked for {file.absolute()})"])
    try:
        given = OmegaConf.merge(read_over_bases(file), OmegaConf.from_dotlist(overrides))
    except Exception as error:  # the YAML parser's and OmegaConf's own classes
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(given, DictConfig) or key not in given:
        raise ConfigError([f"{path}: has no section '{key}'"])
    known = {f.name for f in dataclasses.fields(Recipe)} | set(OTHER_SECTIONS)
    problems = [
        f"unknown key '{name}': known here: {', '.join(sorted(known))}"
        for name in map(str, given)
        if name not in known
    ]
    header = {name: given.get(name, default) for name, default in (("output_dir", "runs"), ("seed", 0))}
    if not given.get("name"):
        problems.append("key 'name' has no value; set it in the recipe or as name=...")
    problems += node_problems(OmegaConf.to_container(given[key], resolve=True), schema, f"{key}.")
    if problems:
        raise ConfigError(problems)
    section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given[key]))
    return Header(str(given.name), str(header["output_dir"]), int(header["seed"])), section  # type: ignore[return-value]


def section_problems(section: GenerateSection) -> list[str]:
    """Every value that is out of range, one sentence each."""
    mixed: list[tuple[str, list[Any]]] = [
        (name, getattr(section, name)) for name in ("num_steps", "guidance_scale", "noise_level", "adapters")
    ]
    problems = [f"generate.{name} is empty; give at least one value" for name, values in mixed if not values]
    problems += [f"generate.num_steps holds {n}; give 1 or more" for n in section.num_steps if n < 1]
    for name in ("guidance_scale", "noise_level"):
        least = 1.0 if name == "guidance_scale" else 0.0
        problems += [
            f"generate.{name} holds {value}; give numbers of {least:g} or more"
            for value in getattr(section, name)
            if not (math.isfinite(value) and value >= least)
        ]
    for name, choices in (("dtype", ("float32", "bfloat16")), ("device", ("cpu", "cuda"))):
        if getattr(section, name) not in choices:
            problems.append(
                f"generate.{name} is {getattr(section, name)!r}; choose one of {', '.join(choices)}"
            )
    whole = ("edits_per_prompt", "chunk_size", "prompts_per_shard", "workers", "threads", "height", "width")
    problems += [
        f"generate.{name} is {getattr(section, name)}; give 1 or more"
        for name in whole
        if getattr(section, name) < 1
    ]
    if section.num_prompts < 0:
        problems.append(
            f"generate.num_prompts is {section.num_prompts}; give 0 for all, or a number of prompts"
        )
    return problems
