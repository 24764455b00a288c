"""The reward `editreward`: a trained regressor scores edits, behind vLLM servers or in the reward worker itself.

The constants (text, picture sizes, means and deviations, rule) are those saved with the model, never a recipe's.
From K raw outputs to a reward, by `EditRewardSettings`: de-normalised to label units, joined by the saved rule
(mean, min or geometric mean), and mapped linearly from [score_low, score_high] to [0, 1], clipped at the ends.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from PIL import Image
from pydantic import TypeAdapter

from rewards.base import FatalRewardError, RewardOutput
from rewards.editreward.client_replicas import Replicas, Unscorable
from rewards.editreward.model_folder import ModelCard, ModelFolderError, folder_problems, read_card
from rewards.editreward.processing import InputError, classify_request
from rewards.parameters import Count, Positive, value_problems
from rewards.service.endpoints import url_problem

if TYPE_CHECKING:
    from rewards.editreward.client_local import LocalModel

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class EditReward:
    """Scores in [0, 1], or None for an edit that the model cannot be shown.

    model: an exported folder; with `mode: served` only its `editreward.json` and `COMPLETE` are read here.
    urls: the servers that `python -m rewards.editreward serve` printed (served). concurrency: requests in flight
    of one reward worker. timeout_s: seconds for one request. unavailable_s: seconds without any answer after which
    the run stops; the reward's own `timeout_s` must be more, or its samples were missing first.
    device, batch_size: for `mode: inprocess`, which loads the model into the reward worker; `auto` is CUDA where
    torch sees one. The weights' type is the exported one.
    """

    most_references: ClassVar[int] = 1
    """The model was trained on edits of one picture."""

    model: str
    mode: Literal["served", "inprocess"] = "served"
    urls: Sequence[str] = ()
    concurrency: Count = 64
    timeout_s: Positive = 120.0
    unavailable_s: Positive = 300.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Count = 8

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._card: ModelCard | None = None
        self._replicas: Replicas | None = None
        self._local: LocalModel | None = None

    @property
    def default_timeout_s(self) -> float:
        """Time to be served again after an outage, or for passes through a model in this process."""
        return max(600.0, self.least_timeout_s)

    @property
    def least_timeout_s(self) -> float:
        """A shorter limit would end the call before the outage that it met can be told."""
        return self.unavailable_s + self.timeout_s if self.mode == "served" else 0.0

    def check(self) -> list[str]:
        """Problems of the parameters and of the model folder; nothing is sent or loaded."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [*value_problems(_VALUES, values), *self._url_problems()]
        problems += [f"urls: {problem}" for url in self.urls if (problem := url_problem(url))]
        try:
            card = read_card(self.model)
        except ModelFolderError as error:
            return problems + [f"model: {problem}" for problem in error.problems]
        if self.mode == "inprocess":
            problems += [f"model: {problem}" for problem in folder_problems(card.folder)]
        return problems

    async def readiness(self) -> list[str]:
        """Wait until every server serves this very model (or load it here), then score one drawn edit."""
        if self.mode == "served":
            problems = await self._server_side().wait_for_all()
            if problems:
                return problems
        source, result = (Image.new("RGB", (64, 64), colour) for colour in ("grey", "darkred"))
        trial = {"images": [result], "prompts": ["make it red"], "references": [[source]], "metadata": [{}]}
        if self.mode == "served":
            output = await self._score_served(**trial)
        else:
            output = await asyncio.to_thread(self._score_here, **trial)
        return [] if output.scores[0] is not None else ["a trial edit was not scored; see the log"]

    @property
    def score(self) -> Callable[..., Any]:
        """Score all edits at once: an async function, but a blocking one where the model is in this process, so that
        calls take turns and the time limit of each begins with its own pass through the model.

        Components: the prediction of every dimension in label units. Raises FatalRewardError for a sample
        without a reference, and when no later call can succeed.
        """
        return self._score_served if self.mode == "served" else self._score_here

    async def _score_served(self, **batch: Any) -> RewardOutput:
        return self._output(await self._ask_servers(_edits(**batch)))

    def _score_here(self, **batch: Any) -> RewardOutput:
        return self._output(self._compute(_edits(**batch)))

    def _output(self, raw: Sequence[list[float] | None]) -> RewardOutput:
        settings = self._loaded_card().settings
        units = [None if outputs is None else settings.label_units(outputs) for outputs in raw]
        return RewardOutput(
            scores=[None if outputs is None else settings.reward(outputs) for outputs in raw],
            components={
                name: [None if values is None else values[k] for values in units]
                for k, name in enumerate(settings.dimensions)
            },
        )

    async def _ask_servers(self, edits: Sequence[tuple[Any, Any, str]]) -> list[list[float] | None]:
        replicas = self._server_side()
        try:
            return list(await asyncio.gather(*(self._ask_one(replicas, *edit) for edit in edits)))
        except asyncio.CancelledError:  # the reward's `timeout_s`
            replicas.stop_if_silent()
            raise

    async def _ask_one(
        self, replicas: Replicas, source: Image.Image, result: Image.Image, instruction: str
    ) -> list[float] | None:
        card = self._loaded_card()
        try:
            body = await asyncio.to_thread(
                classify_request, source, result, instruction, card.settings, model=card.served_name
            )
            return await replicas.classify(body | {"use_activation": False})
        except (InputError, Unscorable) as error:
            log.warning("editreward: the edit %r is not scored: %s", instruction[:80], error)
            return None

    def _compute(self, edits: Sequence[tuple[Any, Any, str]]) -> list[list[float] | None]:
        with self._lock:  # the probe of a worker may meet a call that its time limit left behind
            if self._local is None:
                from rewards.editreward.client_local import LocalModel

                self._local = LocalModel(self._loaded_card(), self.device, self.batch_size)
            return self._local.outputs(edits)

    def _server_side(self) -> Replicas:
        if self._replicas is None:
            card = self._loaded_card()
            self._replicas = Replicas(
                self.urls,
                card.served_name,
                outputs=len(card.settings.dimensions),
                concurrency=self.concurrency,
                timeout_s=self.timeout_s,
                unavailable_s=self.unavailable_s,
            )
        return self._replicas

    def _loaded_card(self) -> ModelCard:
        """Read once: a folder that is replaced in mid-run does not change the constants."""
        if self._card is None:
            try:
                self._card = read_card(self.model)
            except ModelFolderError as error:
                raise FatalRewardError(f"reward editreward: {error}") from error
        return self._card

    def _url_problems(self) -> Iterator[str]:
        if self.mode == "served" and not self.urls:
            yield "urls is empty; give those that `python -m rewards.editreward serve` prints, or mode: inprocess"
        if self.mode == "inprocess" and self.urls:
            yield "urls is set, but mode: inprocess asks no server; leave one of them out"
        if len(set(self.urls)) != len(self.urls):
            yield "urls holds one URL twice"  # which may hold a password


_VALUES = TypeAdapter(EditReward)


def _edits(
    *,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
    metadata: Sequence[Mapping[str, Any]],
) -> list[tuple[Any, Any, str]]:
    """(source, result, instruction) of each sample. Raises FatalRewardError where one has no source, or several."""
    found = {len(pictures) for pictures in references}
    if 0 in found:
        raise FatalRewardError("reward editreward judges edits, and these samples have no reference picture")
    if found != {1}:
        raise FatalRewardError(
            f"reward editreward judges edits of one picture; here are {max(found)} references"
        )
    sources = [pictures[0] for pictures in references]
    return list(zip(sources, images, prompts, strict=True))
