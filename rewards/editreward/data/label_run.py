"""The loop of `label`: a shard's edits to the judge, all at once; the shard written when every one has its outcome.

| outcome of an edit | its scores | asked again by a later run |
|---|---|---|
| `ok` | one label per dimension | |
| `refused`, `filtered`, `truncated`, `malformed` | null | no |
| `rate_limited`, `timeout`, `unavailable` | null | yes |
| `fatal` (key, quota, budget) | the run stops; what was answered is in the judge's cache | |
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.progress import Bar, Progress
from core.seeds import derive_seed
from rewards.editreward.config import Header
from rewards.editreward.data.label_config import LabelSection
from rewards.editreward.data.label_questions import DIMENSIONS, EditLabels, SecondOpinion
from rewards.editreward.data.shards import (
    EditSample,
    SampleError,
    parse_record,
    read_sample,
    shard_members,
    write_shard,
)
from rewards.judge.client import JudgeClient, Silence
from rewards.judge.messages import INFRASTRUCTURE, Asker, Outcome
from rewards.judge.questions import Judgement, Sample, judge_sample
from rewards.judge.settings import JudgeSettings
from rewards.judge.template_files import Template

log = logging.getLogger(__name__)
OPEN_SHARDS = 2
FIRST, SECOND = "judge", "second_opinion"
MENDABLE = {outcome.value for outcome in INFRASTRUCTURE}
NOT_ASKED = {"outcome": Outcome.UNAVAILABLE.value}


class LabelStopped(Exception):
    """No further question can be answered; the text says why. What was answered is not lost."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to label, and where the result goes."""

    source: Path
    target: Path


