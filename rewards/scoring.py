"""Scores one group with all its rewards: retries, time limits, weights, and what a missing score does.

A score that is None, NaN or infinite, and every sample of a call that failed for good, is missing: it is
counted by cause and masked, and never becomes a number. Needs no Ray, so the policy is testable by itself.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass

import tenacity

from rewards.base import FatalRewardError, RetryableRewardError, RewardOutput, RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.loading import LoadedReward, describe_error

logger = logging.getLogger(__name__)

MIN_SCORED_SHARE = 0.5
LARGEST_SCORE = 1e100
"""Beyond it a score is as missing as an infinite one: the squares of a group's spread would overflow."""
LONGEST_RETRY_AFTER_S = 120.0

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class GroupScore:
    """What the rewards made of one group of G samples.

    rewards: weighted sum per sample, None where any reward of non-zero weight is missing.
    mask: True for samples that may be trained on; all False in a dropped group.
    components: per reward `label` its scores and per part `label/part` its values, before weights.
    failures: number of missing scores as `label/cause`; causes are none, nan, inf, timeout, infrastructure
        (RetryableRewardError) and exception.
    attempts, seconds: calls made and wall time in seconds, per label.
    dropped, reason: whether the group as a whole is left out, and why (empty when it is not).
    """

    group_id: Hashable
    rewards: list[float | None]
    mask: list[bool]
    components: dict[str, list[float | None]]
    failures: dict[str, int]
    attempts: dict[str, int]
    seconds: dict[str, float]
    dropped: bool
    reason: str


@dataclass(frozen=True)
class RewardResult:
    """One reward on one group. `scores` are finite or None; `failures` counts the None by cause."""

    scores: list[float | None]
    components: dict[str, list[float | None]]
    failures: dict[str, int]
    attempts: int
    seconds: float


