"""The reward `judge`: pictures graded by a vision-language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from rewards.base import FatalRewardError, RetryableRewardError, RewardOutput
from rewards.judge.client import JudgeClient
from rewards.judge.cost import PROMPT_BYTES, cost_lines
from rewards.judge.expected_score import ExpectedScore
from rewards.judge.messages import Outcome
from rewards.judge.protocols import TASKS, Asker, Judgement, JudgeProtocol, Sample, judge_sample
from rewards.judge.settings import JudgeSettings
from rewards.judge.silence import Silence
from rewards.judge.structured import Structured
from rewards.judge.template_files import PLACES, Template, TemplateError, load_template
from rewards.judge.viescore import VieScore
from rewards.scoring import MIN_SCORED_SHARE

logger = logging.getLogger(__name__)

PROTOCOLS: dict[str, type[JudgeProtocol]] = {
    "viescore": VieScore,
    "structured": Structured,
    "expected_score": ExpectedScore,
}

INFRASTRUCTURE = (Outcome.RATE_LIMITED, Outcome.TIMEOUT, Outcome.UNAVAILABLE)
"""Outcomes that a later call may mend."""

FAILURES = tuple(outcome for outcome in Outcome if outcome not in (Outcome.OK, Outcome.FATAL))


class Judge:
    """Scores in [0, 1], or None: a refusal, a filtered, truncated or malformed answer is never a number.

    Samples with a reference are judged as edits of it, samples without one as text-to-image.

    protocol: `viescore`, `structured` or `expected_score`. max_asks: how often a question is put while its
    answer is malformed. max_tokens: limit of one answer; None for the protocol's own. templates: own template
    files by role (the keys of `template_files.PLACES`). give_up_after_s: seconds without any answer from the
    endpoint after which a failing call stops the run. Every other parameter is a field of `JudgeSettings`.
    """

    free_params = frozenset(
        {
            "base_url", "api_key_env", "mode", "cache", "ledger", "concurrency", "requests_per_minute",
            "tokens_per_minute", "timeout_s", "attempts", "longest_wait_s", "queue_timeout_s", "give_up_after_s",
            "max_cost_usd", "max_total_tokens", "price_per_million_input", "price_per_million_output",
        }
    )  # fmt: skip
    """What a resumed run may change: a higher budget goes on from the answers in the cache."""

    def __init__(
        self,
        *,
        protocol: str,
        max_asks: int = 2,
        max_tokens: int | None = None,
        templates: Mapping[str, str] | None = None,
        give_up_after_s: float = 600.0,
        **settings: Any,
    ) -> None:
        """Raises ValueError with every parameter that is unknown or out of range."""
        templates = dict(templates or {})
        problems = [
            *_choice_problems("protocol", [protocol], PROTOCOLS),
            *_choice_problems("templates", templates, PLACES),
            *_choice_problems("parameter", settings, _SETTINGS),
            *_number_problems(max_asks, max_tokens, give_up_after_s),
        ]
        if "model" not in settings:
            problems.append("model is not set; give the name of the model at the endpoint")
        if problems:
            raise ValueError("; ".join(problems))
        self.settings = JudgeSettings(**settings)
        self.protocol_name = protocol
        self.protocol = PROTOCOLS[protocol]()
        self.max_asks = max_asks
        self.max_tokens = max_tokens or self.protocol.max_tokens
        self.template_paths = templates
        self.give_up_after_s = give_up_after_s
        # A malformed address stays out of every message: somebody may have put a key into it.
        sound = not self.settings.problems()
        self.where = f"{self.settings.model} at {', '.join(self.settings.base_urls)}" if sound else "unusable"
        self._client = JudgeClient(self.settings)
        self._silence = Silence(self._client, INFRASTRUCTURE)
        self._snapshots: set[str] = set()

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        """The templates of both tasks by role. Raises TemplateError."""
        roles = sorted({role for task in TASKS for role in self.protocol.roles(task)})
        unused = sorted(set(self.template_paths) - set(roles))
        if unused:
            raise TemplateError(f"templates: {unused} are not asked by {self.protocol_name}; it asks {roles}")
        found = {role: load_template(role, self.template_paths.get(role)) for role in roles}
        for template in found.values():
            logger.info("judge %s: template %s sha256=%s", self.where, template.name, template.sha256)
        return found

    def check(self) -> list[str]:
        """Problems of templates, key, cache and budget; asks the endpoint nothing."""
        problems = list(self._client.problems())
        try:
            self.templates  # noqa: B018  (loads them)
        except TemplateError as error:
            problems.append(str(error))
        return problems

    async def readiness(self) -> list[str]:
        """Put the questions once about two small drawn pictures. Costs that; nothing in replay mode.

        An endpoint that takes one picture but not two is ready, with a warning: it can judge text-to-image.
        """
        if self.settings.mode == "replay":
            return []
        client = JudgeClient(self.settings)  # closing it leaves what is being scored alone
        try:
            edit, t2i = [await self._judge(client, sample) for sample in _probes()]
        finally:
            await client.close()
        if edit.outcome is not Outcome.OK and t2i.outcome is Outcome.OK:
            logger.warning(
                "judge %s: can judge text-to-image only; a trial edit ended %s: %s",
                self.where, edit.outcome, edit.detail,
            )  # fmt: skip
        failed = t2i.outcome is not Outcome.OK
        return [f"judge {self.where}: a trial question ended {t2i.outcome}: {t2i.detail}"] * failed

    def estimate(self, *, images: int, task: str, height: int, width: int) -> list[str]:
        """Calls, tokens and money for `images` pictures of `height` x `width` pixels, as lines to print."""
        sample = _blank(task, (width, height))
        try:
            questions = self.protocol.questions(sample, self.templates, self.max_tokens)
        except TemplateError as error:
            return [f"no estimate: {error}"]
        return cost_lines(self.settings, questions, images=images, max_asks=self.max_asks)

    async def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Image.Image | None],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        """Ask about all samples at once.

        Components: the protocol's parts; for each way to fail a column of 0 and 1; `cached`, 1 where no request
        was needed; `asks`. Raises ValueError for samples of both tasks in one batch or an empty prompt,
        FatalRewardError when no later call can succeed or the endpoint has been silent for too long, and
        RetryableRewardError when the endpoint left so many samples open that their group would be lost. What
        was answered is then in the client's cache, so the repeated call does not pay for it again.
        """
        samples = _samples(images, prompts, references)
        try:
            judged = await asyncio.gather(*(self._judge(self._silence, sample) for sample in samples))
        except asyncio.CancelledError:  # the reward's `timeout_s`
            self._stop_if_silent()
            raise
        self._note_snapshots(judged)
        self._log_failures(judged)
        self._raise_failures(judged)
        return _output(judged)

    async def _judge(self, asker: Asker, sample: Sample) -> Judgement:
        return await judge_sample(
            asker, self.protocol, sample, self.templates, max_asks=self.max_asks, max_tokens=self.max_tokens
        )

    def _raise_failures(self, judged: Sequence[Judgement]) -> None:
        for judgement in judged:
            if judgement.outcome is Outcome.FATAL:
                raise FatalRewardError(f"judge {self.where}: {judgement.detail}")
        waiting = [judgement for judgement in judged if judgement.outcome in INFRASTRUCTURE]
        if waiting:
            self._stop_if_silent()
        scored = sum(judgement.outcome is Outcome.OK for judgement in judged)
        # A repeated call that fails as well loses the whole batch, so ask for one only where the batch is
        # lost without it and can be saved by it.
        if scored < MIN_SCORED_SHARE * len(judged) <= scored + len(waiting):
            raise RetryableRewardError(
                f"judge {self.where}: {len(waiting)} of {len(judged)} samples got no answer, the first: "
                f"{waiting[0].outcome}: {waiting[0].detail}"
            )

    def _stop_if_silent(self) -> None:
        seconds = self._silence.seconds()
        if seconds >= self.give_up_after_s:
            raise FatalRewardError(
                f"judge {self.where}: no answer for {seconds:.0f} s, which is give_up_after_s "
                f"{self.give_up_after_s:g} or more; the last failure: {self._silence.detail}"
            )

    def _note_snapshots(self, judged: Sequence[Judgement]) -> None:
        new = frozenset().union(*(judgement.models for judgement in judged)) - self._snapshots
        for model in sorted(new):
            if self._snapshots:
                earlier = ", ".join(sorted(self._snapshots))
                logger.warning(
                    "judge %s: also answered by the snapshot %s, before by %s; their scores may not compare",
                    self.where, model, earlier,
                )  # fmt: skip
            else:
                logger.info("judge %s: answered by the snapshot %s", self.where, model)
            self._snapshots.add(model)

    def _log_failures(self, judged: Sequence[Judgement]) -> None:
        failed = [judgement for judgement in judged if judgement.outcome is not Outcome.OK]
        if failed:
            counts = Counter(judgement.outcome for judgement in failed)
            listed = ", ".join(f"{outcome} {number}" for outcome, number in counts.items())
            logger.warning(
                "judge %s: %d of %d samples not scored (%s); the first: %s",
                self.where, len(failed), len(judged), listed, failed[0].detail,
            )  # fmt: skip


_SETTINGS = tuple(field.name for field in dataclasses.fields(JudgeSettings))


def _choice_problems(what: str, given: Any, choices: Any) -> list[str]:
    problems = []
    for name in given:
        if name not in choices:
            near = difflib.get_close_matches(str(name), choices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"{what} {name!r} is not known; {hint}it is one of {', '.join(choices)}")
    return problems


def _number_problems(max_asks: int, max_tokens: int | None, give_up_after_s: float) -> list[str]:
    checks = [
        (
            isinstance(max_asks, int) and 1 <= max_asks <= 5,
            f"max_asks is {max_asks!r}; give 1 (no second ask) to 5",
        ),
        (
            max_tokens is None or (isinstance(max_tokens, int) and max_tokens >= 1),
            f"max_tokens is {max_tokens!r}; give 1 or more, or null for the protocol's own",
        ),
        (
            isinstance(give_up_after_s, int | float) and give_up_after_s > 0,
            f"give_up_after_s is {give_up_after_s!r}; give a number of seconds above 0",
        ),
    ]
    return [message for fine, message in checks if not fine]


def _samples(
    images: Sequence[Image.Image], prompts: Sequence[str], references: Sequence[Image.Image | None]
) -> list[Sample]:
    tasks = {"t2i" if reference is None else "edit" for reference in references}
    if len(tasks) > 1:
        raise ValueError("some samples of one batch have a reference and some have none; judge them apart")
    return [
        Sample(task, prompt, image, reference)
        for task in tasks
        for image, prompt, reference in zip(images, prompts, references, strict=True)
    ]


def _blank(task: str, size: tuple[int, int]) -> Sample:
    source = Image.new("RGB", size) if task == "edit" else None
    return Sample(task, "x" * PROMPT_BYTES, Image.new("RGB", size), source)


def _probes() -> tuple[Sample, Sample]:
    """An edit and a text-to-image sample of 64 x 64 pixels."""
    red, blue = (Image.new("RGB", (64, 64), "lightgrey") for _ in range(2))
    red.paste((210, 40, 40), (16, 16, 48, 48))
    blue.paste((40, 60, 210), (16, 16, 48, 48))
    edit = Sample("edit", "make the square blue", blue, red)
    return edit, Sample("t2i", "a blue square on a grey background", blue)


def _output(judged: Sequence[Judgement]) -> RewardOutput:
    names = sorted({name for judgement in judged for name in judgement.parts})
    columns: dict[str, list[float | None]] = {
        name: [judgement.parts.get(name) for judgement in judged] for name in names
    }
    for outcome in FAILURES:
        columns[outcome.value] = [float(judgement.outcome is outcome) for judgement in judged]
    columns["cached"] = [float(judgement.cached) for judgement in judged]
    columns["asks"] = [float(judgement.asks) for judgement in judged]
    return RewardOutput([judgement.score for judgement in judged], columns)