class Labelling:
    """Asks the judge about every edit of a number of shards."""

    def __init__(
        self, header: Header, section: LabelSection, settings: JudgeSettings, template: Template
    ) -> None:
        self._header, self._section, self._settings = header, section, settings
        self._templates = {role: template for role in EditLabels().roles("edit")}
        self._template = template
        self._client = JudgeClient(settings)
        self._first = Silence(self._client, INFRASTRUCTURE)
        self._second = SecondOpinion(self._first)
        self._cause: Exception | None = None  # why nothing more is asked

    async def run(self, jobs: Sequence[ShardJob], total: int) -> None:
        """Label these shards. Raises LabelStopped."""
        shards = asyncio.Semaphore(OPEN_SHARDS)
        # The client's queue has a time limit, so no more stand in it than it can soon take.
        places = asyncio.Semaphore(2 * self._settings.concurrency)

        async def label(job: ShardJob, bar: Bar) -> None:
            async with shards:
                await self._label_shard(job, bar, places)

        with Progress().phase("labels", total=total, unit="edit") as bar:
            tasks = [asyncio.ensure_future(label(job, bar)) for job in jobs]
            try:
                for task in asyncio.as_completed(tasks):
                    await task
            finally:
                self._cause = self._cause or LabelStopped("interrupted")
                # What is under way is paid for: its answers go into the cache before this run ends.
                await asyncio.wait(tasks, timeout=self._settings.timeout_s)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._client.close()

    async def _label_shard(self, job: ShardJob, bar: Bar, places: asyncio.Semaphore) -> None:
        samples = await asyncio.to_thread(read_readable, job.source)
        before = await asyncio.to_thread(read_provenance, job.target) if job.target.exists() else {}

        async def label(sample: EditSample) -> EditSample | None:
            async with places:
                if self._cause is not None:
                    return None
                try:
                    labelled = await self._label(sample, before.get(sample.key, {}))
                except Exception as error:
                    self._cause = self._cause or error
                    return None
            bar.advance()
            return labelled

        labelled = await asyncio.gather(*(label(sample) for sample in samples))
        if self._cause is not None:
            raise self._cause
        await asyncio.to_thread(write_shard, job.target, [sample for sample in labelled if sample])

    async def _label(self, sample: EditSample, before: Mapping[str, Any]) -> EditSample:
        """The sample with what the judge said; answers of an earlier run that no later call can better are kept."""
        kept = before if same_edit(sample.provenance, before) else {}
        first = await self._opinion(sample, self._first, kept.get(FIRST))
        opinions = {FIRST: first}
        if wants_second(self._header, self._section, sample.key):
            opinions[SECOND] = await self._opinion(sample, self._second, kept.get(SECOND))
        return dataclasses.replace(
            sample, scores=first["scores"], provenance=dict(sample.provenance) | opinions
        )

    async def _opinion(
        self, sample: EditSample, asker: Asker, kept: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if kept is not None and not mendable(kept):
            return dict(kept)
        judgement = await judge_sample(
            asker,
            EditLabels(),
            Sample("edit", sample.instruction, sample.result, sample.source),
            self._templates,
            max_asks=self._section.max_asks,
            max_tokens=self._section.max_tokens,
        )
        self._stop_if_hopeless(judgement)
        return {
            "outcome": judgement.outcome.value,
            "detail": judgement.detail,
            "scores": {name: judgement.parts.get(name) for name in DIMENSIONS},
            "model": self._settings.model,
            "snapshots": sorted(judgement.models),
            "template": self._template.name,
            "template_sha256": self._template.sha256,
            "asks": judgement.asks,
        }

    def _stop_if_hopeless(self, judgement: Judgement) -> None:
        where = f"judge {self._settings.model} at {', '.join(self._settings.base_urls)}"
        if judgement.outcome is Outcome.FATAL:
            raise LabelStopped(f"{where}: {judgement.detail}")
        silent = self._first.seconds()
        if judgement.outcome in INFRASTRUCTURE and silent >= self._section.give_up_after_s:
            raise LabelStopped(
                f"{where}: no answer for {silent:.0f} s, which is label.give_up_after_s "
                f"{self._section.give_up_after_s:g} or more; the last failure: {self._first.detail}"
            )


def settled(job: ShardJob, header: Header, section: LabelSection) -> bool:
    """Whether a shard's labels are there, of these very edits, and nothing is left that a later call may mend."""
    if not job.target.exists():
        return False
    edits, labelled = read_provenance(job.source), read_provenance(job.target)
    return edits.keys() == labelled.keys() and all(
        same_edit(edits[key], found)
        and not mendable(found[FIRST])
        and (not wants_second(header, section, key) or not mendable(found.get(SECOND, NOT_ASKED)))
        for key, found in labelled.items()
    )


def wants_second(header: Header, section: LabelSection, key: str) -> bool:
    """Whether an edit is among those asked about twice: a fixed subset, whatever was labelled before."""
    return derive_seed(header.seed, "second-opinion", key) < section.second_opinions * 2**63


def mendable(opinion: Mapping[str, Any]) -> bool:
    """Whether a later call may do better: nothing was said against the edit, the endpoint was away."""
    return opinion["outcome"] in MENDABLE


def same_edit(edit: Mapping[str, Any], labelled: Mapping[str, Any]) -> bool:
    """Whether provenance with labels is of this edit, and not of another that had its key before."""
    return dict(edit) == {name: value for name, value in labelled.items() if name not in (FIRST, SECOND)}


def read_provenance(path: Path) -> dict[str, Mapping[str, Any]]:
    """By key, without decoding a picture. What cannot be read is left out."""
    found: dict[str, Mapping[str, Any]] = {}
    with open(path, "rb") as file:
        for key, members in shard_members(path):
            with contextlib.suppress(SampleError, KeyError):
                file.seek(members["json"].offset)
                found[key] = parse_record(file.read(members["json"].size))["provenance"]
    return found


def read_readable(path: Path) -> list[EditSample]:
    """The samples of a shard. One that cannot be read is named in the log and left out: there is nothing to grade."""
    samples = []
    with open(path, "rb") as file:
        for key, members in shard_members(path):
            try:
                samples.append(read_sample(file, key, members))
            except SampleError as error:
                log.warning("%s: %s is left out: %s", path, key, error)
    return samples