async def score_group(
    group_id: Hashable, rewards: Sequence[LoadedReward], batch: RewardBatch, *, sleep: Sleep = asyncio.sleep
) -> GroupScore:
    """Score a group with all its rewards at once.

    Raises FatalRewardError when a reward raised it, broke the protocol, or has missing scores and
    `on_missing: stop`.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(score_reward(loaded, batch, sleep=sleep)) for loaded in rewards]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return combine(group_id, rewards, [call.result() for call in calls])


async def score_reward(
    loaded: LoadedReward, batch: RewardBatch, *, sleep: Sleep = asyncio.sleep
) -> RewardResult:
    """One reward on one group, tried `attempts` times with exponential back-off and jitter in between."""
    spec, count = loaded.spec, len(batch.images)
    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(spec.attempts),
        wait=_back_off,
        retry=tenacity.retry_if_exception(_worth_another_attempt),
        before_sleep=lambda state: _log_retry(loaded.label, state),
        sleep=sleep,
        reraise=True,
    )
    start = time.monotonic()
    components: dict[str, list[float | None]] = {}
    try:
        output: RewardOutput = await retrying(call_reward, loaded, batch)
        scores, failures = _finite(output.scores)
        components = {name: _finite(values)[0] for name, values in output.components.items()}
    except FatalRewardError as error:
        raise FatalRewardError(f"reward {loaded.label!r} stops the run: {describe_error(error)}") from error
    except Exception as error:  # a reward is foreign code and may raise anything
        _log_failure(loaded.label, error, count)
        scores, failures = [None] * count, {_cause(error): count}
    seconds = time.monotonic() - start
    return RewardResult(scores, components, failures, retrying.statistics["attempt_number"], seconds)


def longest_score_s(spec: RewardSpec) -> float:
    """Seconds within which `score_reward` ends whatever happens: every attempt to its limit, and the waits in between.

    Before a blocking attempt starts, one that was left behind is waited for, up to the same limit. Where n calls are
    under way at once, all others may have their turn before each attempt, so that it ends within n times as long.
    """
    waits_s = (spec.attempts - 1) * LONGEST_RETRY_AFTER_S
    if spec.service is not None:
        return waits_s + spec.attempts * (spec.timeout_s + spec.service.longest_wait_s)
    return waits_s + 2 * spec.attempts * spec.timeout_s


def combine(
    group_id: Hashable, rewards: Sequence[LoadedReward], results: Sequence[RewardResult]
) -> GroupScore:
    """Weigh the rewards, and let `on_missing` of each decide what its missing scores do.

    A reward of weight 0 is logged and masks nothing. Raises FatalRewardError for `on_missing: stop`.
    """
    weighing = [pair for pair in zip(rewards, results, strict=True) if pair[0].spec.weight != 0]
    total = [
        _weighted_sum([(loaded.spec.weight, result.scores[k]) for loaded, result in weighing])
        for k in range(len(results[0].scores))
    ]
    reason = _drop_reason(group_id, weighing, total)
    components: dict[str, list[float | None]] = {}
    failures: dict[str, int] = {}
    for loaded, result in zip(rewards, results, strict=True):
        components[loaded.label] = result.scores
        components |= {f"{loaded.label}/{part}": values for part, values in result.components.items()}
        failures |= {f"{loaded.label}/{cause}": number for cause, number in result.failures.items()}
    return GroupScore(
        group_id=group_id,
        rewards=total,
        mask=[not reason and reward is not None for reward in total],
        components=components,
        failures=failures,
        attempts={loaded.label: result.attempts for loaded, result in zip(rewards, results, strict=True)},
        seconds={loaded.label: result.seconds for loaded, result in zip(rewards, results, strict=True)},
        dropped=bool(reason),
        reason=reason,
    )


def _weighted_sum(terms: Sequence[tuple[float, float | None]]) -> float | None:
    """None as soon as one score is missing: a sum over fewer rewards would be on another scale."""
    if any(score is None for _, score in terms):
        return None
    weighed = [weight * score for weight, score in terms if score is not None]
    return math.fsum(weighed) if all(abs(value) <= LARGEST_SCORE for value in weighed) else None


def _drop_reason(
    group_id: Hashable,
    weighing: Sequence[tuple[LoadedReward, RewardResult]],
    total: Sequence[float | None],
) -> str:
    """Why the group is left out, or an empty string."""
    reason = ""
    for loaded, result in weighing:
        if not result.failures:
            continue
        found = (
            f"reward {loaded.label!r} left {sum(result.failures.values())} of {len(total)} samples of group "
            f"{group_id} unscored ({_format_counts(result.failures)})"
        )
        if loaded.spec.on_missing == "stop":
            raise FatalRewardError(f"{found}, and its on_missing is 'stop'")
        if loaded.spec.on_missing == "drop_group":
            reason = reason or f"{found}, and its on_missing is 'drop_group'"
    scored = sum(reward is not None for reward in total)
    if not reason and scored < MIN_SCORED_SHARE * len(total):
        reason = f"only {scored} of {len(total)} samples of group {group_id} were scored"
    return reason


def _finite(values: Sequence[float | None]) -> tuple[list[float | None], dict[str, int]]:
    """The values with None for all that is no number or beyond `LARGEST_SCORE`, and the number of None by cause."""
    causes = [
        "none" if v is None else "nan" if math.isnan(v) else "inf" if abs(v) > LARGEST_SCORE else ""
        for v in values
    ]
    kept = [None if cause else value for value, cause in zip(values, causes, strict=True)]
    return kept, dict(Counter(cause for cause in causes if cause))


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return "infrastructure" if isinstance(error, RetryableRewardError) else "exception"


def _worth_another_attempt(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, FatalRewardError)


_exponential = tenacity.wait_exponential_jitter(initial=1, max=30, jitter=1)


def _back_off(state: tenacity.RetryCallState) -> float:
    """Seconds to wait: 1, 2, 4 ... 30 with up to 1 of jitter, and at least what the service asked for."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, RetryableRewardError) else 0.0
    return max(_exponential(state), min(asked, LONGEST_RETRY_AFTER_S))


_failed: Counter[tuple[str, str]] = Counter()
"""Calls that failed for good in this process, by reward and kind of error."""


def _log_failure(label: str, error: Exception, count: int) -> None:
    """The first failure of a kind with its traceback, then a sentence at the 10th, 100th ...: a reward that always
    fails is told, and buries nothing else."""
    kind = (label, type(error).__name__)
    _failed[kind] += 1
    if _failed[kind] == 1:
        logger.warning("reward %s: %d samples are not scored", label, count, exc_info=error)
    elif math.log10(_failed[kind]).is_integer():
        logger.warning("reward %s failed for the %dth time: %s", label, _failed[kind], describe_error(error))


def _log_retry(label: str, state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    known = _failed[label, type(error).__name__] > 0
    logger.log(
        logging.DEBUG if known else logging.WARNING,
        "reward %s: attempt %d failed (%s); again in %.1f s",
        label,
        state.attempt_number,
        describe_error(error) if error else "",
        state.upcoming_sleep,
    )


def _format_counts(failures: dict[str, int]) -> str:
    return ", ".join(f"{cause} {number}" for cause, number in sorted(failures.items()))
