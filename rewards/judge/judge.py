"""The reward `judge`: pictures graded by a vision-language model behind an OpenAI-compatible endpoint.

`JudgeReward` is what every reward has that asks such a model; the benchmarks' rewards build on it too.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, TypeAdapter

from rewards.base import FatalRewardError, RetryableRewardError, RewardOutput
from rewards.judge.budget import PROMPT_BYTES, cost_lines
from rewards.judge.client import JudgeClient, Silence
from rewards.judge.messages import INFRASTRUCTURE, Asker, Outcome
from rewards.judge.protocols import PROTOCOLS
from rewards.judge.questions import (
    TASKS,
    Answer,
    Judgement,
    JudgeProtocol,
    Question,
    Sample,
    Verdict,
    combine,
    judge_questions,
)
from rewards.judge.settings import FREE, KEYS, JudgeSettings
from rewards.judge.template_files import PLACES, Template, TemplateError, load_template
from rewards.parameters import Count, Positive, choice_problems, value_problems
from rewards.scoring import MIN_SCORED_SHARE

logger = logging.getLogger(__name__)

FAILURES = tuple(outcome for outcome in Outcome if outcome not in (Outcome.OK, Outcome.FATAL))

OPERATIONAL = FREE | {"give_up_after_s"}
"""Parameters that decide how an answer is reached and what it may cost, never what it is."""


@dataclass
class _Numbers:
    max_asks: Annotated[int, Field(strict=True, ge=1, le=5)]
    max_tokens: Count | None
    give_up_after_s: Positive


_NUMBERS = TypeAdapter(_Numbers)


class JudgeReward:
    """Scores in [0, 1], or None: a refusal, a filtered, truncated or malformed answer is never a number.

    max_asks: how often a question is put while its answer is malformed. max_tokens: limit of one answer; None for
    the default. give_up_after_s: seconds without any answer from the endpoint after which a failing call stops
    the run. Every other parameter is a field of `JudgeSettings`.

    A subclass names a protocol, or says itself what is asked about a sample and what comes of the answers.
    """

    protocol: JudgeProtocol
    protocol_name = ""
    default_max_tokens = 512
    tasks: tuple[str, ...] = TASKS
    """What is judged. There is a trial question for each; the last one must be answered."""
    template_paths: Mapping[str, str] = {}
    """Own template files by role."""
    typical_metadata: Mapping[str, Any] = {}
    """Metadata of a usual prompt, for trial questions and estimates."""
    most_references = 1
    """The templates show one source picture."""
    least_share = MIN_SCORED_SHARE
    """A batch is asked for again when less of it is scored (0: nothing at all) and the endpoint is the cause."""

    def __init__(
        self,
        problems: Sequence[str] = (),
        /,
        *,
        max_asks: int = 2,
        max_tokens: int | None = None,
        give_up_after_s: float = 600.0,
        **settings: Any,
    ) -> None:
        """problems: of the subclass's own parameters. Raises ValueError with all that are unknown or out of range."""
        numbers = {"max_asks": max_asks, "max_tokens": max_tokens, "give_up_after_s": give_up_after_s}
        problems = [
            *problems,
            *choice_problems("parameter", settings, KEYS),
            *value_problems(_NUMBERS, numbers),
        ]
        if "model" not in settings:
            problems.append("model is not set; give the name of the model at the endpoint")
        if problems:
            raise ValueError("; ".join(problems))
        self.settings = JudgeSettings(**settings)
        self.max_asks = max_asks
        self.max_tokens = max_tokens or self.default_max_tokens
        self.give_up_after_s = give_up_after_s
        # A malformed address stays out of every message: somebody may have put a key into it.
        sound = not self.settings.problems()
        self.where = f"{self.settings.model} at {', '.join(self.settings.base_urls)}" if sound else "unusable"
        self._client = JudgeClient(self.settings)
        self._silence = Silence(self._client, INFRASTRUCTURE)
        self._snapshots: set[str] = set()

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        """The templates of all tasks by the name that `questions` uses. Raises TemplateError."""
        roles = sorted({role for task in self.tasks for role in self.protocol.roles(task)})
        unused = sorted(set(self.template_paths) - set(roles))
        if unused:
            raise TemplateError(f"templates: {unused} are not asked by {self.protocol_name}; it asks {roles}")
        found = {role: load_template(role, self.template_paths.get(role)) for role in roles}
        for template in found.values():
            logger.info("judge %s: template %s sha256=%s", self.where, template.name, template.sha256)
        return found

    def questions(self, sample: Sample, metadata: Mapping[str, Any]) -> list[Question]:
        """What is asked about a sample. Raises ValueError for metadata that say too little, TemplateError."""
        return self.protocol.questions(sample, self.templates, self.max_tokens)

    def verdict(self, answers: Sequence[Answer], metadata: Mapping[str, Any]) -> Verdict:
        """Score and named values from the answers, in the order of the questions."""
        return combine(self.protocol, answers)

    def components(self, judgement: Judgement) -> dict[str, float]:
        """The named values; for each way to fail a column of 0 and 1; `cached`, 1 where no request was needed;
        `asks`."""
        failures = {outcome.value: float(judgement.outcome is outcome) for outcome in FAILURES}
        return {
            **judgement.parts,
            **failures,
            "cached": float(judgement.cached),
            "asks": float(judgement.asks),
        }

    def sample(self, image: Image.Image, prompt: str, references: Sequence[Image.Image]) -> Sample:
        """The picture as the judge sees it: an edit of its reference where it has one, else text-to-image."""
        if len(references) > self.most_references:
            raise ValueError(f"a sample has {len(references)} references; the judge's questions show one")
        return Sample("edit", prompt, image, *references) if references else Sample("t2i", prompt, image)

    def may_recover(self, judgement: Judgement) -> bool:
        """Whether a repeated call can give the sample a score that it lacks."""
        return judgement.outcome in INFRASTRUCTURE

    @property
    def default_timeout_s(self) -> float:
        """All questions of a batch are put at once, and each of them ends within this, its turn included."""
        return self.max_asks * self.settings.longest_ask_s

    @property
    def least_timeout_s(self) -> float:
        """Of one answer; nothing has to be waited for in replay."""
        return 0.0 if self.settings.mode == "replay" else self.settings.timeout_s

    def check(self) -> list[str]:
        """Problems of templates, key, cache and budget; asks the endpoint nothing."""
        problems = list(self._client.problems())
        try:
            self.templates  # noqa: B018  (loads them)
        except TemplateError as error:
            problems.append(str(error))
        return problems

    def share_rates(self, clients: int) -> None:
        """Ask at this part of the limits per minute: so many processes of the run ask the same endpoint."""
        self._client.share_rates(clients)

    async def readiness(self, task: str | None = None) -> list[str]:
        """Put the questions once about small drawn pictures. Costs that; nothing in replay mode.

        task: what will be judged. Where it is not said, an endpoint that takes one picture but not two is ready for
        text-to-image, with a warning.
        """
        if self.settings.mode == "replay":
            return []
        client = JudgeClient(self.settings)  # closing it leaves what is being scored alone
        try:
            tasks = [task] if task in self.tasks else self.tasks
            trials = [await self._judge(client, _probe(task), self.typical_metadata) for task in tasks]
        finally:
            await client.close()
        *others, needed = trials
        if needed.outcome is not Outcome.OK:
            return [f"judge {self.where}: a trial question ended {needed.outcome}: {needed.detail}"]
        for trial in others:
            if trial.outcome is not Outcome.OK:
                logger.warning(
                    "judge %s: can judge text-to-image only; a trial edit ended %s: %s",
                    self.where, trial.outcome, trial.detail,
                )  # fmt: skip
        return []

    def estimate(self, *, images: int, task: str, height: int, width: int) -> list[str]:
        """Calls, tokens and money for `images` pictures of `height` x `width` pixels, as lines to print."""
        blank = Image.new("RGB", (width, height))
        sample = Sample(task, "x" * PROMPT_BYTES, blank, blank if task == "edit" else None)
        try:
            questions = self.questions(sample, self.typical_metadata)
        except TemplateError as error:
            return [f"no estimate: {error}"]
        return cost_lines(self.settings, questions, images=images, max_asks=self.max_asks)

    async def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        """Ask about all samples at once.

        Raises ValueError for samples of both tasks in one batch or an empty prompt, FatalRewardError when no later
        call can succeed or the endpoint has been silent for too long, and RetryableRewardError when the endpoint
        left so many samples open that their group would be lost. What was answered is then in the client's cache,
        so the repeated call does not pay for it again.
        """
        if len(set(map(bool, references))) > 1:
            raise ValueError(
                "some samples of one batch have a reference and some have none; judge them apart"
            )
        samples = [
            self.sample(image, prompt, pictures)
            for image, prompt, pictures in zip(images, prompts, references, strict=True)
        ]
        try:
            judged = await asyncio.gather(
                *(self._judge(self._silence, *one) for one in zip(samples, metadata, strict=True))
            )
        except asyncio.CancelledError:  # the reward's `timeout_s`
            self._stop_if_silent()
            raise
        self._note_snapshots(judged)
        self._log_failures(judged)
        self._raise_failures(judged)
        rows = [self.components(judgement) for judgement in judged]
        names = sorted({name for row in rows for name in row})
        return RewardOutput(
            [judgement.score for judgement in judged],
            {name: [row.get(name) for row in rows] for name in names},
        )

    async def _judge(self, asker: Asker, sample: Sample, metadata: Mapping[str, Any]) -> Judgement:
        questions = self.questions(sample, metadata)
        return await judge_questions(
            asker, questions, lambda answers: self.verdict(answers, metadata), self.max_asks
        )

    def _raise_failures(self, judged: Sequence[Judgement]) -> None:
        for judgement in judged:
            if judgement.outcome is Outcome.FATAL:
                raise FatalRewardError(f"judge {self.where}: {judgement.detail}")
        waiting = [judgement for judgement in judged if self.may_recover(judgement)]
        if waiting:
            self._stop_if_silent()
        scored = sum(judgement.score is not None for judgement in judged)
        # A repeated call that fails as well loses the whole batch, so ask for one only where the batch is
        # lost without it and can be saved by it.
        if scored < max(1, math.ceil(self.least_share * len(judged))) <= scored + len(waiting):
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
        failed = [judgement for judgement in judged if judgement.score is None]
        if failed:
            counts = Counter(judgement.outcome for judgement in failed)
            listed = ", ".join(f"{outcome} {number}" for outcome, number in counts.items())
            logger.warning(
                "judge %s: %d of %d samples not scored (%s); the first: %s",
                self.where, len(failed), len(judged), listed, failed[0].detail,
            )  # fmt: skip


