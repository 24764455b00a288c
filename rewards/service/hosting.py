"""The rewards inside a service process: loaded once, tried until they work, called with a place in a queue."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from rewards.base import LONGEST_QUEUE_S, RetryableRewardError, RewardLoadError, RewardOutput, RewardSet
from rewards.calling import RewardBatch, call_reward
from rewards.checks import try_reward
from rewards.loading import LoadedReward, load_reward
from rewards.service.wire import fingerprint

logger = logging.getLogger(__name__)

TRY_AGAIN_S = 10.0


class HostedReward:
    """One served reward. `problems` is empty once its trial has passed.

    `trial` holds the one reward, with what it is tried on. At most `concurrency` requests are decoded and
    scored; the others wait for one of these slots, in order. Raises RewardLoadError.
    """

    def __init__(self, trial: RewardSet, concurrency: int) -> None:
        (spec,) = trial.rewards
        self.loaded: LoadedReward = load_reward(spec)
        self.label = self.loaded.label
        try:
            self.fingerprint = fingerprint(spec.name, spec.params)
        except (TypeError, ValueError) as error:
            raise RewardLoadError(
                f"reward {self.label!r}: params of a served reward must be plain JSON: {error}"
            ) from error
        self.problems = ["it has not been tried yet"]
        self._trial = trial
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)

    async def try_out(self) -> None:
        """The dry call, or the reward's own check and readiness, for each task that it is to score."""
        trials = self._trial, *self._trial.other_tasks
        found = [problem for trial in trials for problem in await try_reward(self.loaded, trial, probe=True)]
        self.problems = list(dict.fromkeys(found))
        for problem in self.problems:
            logger.warning("not ready: %s", problem)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among the requests in work. Raises RetryableRewardError when none gets free in 10 minutes."""
        try:
            async with asyncio.timeout(LONGEST_QUEUE_S):
                await self._slots.acquire()
        except TimeoutError as error:
            raise RetryableRewardError(
                f"reward {self.label!r} was busy for {LONGEST_QUEUE_S:g} s; start more services"
            ) from error
        try:
            yield
        finally:
            self._slots.release()

    async def score(self, batch: RewardBatch, timeout_s: float) -> RewardOutput:
        """One call under the time limit of who asks, since stages may differ. Raises as `call_reward` does."""
        spec = dataclasses.replace(self.loaded.spec, timeout_s=timeout_s)
        return await call_reward(dataclasses.replace(self.loaded, spec=spec), batch)


async def get_ready(rewards: Sequence[HostedReward]) -> None:
    """Try every reward, again every 10 s while one does not work: what it waits for may still come up."""
    while True:
        for reward in rewards:
            if reward.problems:
                await reward.try_out()
        if not any(reward.problems for reward in rewards):
            logger.info("ready: %s", ", ".join(reward.label for reward in rewards))
            return
        await asyncio.sleep(TRY_AGAIN_S)
