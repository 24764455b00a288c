"""Tries rewards out before a run depends on them: a dry call, or a reward's own check and readiness probe."""

from __future__ import annotations

import asyncio
import inspect

from PIL import Image

from rewards.base import RewardError, RewardLoadError, RewardSet
from rewards.calling import RewardBatch, call_reward
from rewards.loading import LoadedReward, describe_error, load_reward, set_problems


def check_rewards(rewards: RewardSet, *, probe: bool = False) -> list[str]:
    """Every problem that can be found without a GPU, Ray or a sample; empty when the rewards are usable.

    A reward with a `check` or `readiness` method (served, paid or heavy ones) is not called: its `check()` is
    asked for configuration problems and, with `probe`, its `readiness()` for the state of its service. Every
    other reward makes a dry call. Not for use inside a running event loop.
    """
    problems = set_problems(rewards.rewards)
    for spec in rewards.rewards:
        try:
            loaded = load_reward(spec)
        except RewardLoadError as error:
            problems.append(str(error))
        else:
            problems += asyncio.run(try_reward(loaded, rewards, probe=probe))
    return problems


async def try_reward(loaded: LoadedReward, rewards: RewardSet, *, probe: bool) -> list[str]:
    """The problems of one loaded reward: by its own check and readiness if it has them, or a dry call."""
    try:
        if not hasattr(loaded.owner, "check") and not hasattr(loaded.owner, "readiness"):
            await dry_call(loaded, rewards)
            return []
        problems = list(loaded.owner.check()) if hasattr(loaded.owner, "check") else []
        if probe and not problems and hasattr(loaded.owner, "readiness"):
            found = await asyncio.to_thread(loaded.owner.readiness)  # it may load a model for minutes
            problems = list(await found if inspect.isawaitable(found) else found)
        least_s = getattr(loaded.owner, "least_timeout_s", 0.0)
        if loaded.spec.timeout_s < least_s:
            problems.append(
                f"timeout_s {loaded.spec.timeout_s:g} ends a call before its own params let it fail, which may take "
                f"{least_s:g} s; raise timeout_s, or leave it out for the reward's own"
            )
        return [f"reward {loaded.label!r}: {problem}" for problem in problems]
    except RewardError as error:
        return [str(error)]
    except Exception as error:  # a reward is foreign code and may raise anything
        return [f"reward {loaded.label!r}: its check or readiness raised {describe_error(error)}"]


async def dry_call(loaded: LoadedReward, rewards: RewardSet) -> None:
    """Score two generated images of the run's size, for editing with references. What the scores are is not judged.

    Raises RewardError when the call fails, takes longer than `timeout_s` or returns a wrong count or type.
    """
    size = (rewards.width, rewards.height)
    images = [Image.radial_gradient("L").resize(size).convert("RGB"), Image.new("RGB", size, (200, 60, 40))]
    references = [Image.new("RGB", size, (40, 60, 200)) if rewards.task == "edit" else None for _ in images]
    batch = RewardBatch(images, [rewards.example_prompt] * 2, references, [rewards.example_metadata] * 2)
    try:
        await call_reward(loaded, batch)
    except TimeoutError as error:
        raise RewardError(
            f"reward {loaded.label!r}: the dry call on two {rewards.width}x{rewards.height} images took "
            f"longer than timeout_s {loaded.spec.timeout_s}; speed it up or allow more time"
        ) from error
    except RewardError:
        raise
    except Exception as error:  # a reward is foreign code and may raise anything
        raise RewardError(f"reward {loaded.label!r}: the dry call raised {describe_error(error)}") from error
