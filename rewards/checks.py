"""Tries rewards out before a run depends on them: a dry call, or a reward's own check and readiness probe."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import json
import logging
import time
from collections.abc import Sequence

from PIL import Image

from core.prompts import Prompt
from rewards.base import RewardError, RewardLoadError, RewardSet
from rewards.calling import RewardBatch, call_reward
from rewards.loading import LoadedReward, describe_error, load_reward, most_references, set_problems

logger = logging.getLogger(__name__)

TRIED_TOGETHER, TRIES_S = 16, 10.0
"""Prompts of one dry call, and the seconds that all dry calls of one reward may take."""
_SOURCE = (40, 60, 200)
NAMED = 5
"""Prompts that are named of those that a reward refuses."""


def check_rewards(rewards: RewardSet, *, probe: bool = False, prompts: Sequence[Prompt] = ()) -> list[str]:
    """Every problem that can be found without a GPU, Ray or a sample; empty when the rewards are usable.

    A reward with a `check` or `readiness` method (served, paid or heavy ones) is not called: its `check()` is
    asked for configuration problems and, with `probe`, its `readiness()` for the state of its service. Every
    other reward makes a dry call. Then the references of all `prompts` are counted and their metadata tried. Not for
    use inside a running event loop.
    """
    problems = set_problems(rewards.rewards)
    for spec in rewards.rewards:
        try:
            loaded = load_reward(spec)
        except RewardLoadError as error:
            problems.append(str(error))
        else:
            found = asyncio.run(try_reward(loaded, rewards, probe=probe)) + _reference_problems(
                loaded, prompts
            )
            problems += found or asyncio.run(metadata_problems(loaded, rewards, prompts))
    return problems


async def try_reward(
    loaded: LoadedReward, rewards: RewardSet, *, probe: bool, restarted: bool = False
) -> list[str]:
    """The problems of one loaded reward: by its own check and readiness if it has them, or a dry call. `restarted`: a
    worker is tried that was lost within a run."""
    try:
        if not hasattr(loaded.owner, "check") and not hasattr(loaded.owner, "readiness"):
            await dry_call(loaded, rewards)
            return []
        problems = list(loaded.owner.check()) if hasattr(loaded.owner, "check") else []
        if probe and not problems and hasattr(loaded.owner, "readiness"):
            readiness = loaded.owner.readiness
            told = {"task": rewards.task, "restarted": restarted}
            known = told.keys() & inspect.signature(readiness).parameters
            # It may load a model for minutes.
            found = await asyncio.to_thread(readiness, **{name: told[name] for name in known})
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


def _reference_problems(loaded: LoadedReward, prompts: Sequence[Prompt]) -> list[str]:
    """Prompts with more references than a reward takes, the first few by name."""
    most = most_references(loaded.spec.name)
    above = [prompt for prompt in prompts if most is not None and len(prompt.references) > most]
    return _first_few(
        loaded,
        [
            f"{prompt.name}: {len(prompt.references)} references, and reward {loaded.label!r} takes at most {most}; "
            "leave the others out, or score with a reward that takes so many"
            for prompt in above
        ],
    )


def _first_few(loaded: LoadedReward, problems: list[str]) -> list[str]:
    more = len(problems) - NAMED
    return [*problems[:NAMED], *[f"reward {loaded.label!r}: and {more} prompts more"] * (more > 0)]


async def metadata_problems(loaded: LoadedReward, rewards: RewardSet, prompts: Sequence[Prompt]) -> list[str]:
    """Which of the prompts a reward cannot score for what their metadata hold: the first few by name.

    A served reward's must be JSON, a reward with `check_metadata` is asked about each, one that may not be called is
    left alone, and every other one makes dry calls for `TRIES_S` seconds; the log says how far they came.
    """
    deadline, problems = time.monotonic() + TRIES_S, []
    for start in range(0, len(prompts), TRIED_TOGETHER):
        if time.monotonic() > deadline:
            logger.warning(
                "reward %s: the metadata of %d of %d prompts were tried in %g s; the others were not",
                loaded.label, start, len(prompts), TRIES_S,
            )  # fmt: skip
            break
        batch = prompts[start : start + TRIED_TOGETHER]
        if await _refusal(loaded, rewards, batch):
            found = [(prompt, await _refusal(loaded, rewards, [prompt])) for prompt in batch]
            problems += [f"{prompt.name}: {refusal}" for prompt, refusal in found if refusal]
    return _first_few(loaded, problems)


async def _refusal(loaded: LoadedReward, rewards: RewardSet, prompts: Sequence[Prompt]) -> str:
    """Why a reward cannot score the prompts; empty when it can."""
    owner, label = loaded.owner, f"reward {loaded.label!r}"
    try:
        if loaded.spec.service is not None:
            json.dumps([prompt.metadata for prompt in prompts], allow_nan=False)
        elif hasattr(owner, "check_metadata"):
            for prompt in prompts:
                owner.check_metadata(prompt.metadata)
        elif not hasattr(owner, "check") and not hasattr(owner, "readiness"):
            await dry_call(loaded, rewards, prompts)
    except RewardError as error:
        return str(error)
    except Exception as error:  # a reward is foreign code and may raise anything
        return f"{label}: {error if isinstance(error, ValueError) else describe_error(error)}"
    return ""


async def dry_call(loaded: LoadedReward, rewards: RewardSet, prompts: Sequence[Prompt] = ()) -> None:
    """Score generated images of the run's size, for editing with references: one for each prompt, or two for the
    set's example. What the scores are is not judged.

    Raises RewardError when the call fails, takes longer than `timeout_s` or returns a wrong count or type.
    """
    size = (rewards.width, rewards.height)
    shown = [(prompt.prompt, prompt.references, prompt.metadata) for prompt in prompts]
    source = (_data_uri(Image.new("RGB", size, _SOURCE)),) if rewards.task == "edit" else ()
    example = (rewards.example_prompt, source, dict(rewards.example_metadata))
    texts, sources, metadata = zip(*(shown or [example] * 2), strict=True)
    drawn = Image.radial_gradient("L").resize(size).convert("RGB"), Image.new("RGB", size, (200, 60, 40))
    images = [drawn[k % 2] for k in range(len(texts))]
    references = [[Image.new("RGB", size, _SOURCE) for _ in addresses] for addresses in sources]
    batch = RewardBatch(images, texts, references, metadata, sources)
    try:
        output = await call_reward(loaded, batch)
    except TimeoutError as error:
        raise RewardError(
            f"reward {loaded.label!r}: the dry call on {len(images)} {rewards.width}x{rewards.height} images took "
            f"longer than timeout_s {loaded.spec.timeout_s}; speed it up or allow more time"
        ) from error
    except RewardError:
        raise
    except Exception as error:  # a reward is foreign code and may raise anything
        raise RewardError(f"reward {loaded.label!r}: the dry call raised {describe_error(error)}") from error
    if not prompts:
        scores = ["no score" if score is None else f"{score:.4g}" for score in output.scores]
        logger.info("reward %s, tried: %s for a grey gradient, %s for plain red", loaded.label, *scores)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
