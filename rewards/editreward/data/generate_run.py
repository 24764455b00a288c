"""The loop of `generate`: jobs out to the workers, images back, a shard written when its last edit has landed."""

from __future__ import annotations

import concurrent.futures
import json
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from ray.exceptions import RayError

from core.cluster.workers import Call, Done
from core.failures import ObjectsLost
from core.files import atomic_write_json
from core.progress import Bar, Progress
from core.prompts import Prompt, load_references
from rewards.editreward.config import Header
from rewards.editreward.data.generate_cluster import Studio
from rewards.editreward.data.generate_config import GenerateSection
from rewards.editreward.data.generate_plan import Job, PlannedEdit, plan_edits, plan_jobs, shard_prompts
from rewards.editreward.data.shards import EditSample, write_shard
from rollout.engine import SampleRequest

log = logging.getLogger(__name__)
FAILURES = ".failures.json"
FETCH_S = 120
WRITERS = 2
MOST_LOSSES = 3


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"edits-{shard:05d}.tar"


def read_failures(folder: Path) -> list[dict[str, str]]:
    """Edits that could not be made, of all shards: key and detail."""
    found: list[dict[str, str]] = []
    for path in sorted(folder.glob(f"edits-*{FAILURES}")):
        found += json.loads(path.read_text(encoding="utf-8"))
    return found


@dataclass
class _OpenShard:
    """A shard on its way. missing: edits that have neither an image nor a failure yet; encoding: prompts that are being
    encoded, for which the `waiting` jobs wait; unusable: why a prompt cannot be; lost: how often nodes took an edit."""

    number: int
    edits: list[PlannedEdit]
    sources: dict[int, Image.Image]
    conditionings: dict[int, Any]
    missing: int
    images: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    encoding: int = 0
    waiting: list[Job] = field(default_factory=list)
    unusable: dict[int, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)


