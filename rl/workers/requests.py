"""Requests to the workers, and their results. Tensors are references here: they stay in the object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.cluster.workers import Call
from core.failures import DataFailure, ObjectsLost
from core.prompts import Prompt
from rewards.scoring import GroupScore
from rollout.shapes import Shape


@dataclass(frozen=True)
class RolloutRequest:
    """Samples that are drawn and scored together: a training group of one prompt, or a batch of several.

    `seeds` has the same number of samples for each prompt, in the order of the prompts; a sample's seed alone decides
    its noise. `steps` and `trunk_seed` as in `SampleRequest`. `shape`: of all its pictures, where it is not the
    workers' own. `places`: of a batch's prompts among those that it was made of.
    """

    id: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...] = ()
    trunk_seed: int | None = None
    shape: Shape | None = None
    places: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in px."""
        return None if self.shape is None else self.shape.size

    def prompt_index(self, k: int) -> int:
        """Which of `prompts` sample k is of."""
        return k * len(self.prompts) // len(self.seeds)

    def prompt_of(self, k: int) -> Prompt:
        return self.prompts[self.prompt_index(k)]

    @property
    def span(self) -> str:
        """The places of a batch's prompts, for messages."""
        return ", ".join(map(str, self.places))


@dataclass(frozen=True)
class Chunk:
    """A piece of a request that one worker drew: sample k lies in row k - first of the trajectory and of the images."""

    first: int
    size: int
    trajectory: Any
    images: Any


@dataclass(frozen=True)
class RolloutResult:
    """What came of a request: one conditioning per prompt, the chunks in order, and the score where it was scored;
    or the `failure`: a prompt that could not be sampled or scored, or (`lost`) what was made of it went with a node."""

    request: RolloutRequest
    conditionings: tuple[Any, ...]
    chunks: tuple[Chunk, ...] = ()
    score: GroupScore | None = None
    failure: str = ""
    lost: bool = False

    def failed(self, failure: DataFailure | ObjectsLost) -> RolloutResult:
        """The same request with this failure."""
        return replace(self, failure=str(failure), lost=isinstance(failure, ObjectsLost))

    def conditioning_of(self, k: int) -> Any:
        return self.conditionings[self.request.prompt_index(k)]


def encode_call(request: RolloutRequest) -> Call:
    """The call that encodes a request's prompts: a reference image that cannot be read takes this request alone with
    it."""
    prompts = list(request.prompts)
    args = (prompts, request.size)
    return Call("encode", request.id, "encode_apart", args, num_returns=1 + len(prompts))


def batch_requests(
    prompts: Sequence[Prompt], seeds: Sequence[int], batch_size: int, shapes: Sequence[Shape] = ()
) -> list[RolloutRequest]:
    """One sample per prompt, in batches of one shape, fixed by position, whatever workers there are; a batch's id is
    its first place. `shapes`: one each, or none where all have the workers' own."""
    alike: dict[Shape | None, list[int]] = {}
    for place in range(len(prompts)):
        alike.setdefault(shapes[place] if shapes else None, []).append(place)
    batches = [
        (shape, places[start : start + batch_size])
        for shape, places in alike.items()
        for start in range(0, len(places), batch_size)
    ]
    return [
        RolloutRequest(
            places[0],
            tuple(prompts[place] for place in places),
            tuple(seeds[place] for place in places),
            shape=shape,
            places=tuple(places),
        )
        for shape, places in sorted(batches, key=lambda batch: batch[1])
    ]


def alone(batch: RolloutRequest) -> list[RolloutRequest]:
    """Each prompt of a batch of `batch_requests` as a request of its own, with the same seed."""
    members = zip(batch.places, batch.prompts, batch.seeds, strict=True)
    return [
        replace(batch, id=place, prompts=(prompt,), seeds=(seed,), places=(place,))
        for place, prompt, seed in members
    ]