class Judge(JudgeReward):
    """Samples with a reference are judged as edits of it, samples without one as text-to-image.

    protocol: `viescore`, `structured` or `expected_score`. templates: own template files by role (the keys of
    `template_files.PLACES`).
    """

    free_params = OPERATIONAL
    """What a resumed run may change: a higher budget goes on from the answers in the cache."""

    def __init__(self, *, protocol: str, templates: Mapping[str, str] | None = None, **params: Any) -> None:
        """Raises ValueError with every parameter that is unknown or out of range."""
        self.protocol_name, self.template_paths = protocol, dict(templates or {})
        problems = [
            *choice_problems("protocol", [protocol], PROTOCOLS),
            *choice_problems("templates", self.template_paths, PLACES),
        ]
        if not problems:
            self.protocol = PROTOCOLS[protocol]()
            self.default_max_tokens = self.protocol.max_tokens
        super().__init__(problems, **params)


def _probe(task: str) -> Sample:
    """A square that is or was made blue, on 64 x 64 pixels."""
    red, blue = (Image.new("RGB", (64, 64), "lightgrey") for _ in range(2))
    red.paste((210, 40, 40), (16, 16, 48, 48))
    blue.paste((40, 60, 210), (16, 16, 48, 48))
    if task == "edit":
        return Sample("edit", "make the square blue", blue, red)
    return Sample("t2i", "a blue square on a grey background", blue)
