"""What a reward is: its result, the errors it may raise, and how a recipe asks for it.

A reward is a batch function, or a class with `score` or `__call__`, sync or async, called by keyword:

    score(*, images: list[PIL.Image], prompts: list[str], references: list[list[PIL.Image]],
          metadata: list[dict], **params) -> list[float | None] | RewardOutput

All lists have one entry per sample. The references of a sample are the pictures that its prompt names, in their order:
the first is the one to edit; there are none for text-to-image. They come as the model was shown them: the first in the
size of the image, further ones with at most as many pixels. A reward whose signature has `sources` gets their addresses
there, a list of paths or data URIs for each sample, as `core.prompts` has them. A class or function that takes no more
than so many references states it as `most_references`. `None`, NaN, infinity, an exception or a time-out mean *not
scored*: the sample is missing and is never given a number in its place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ON_MISSING = ("mask", "drop_group", "stop")
LONGEST_QUEUE_S = 600.0
DEFAULT_TIMEOUT_S = 60.0
RESERVED = "<|"
"""What control tokens of chat models begin with; text with it could end a turn or stand for a picture."""


@dataclass(frozen=True)
class RewardOutput:
    """Scores of a batch, with named parts for the log.

    `scores` holds one entry per image; `None` means not scored. Each list in `components` is as long as
    `scores`. Components are only logged: weights apply to the scores, and a missing component masks nothing.
    """

    scores: Sequence[float | None]
    components: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


class RewardError(Exception):
    """Root of every error that concerns a reward."""


class RetryableRewardError(RewardError):
    """Raise it when the infrastructure failed (connection lost, 429, 503): it is called again after a wait.

    `retry_after_s`: seconds the service asked to wait; the back-off is at least that long.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FatalRewardError(RewardError):
    """Raise it when no later call can succeed (401, unknown model, exhausted quota): the run stops."""


class RewardContractError(FatalRewardError):
    """A reward broke the protocol (wrong count, wrong type). It is a bug, so it is not retried."""


class RewardLoadError(RewardError):
    """A reward named in a recipe cannot be loaded or called as the protocol asks."""


@dataclass(frozen=True)
class ServiceSpec:
    """Where a reward is served over HTTP (`python -m rewards.serve RECIPE`) instead of being loaded by the worker.

    urls: `http://host:port` of equal services; calls are spread over them.
    token_env: name of the environment variable that holds the bearer token; None sends none.
    codec: `png` or `raw`, how pictures travel; both are lossless.
    unavailable_s: seconds to wait for a service to come (back) before the run is stopped.
    """

    urls: tuple[str, ...]
    token_env: str | None = None
    codec: str = "png"
    unavailable_s: float = 120.0

    @property
    def longest_wait_s(self) -> float:
        """Seconds that one call may spend on waiting: for a service to come back, and for its turn there."""
        return self.unavailable_s + LONGEST_QUEUE_S


@dataclass(frozen=True)
class RewardSpec:
    """One reward as a recipe asks for it.

    name: a built-in name, `package.module:attribute` or `path/to/file.py:attribute`.
    weight: factor in the weighted sum; 0 logs the reward without training on it.
    params: keyword arguments, given to a class when it is made, to a function at every call.
    timeout_s: time limit of one attempt in seconds.
    attempts: how often a failing call is made before its samples count as missing.
    on_missing: `mask` leaves the sample out, and its group when less than half of it is scored; `drop_group`
        leaves the whole group out at the first missing score; `stop` ends the run.
    max_missing_share: the run stops when more than this share of recent samples is missing.
    constant_steps: the run stops when all scores of this many steps in a row are equal; 0 switches this off.
    label: name in the log; default the tail of `name`.
    service: where to have it scored; None loads the reward in the worker.
    """

    name: str
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = DEFAULT_TIMEOUT_S
    attempts: int = 3
    on_missing: str = "mask"
    max_missing_share: float = 0.2
    constant_steps: int = 10
    label: str | None = None
    service: ServiceSpec | None = None


@dataclass(frozen=True)
class RewardSet:
    """The rewards that together score the images of one stage or evaluation.

    name: how the caller asks for it. task: `t2i` or `edit`. The example prompt and its metadata are what a
    custom reward is tried on before the run starts: give a real prompt's, since rewards may read metadata.
    height, width: size in pixels of the images that will be scored. other_tasks: the same rewards in the other tasks
    of their recipe, for a service, which is ready once it has been tried in each. reference_multiple, reference_pixels:
    with the images' size, at which size references are shown (`models.references.shown_references`);
    references_as_given leaves them as large as they are, where what is scored was not drawn beside them.
    """

    name: str
    task: str
    rewards: Sequence[RewardSpec]
    example_prompt: str = "a red circle on a grey background"
    example_metadata: Mapping[str, Any] = field(default_factory=dict)
    height: int = 64
    width: int = 64
    other_tasks: Sequence["RewardSet"] = ()
    reference_multiple: int = 16
    reference_pixels: int | None = None
    references_as_given: bool = False


def reward_label(spec: RewardSpec) -> str:
    """The name under which the scores of `spec` are logged."""
    return spec.label or spec.name.rpartition(":")[2]


def spec_problems(spec: RewardSpec) -> list[str]:
    """Every value of `spec` that is out of range, each as one sentence; empty when all are fine."""
    checks = [
        (math.isfinite(spec.weight), f"weight is {spec.weight}; give a finite number"),
        (spec.timeout_s > 0, f"timeout_s is {spec.timeout_s}; give a number of seconds above 0"),
        (spec.attempts >= 1, f"attempts is {spec.attempts}; give 1 or more"),
        (spec.on_missing in ON_MISSING, f"on_missing is {spec.on_missing!r}; choose one of {ON_MISSING}"),
        (spec.constant_steps >= 0, f"constant_steps is {spec.constant_steps}; give 0 (off) or more"),
        (0 <= spec.max_missing_share <= 1, f"max_missing_share is {spec.max_missing_share}; give 0 to 1"),
        ("/" not in reward_label(spec), f"label is {spec.label!r}; '/' is kept for components, leave it out"),
    ]
    return [f"reward {spec.name!r}: {message}" for fine, message in checks if not fine]
