"""`python -m rewards.editreward generate RECIPE [key=value ...] [--dry-run]`: edits of mixed quality from a checkpoint.

    prompts ──► plan (pure) ──► jobs on Ray rollout workers ──► a shard's edits complete ──► tar written, renamed

A shard that is there is done; every other one is made whole from its start. So a run that was killed, at any
moment and by any signal, is continued by giving the same command again, and its shards are byte for byte those of
a run that was not (on the same hardware). What it was made with is kept in `generation.json`: another seed, model,
adapter, prompt set or mixture is refused there.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import recipes
from core.command_line import add_recipe_arguments
from core.failures import ClusterError
from core.files import file_sha256
from core.logs import relative_path_problems
from core.output import output_problems
from core.prompts import Prompt, PromptFileError, load_prompts, reference_problems
from core.recipe import ConfigError, value_problems
from core.run_status import watch_run
from rewards.editreward.data.generate_config import (
    BASE,
    GenerateSection,
    Header,
    load_section,
    output_folder,
    section_recipe,
)
from rewards.editreward.data.generate_record import RECORD, only_one, same_as_before

log = logging.getLogger("rewards.editreward.data.generate")
REFUSALS = (ConfigError, ClusterError)
SHAPING = (
    "edits_per_prompt", "num_steps", "guidance_scale", "noise_level", "negative_prompt", "edit_type_key", "dtype",
    "height", "width", "max_sequence_length", "chunk_size", "prompts_per_shard",
)  # fmt: skip
"""Keys whose values are in every byte of the result; the others only say who does the work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with a section `generate`, overrides, and the dry run."""
    dry_run = "check and print the plan; no Ray, no GPU"
    schema = section_recipe("generate", GenerateSection)
    add_recipe_arguments(parser, "recipes/editreward_generate.yaml", schema, dry_run=dry_run)


def run(arguments: argparse.Namespace) -> int:
    """0: every edit is there (or the dry run found nothing missing)."""
    header, section = load_section(arguments.recipe, arguments.overrides, "generate", GenerateSection)
    prompts = check(header, section)
    for line in describe(header, section, prompts):
        log.info(line)
    if not arguments.dry_run:
        generate(header, section, prompts)
    return 0


def check(header: Header, section: GenerateSection) -> list[Prompt]:
    """The prompts to edit, in order. Raises ConfigError with everything that keeps the run from starting."""
    from models.folders import check_model_folder

    problems = value_problems(section, "generate.")
    prompts: list[Prompt] = []
    try:
        prompts = load_prompts(recipes.resolve(section.prompts), "edit")
    except PromptFileError as error:
        problems += error.problems
    if section.num_prompts > len(prompts) > 0:
        problems.append(
            f"{section.prompts} holds {len(prompts)} prompts, generate.num_prompts={section.num_prompts} asks for more"
        )
    prompts = prompts[: section.num_prompts or None]
    problems += [
        f"{prompt.name}: {len(prompt.references)} references; the edits that EditReward learns from have one source"
        for prompt in prompts
        if len(prompt.references) > 1
    ]
    # What cannot be read is that prompt's failure alone, when its turn comes.
    drawn = (section.width, section.height)
    problems += reference_problems(prompts, drawn, "set generate.width and generate.height to its own")[1]
    problems += [f"generate.model: {p}" for p in check_model_folder(recipes.resolve(section.model))]
    problems += output_problems("generate.output", output_folder(header, section.output, "edits"))
    paths = {"output_dir": header.output_dir, "generate.output": section.output or header.output_dir}
    problems += relative_path_problems({f"{key}={p!r}": Path(p).expanduser() for key, p in paths.items()})
    if problems:
        raise ConfigError(problems)
    return prompts


def describe(header: Header, section: GenerateSection, prompts: list[Prompt]) -> list[str]:
    """The plan in lines: how many edits, of which settings."""
    from rewards.editreward.data.generate_plan import count_shards, plan_edits

    edits = plan_edits(prompts, section, header.seed)
    folder = output_folder(header, section.output, "edits")
    lines = [
        f"{len(prompts)} prompts x {section.edits_per_prompt} = {len(edits)} edits of {section.width} x "
        f"{section.height} in {count_shards(len(prompts), section)} shards, to {folder}"
    ]
    for name in ("num_steps", "guidance_scale", "noise_level"):
        counts = Counter(getattr(edit.settings, name) for edit in edits)
        lines.append(f"  {name}: " + ", ".join(f"{value:g} x {counts[value]}" for value in sorted(counts)))
    counts = Counter(section.adapters[edit.settings.adapter] for edit in edits)
    return [*lines, "  adapters: " + ", ".join(f"{name} x {count}" for name, count in sorted(counts.items()))]


def generate(header: Header, section: GenerateSection, prompts: list[Prompt]) -> None:
    """Make every shard that is not there. Raises ConfigError before anything is sampled."""
    from rewards.editreward.data.generate_cluster import Studio, load_adapters
    from rewards.editreward.data.generate_plan import count_shards
    from rewards.editreward.data.generate_run import Generation, shard_path

    folder = output_folder(header, section.output, "edits")
    with only_one(folder):
        adapters = load_adapters(section)
        record = made_with(header, section, prompts, list(adapters.sha256))
        same_as_before(folder / RECORD, record)
        shards = range(count_shards(len(prompts), section))
        missing = [shard for shard in shards if not shard_path(folder, shard).is_file()]
        log.info("%d of %d shards are there already", len(shards) - len(missing), len(shards))
        if missing:
            with watch_run(folder, resume=False):
                studio = Studio(section, adapters)
                try:
                    Generation(header, section, prompts, record, studio, folder).run(missing)
                finally:
                    studio.close()
        _report(folder, len(shards))


def made_with(
    header: Header, section: GenerateSection, prompts: list[Prompt], adapters: list[str | None]
) -> dict[str, Any]:
    """All that decides the bytes of the result. Reads the whole model folder, for its hash."""
    from models.folders import model_sha256

    model = recipes.resolve(section.model)
    log.info("hashing %s", model)
    return {
        "seed": header.seed,
        "prompts_sha256": file_sha256(recipes.resolve(section.prompts)),
        "num_prompts": len(prompts),
        "model_sha256": model_sha256(model),
        "adapters": [
            {"name": BASE if sha256 is None else Path(name).name, "sha256": sha256}
            for name, sha256 in zip(section.adapters, adapters, strict=True)
        ],
        **{name: value for name, value in dataclasses.asdict(section).items() if name in SHAPING},
    }


def _report(folder: Path, shards: int) -> None:
    """What could not be made, and that the rest is there."""
    from rewards.editreward.data.generate_run import read_failures

    failures = read_failures(folder)
    for failure in failures[:10]:
        log.warning("not made: %s: %s", failure["key"], failure["detail"])
    log.info("%s: %d shards, %d edits could not be made", folder, shards, len(failures))
