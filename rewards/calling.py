"""One attempt at one reward: it gets its own copy of the batch, a time limit, and its answer is checked."""

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from PIL import Image

from rewards.base import RewardContractError, RewardOutput
from rewards.loading import LoadedReward


@dataclass(frozen=True)
class RewardBatch:
    """All that a reward sees: per sample an RGB image, a prompt, reference images (none to several), and metadata.
    `sources`: where the references came from, for rewards that ask; None where nobody said.
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    references: Sequence[Sequence[Image.Image]]
    metadata: Sequence[Mapping[str, Any]]
    sources: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        counts = {name: len(value) for name, value in vars(self).items() if value is not None}
        if len(set(counts.values())) != 1:
            raise ValueError(f"a reward batch needs one entry per image in every list, got {counts}")

    def keywords(self, *, sources: bool) -> dict[str, Any]:
        """Fresh copies: images and dicts can be changed in place, and other rewards and retries follow.

        `sources`: whether to give these too. Raises RewardContractError where there are none to give.
        """
        if sources and self.sources is None:
            raise RewardContractError(
                "the reward asks for the sources of references, and the batch came without"
            )
        asked = {"sources": [list(addresses) for addresses in self.sources or ()]} if sources else {}
        return asked | {
            "images": [image.copy() for image in self.images],
            "prompts": list(self.prompts),
            "references": [[image.copy() for image in pictures] for pictures in self.references],
            "metadata": [copy.deepcopy(dict(entry)) for entry in self.metadata],
        }


async def call_reward(loaded: LoadedReward, batch: RewardBatch) -> RewardOutput:
    """Call a reward once. Scores come back as floats or None, NaN and infinity untouched.

    Raises what the reward raises, TimeoutError after `timeout_s` (for a served reward, which has its own way
    with `timeout_s`, after the longest waits on top), and RewardContractError when the answer is not one number
    or None per image. Time in which other calls of the reward had their turn is not counted.
    """
    # What a service asks for, it says itself.
    asked = loaded.takes_sources and (loaded.spec.service is None or batch.sources is not None)
    call = functools.partial(loaded.function, **batch.keywords(sources=asked), **loaded.arguments)
    if _is_async(loaded):
        service = loaded.spec.service
        limit_s = loaded.spec.timeout_s + (service.longest_wait_s if service else 0)
        answer = await loaded.overlapping.run(call, limit_s)
    else:
        answer = await loaded.thread.run(call, loaded.spec.timeout_s)
    if not isinstance(answer, RewardOutput):
        answer = RewardOutput(answer)
    where = f"reward {loaded.label!r}"
    if not isinstance(answer.components, Mapping):
        raise RewardContractError(f"{where}: components must map a name to a list, got {answer.components!r}")
    return RewardOutput(
        _numbers(answer.scores, len(batch.images), where),
        {
            name: _numbers(values, len(batch.images), f"{where}, component {name!r}")
            for name, values in answer.components.items()
        },
    )


def _is_async(loaded: LoadedReward) -> bool:
    # An object whose `__call__` is async is no coroutine function itself.
    call = type(loaded.function).__call__
    return inspect.iscoroutinefunction(loaded.function) or inspect.iscoroutinefunction(call)


def _numbers(values: Any, count: int, where: str) -> list[float | None]:
    """A list of `count` floats or None from a list, an array or a tensor."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RewardContractError(
            f"{where} returned a {type(values).__name__}; return a list of {count} numbers"
        )
    if len(values) != count:
        raise RewardContractError(
            f"{where} returned {len(values)} scores for {count} images; return one per image"
        )
    return [_number(value, where) for value in values]


def _number(value: Any, where: str) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if value is not None and not isinstance(value, Real):
        raise RewardContractError(f"{where} returned {value!r}; a score is a number, or None when not scored")
    return None if value is None else float(value)