class Generation:
    """Samples and writes shards. `record` is `generation.json`, whose hashes go into every sample."""

    def __init__(
        self,
        header: Header,
        section: GenerateSection,
        prompts: Sequence[Prompt],
        record: Mapping[str, Any],
        studio: Studio,
        folder: Path,
    ) -> None:
        self._header, self._section, self._prompts = header, section, prompts
        self._record, self._studio, self._folder = record, studio, folder
        self._open: dict[int, _OpenShard] = {}
        self._writing: deque[concurrent.futures.Future[None]] = deque()

    def run(self, shards: Sequence[int]) -> None:
        """Make these shards. Two and more are open at once, so that no worker waits for the end of one."""
        pending = deque(shards)
        dispatcher, enough = self._studio.dispatcher, 2 * self._section.workers
        prompts = sum(len(shard_prompts(s, self._prompts, self._section)) for s in shards)
        total = prompts * self._section.edits_per_prompt
        with (
            Progress().phase("edits", total=total, unit="edit") as bar,
            concurrent.futures.ThreadPoolExecutor(WRITERS) as writers,
        ):
            while pending or self._open:
                while pending and dispatcher.outstanding() < enough:
                    self._begin(pending.popleft(), bar, writers)
                if dispatcher.outstanding():
                    done = dispatcher.wait()
                    (self._take_encoded if done.call.role == "encode" else self._land)(done, bar, writers)
            while self._writing:
                self._writing.popleft().result()

    def _begin(self, number: int, bar: Bar, writers: concurrent.futures.Executor) -> None:
        """Read the sources of a shard, have its prompts encoded, and queue its jobs."""
        edits = plan_edits(
            shard_prompts(number, self._prompts, self._section), self._section, self._header.seed
        )
        shard = self._open[number] = _OpenShard(number, edits, {}, {}, len(edits))
        for prompt in shard_prompts(number, self._prompts, self._section):
            try:
                shard.sources[prompt.index] = load_references(prompt)[0]
            except ValueError as error:
                shard.unusable[prompt.index] = str(error)
                continue
            self._encode(prompt, shard)
        for edit in edits:
            if edit.prompt.index in shard.unusable:
                self._fail(shard, edit, shard.unusable[edit.prompt.index], bar)
        readable = [edit for edit in edits if edit.prompt.index in shard.sources]
        shard.waiting = list(plan_jobs(number, readable, self._section.chunk_size))
        self._close_if_whole(shard, writers)

    def _encode(self, prompt: Prompt, shard: _OpenShard) -> None:
        shard.encoding += 1
        key = (shard.number, prompt.index)
        self._studio.dispatcher.submit(Call("encode", key, "encode_apart", ([prompt],), num_returns=2))

    def _take_encoded(self, done: Done, bar: Bar, writers: concurrent.futures.Executor) -> None:
        """Keep a prompt's conditioning; with the shard's last one, the jobs that wait for it start."""
        key: Any = done.call.key
        number, index = key
        shard = self._open[number]
        shard.encoding -= 1
        if done.failure is None:
            shard.conditionings[index] = done.refs[1]
        else:
            shard.unusable[index] = str(done.failure)
        if not shard.encoding:
            waiting, shard.waiting = shard.waiting, []
            for job in waiting:
                self._submit(job, shard, bar)
            self._close_if_whole(shard, writers)

    def _submit(self, job: Job, shard: _OpenShard, bar: Bar) -> None:
        unusable = [edit for edit in job.edits if edit.prompt.index in shard.unusable]
        if unusable:
            for edit in job.edits:
                if edit in unusable:
                    self._fail(shard, edit, shard.unusable[edit.prompt.index], bar)
                else:
                    self._submit(Job(job.shard, job.number, (edit,)), shard, bar)
            return
        spec = job.settings.spec()
        seeds = tuple(edit.seed for edit in job.edits)
        request = SampleRequest(job.shard, job.number, seeds, spec.stochastic_steps(seeds[0]))
        policy = self._studio.policies[job.settings.adapter]
        conditionings = [shard.conditionings[edit.prompt.index] for edit in job.edits]
        arguments = (request, spec, policy, self._studio.negative, *conditionings)
        self._studio.dispatcher.submit(Call("rollout", job, "sample", arguments, num_returns=3))

    def _land(self, done: Done, bar: Bar, writers: concurrent.futures.Executor) -> None:
        job = done.call.key
        assert isinstance(job, Job)
        shard = self._open[job.shard]
        if done.failure is None:
            self._studio.policies[job.settings.adapter].check(done.result)
            try:
                images = ray.get(done.refs[2], timeout=FETCH_S)
            except RayError as error:
                self._again(job, shard, error)
                return
            for edit, image in zip(job.edits, images, strict=True):
                shard.images[edit.key] = np.asarray(image)
            shard.missing -= len(job.edits)
            bar.advance(len(job.edits))
        elif isinstance(done.failure, ObjectsLost):
            self._again(job, shard, done.failure)
        elif len(job.edits) > 1:
            for edit in job.edits:  # one of them took the others with it: each alone
                self._submit(Job(job.shard, job.number, (edit,)), shard, bar)
        else:
            self._fail(shard, job.edits[0], str(done.failure), bar)
        self._close_if_whole(shard, writers)

    def _again(self, job: Job, shard: _OpenShard, error: Exception) -> None:
        """A node took the conditioning or the images with it: encode and sample once more, with the same result."""
        shard.lost[job.edits[0].key] += 1
        if shard.lost[job.edits[0].key] > MOST_LOSSES:
            raise error
        log.warning("%s and what is sampled with it is made again: %s", job.edits[0].key, error)
        shard.waiting.append(job)
        for prompt in {edit.prompt.index: edit.prompt for edit in job.edits}.values():
            self._encode(prompt, shard)

    def _fail(self, shard: _OpenShard, edit: PlannedEdit, detail: str, bar: Bar) -> None:
        log.warning("%s is not made: %s", edit.key, detail)
        shard.failures[edit.key] = detail
        shard.missing -= 1
        bar.advance()

    def _close_if_whole(self, shard: _OpenShard, writers: concurrent.futures.Executor) -> None:
        """Hand a shard whose last edit has landed to a writer; wait for an earlier one when all are busy."""
        if shard.missing or shard.number not in self._open:
            return
        del self._open[shard.number]
        self._writing.append(writers.submit(self._write, shard))
        while len(self._writing) > WRITERS:
            self._writing.popleft().result()

    def _write(self, shard: _OpenShard) -> None:
        """The failures first: once the shard is there, all about it is."""
        path = shard_path(self._folder, shard.number)
        failed = path.with_name(path.stem + FAILURES)
        failed.unlink(missing_ok=True)
        if shard.failures:
            failures = [{"key": key, "detail": detail} for key, detail in sorted(shard.failures.items())]
            atomic_write_json(failed, failures)
        write_shard(path, (self._sample(edit, shard) for edit in shard.edits if edit.key in shard.images))

    def _sample(self, edit: PlannedEdit, shard: _OpenShard) -> EditSample:
        settings = asdict(edit.settings)
        provenance = {
            "model_sha256": self._record["model_sha256"],
            "adapter": self._record["adapters"][settings.pop("adapter")],
            "settings": settings
            | {name: self._record[name] for name in ("height", "width", "negative_prompt")},
            "seed": edit.seed,
            "prompt_index": edit.prompt.index,
            "k": edit.k,
            "metadata": edit.prompt.metadata,
        }
        return EditSample(
            edit.key,
            shard.sources[edit.prompt.index],
            Image.fromarray(shard.images[edit.key]),
            edit.prompt.prompt,
            edit_type(edit.prompt.metadata, self._section.edit_type_key),
            provenance=provenance,
        )


def edit_type(metadata: Mapping[str, Any], key: str) -> str:
    """The kind of edit that metadata name under `key`, with dots for depth; `unknown` where they do not."""
    found: Any = metadata
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return "unknown" if found is None else str(found)
