"""`python -m rewards.editreward label RECIPE [key=value ...] [--dry-run]`: the judge grades every edit.

    shards of edits ──► one structured question each (rewards/judge: limits, budget, cache) ──► shards with scores

A share of the edits is asked about twice, with another seed, and the report says how far the judge agrees with
itself. A failure is recorded with its outcome, and its scores are null. Killed or stopped, the same command
continues: whole shards are kept, answers of the rest come from the judge's cache, and what failed because the
endpoint was away is asked again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from core.command_line import add_recipe_arguments
from core.files import atomic_write_json
from core.recipe import ConfigError
from core.run_status import watch_run
from rewards.editreward.config import Header
from rewards.editreward.data.generate_config import load_section, output_folder, section_recipe
from rewards.editreward.data.generate_record import RECORD, only_one, same_as_before
from rewards.editreward.data.label_config import (
    LabelSection,
    judge_settings,
    label_problems,
)
from rewards.editreward.data.label_questions import EditLabels, read_template
from rewards.editreward.data.label_run import (
    FIRST,
    Labelling,
    LabelStopped,
    ShardJob,
    read_provenance,
    read_readable,
    settled,
)
from rewards.editreward.data.shards import DataError, find_shards, shard_members
from rewards.judge.budget import PROMPT_BYTES, cost_lines
from rewards.judge.client import JudgeClient
from rewards.judge.questions import Sample
from rewards.judge.template_files import Template, TemplateError

log = logging.getLogger("rewards.editreward.data.label")
REFUSALS = (ConfigError, DataError, LabelStopped)
REPORT = "labels.json"
NAMED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with a section `label`, overrides, and the dry run."""
    dry_run = "check and print the cost; asks nobody anything"
    schema = section_recipe("label", LabelSection)
    add_recipe_arguments(parser, "recipes/editreward_label.yaml", schema, dry_run=dry_run)


def run(arguments: argparse.Namespace) -> int:
    """0: every edit has its outcome (or the dry run found nothing missing)."""
    header, section = load_section(arguments.recipe, arguments.overrides, "label", LabelSection)
    template, jobs = check(header, section)
    label(header, section, template, jobs, dry_run=arguments.dry_run)
    return 0


def check(header: Header, section: LabelSection) -> tuple[Template, list[ShardJob]]:
    """The question, and all shards. Raises ConfigError with everything that keeps the run from starting."""
    problems = label_problems(header, section)
    try:
        template = read_template(section.template)
    except TemplateError as error:
        problems.append(f"label.template: {error}")
    shards, unmatched = find_shards(
        "label.shards", section.shards or [str(header.run_dir / "edits" / "*.tar")]
    )
    problems += unmatched
    names = [shard.name for shard in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        problems.append(f"label.shards: several shards are called {twice[0]}; label their folders apart")
    folder = output_folder(header, section.output, "labelled")
    if any(shard.parent.absolute() == folder for shard in shards):
        problems.append(f"label.output {folder} holds the shards to label; give another folder")
    if not problems:
        problems += [f"label.judge: {p}" for p in JudgeClient(judge_settings(header, section)).problems()]
    if problems:
        raise ConfigError(problems)
    return template, [ShardJob(shard, folder / shard.name) for shard in shards]


def label(
    header: Header, section: LabelSection, template: Template, jobs: list[ShardJob], *, dry_run: bool
) -> None:
    """Label what is not labelled and write the report. Raises ConfigError, LabelStopped, DataError."""
    folder, settings = output_folder(header, section.output, "labelled"), judge_settings(header, section)
    open_jobs = [job for job in jobs if not settled(job, header, section)]
    edits = sum(len(shard_members(job.source)) for job in open_jobs)
    log.info("%d of %d shards are labelled, %d edits to go", len(jobs) - len(open_jobs), len(jobs), edits)
    for line in _cost(section, settings, template, edits, open_jobs):
        log.info(line)
    if dry_run:
        return
    with only_one(folder):
        made_with = {
            "model": settings.model,
            "template": template.name,
            "template_sha256": template.sha256,
            "temperature": settings.temperature,
            "seed": header.seed,
            "max_tokens": section.max_tokens,
        }
        same_as_before(folder / RECORD, made_with)
        if open_jobs:
            with watch_run(folder, resume=False):
                asyncio.run(Labelling(header, section, settings, template).run(open_jobs, edits))
        _report(folder, jobs)


def _cost(
    section: LabelSection, settings: Any, template: Template, edits: int, jobs: list[ShardJob]
) -> list[str]:
    """What is still to be paid at most, for pictures of the size of the first edit."""
    if not edits:
        return []
    first = next(iter(read_readable(jobs[0].source)), None)
    blank = Image.new("RGB", first.result.size if first else (512, 512))
    sample = Sample("edit", "x" * PROMPT_BYTES, blank, blank)
    protocol = EditLabels()
    templates = dict.fromkeys(protocol.roles("edit"), template)
    questions = protocol.questions(sample, templates, section.max_tokens)
    images = edits + round(section.second_opinions * edits)
    return cost_lines(settings, questions, images=images, max_asks=section.max_asks)[:2]


def _report(folder: Path, jobs: list[ShardJob]) -> None:
    from rewards.editreward.data.label_report import make_report, report_lines

    found: dict[str, Mapping[str, Any]] = {}
    for job in jobs:
        found |= {f"{job.target.name}: {key}": p for key, p in read_provenance(job.target).items()}
    report = make_report(found.values())
    atomic_write_json(folder / REPORT, report)
    failed = [(key, p[FIRST]) for key, p in found.items() if p[FIRST]["outcome"] != "ok"]
    for key, opinion in failed[:NAMED]:
        log.warning("not labelled: %s: %s: %s", key, opinion["outcome"], opinion["detail"])
    for line in report_lines(report):
        log.info(line)
    log.info("%s: labelled shards and %s", folder, REPORT)
