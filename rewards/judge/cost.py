"""What a run's questions will take, as lines to print before it starts."""

from __future__ import annotations

import json
from collections.abc import Sequence

from PIL import Image

from rewards.judge.estimate import Estimate, estimate
from rewards.judge.messages import JudgeRequest
from rewards.judge.pricing import PRICES_AS_OF
from rewards.judge.protocols import Question
from rewards.judge.settings import JudgeSettings

PROMPT_BYTES = 200
"""Assumed length of an instruction: the prompts of a run are not known to a reward beforehand."""


def cost_lines(
    settings: JudgeSettings, questions: Sequence[Question], *, images: int, max_asks: int
) -> list[str]:
    """Calls, tokens, money and the longest wait for `images` samples that are each asked `questions`."""
    if settings.mode == "replay":
        return [f"judge {settings.model}: replayed from {settings.cache}, without requests or cost"]
    found = [
        _estimate(settings, question.request(0), calls=images, max_tokens=question.max_tokens)
        for question in questions
    ]
    calls = sum(one.calls for one in found)
    prompt = sum(one.prompt_tokens for one in found)
    completion = sum(one.completion_tokens for one in found)
    costs = [one.cost_usd for one in found]
    money = (
        "cost unknown: set price_per_million_input and price_per_million_output"
        if None in costs
        else f"${sum(cost for cost in costs if cost is not None):,.2f} (list prices of {PRICES_AS_OF}, or the recipe's)"
    )
    limits = [
        f"{key} {getattr(settings, key):,}"
        for key in ("max_cost_usd", "max_total_tokens")
        if getattr(settings, key) is not None
    ]
    return [
        f"judge {settings.model}: {calls:,} calls ({len(questions)} per image); at most {prompt:,} prompt and "
        f"{completion:,} completion tokens, {money}; each prompt taken as {PROMPT_BYTES} bytes",
        f"each malformed answer is asked for again, up to {max_asks} asks in all; answers in the cache are free; "
        f"the budget is {' and '.join(limits) or 'unlimited'}",
        f"one question ends within {settings.longest_ask_s:,.0f} s; give the reward a timeout_s that covers a group",
    ]


def _estimate(settings: JudgeSettings, request: JudgeRequest, *, calls: int, max_tokens: int) -> Estimate:
    texts = [request.system, *(part for part in request.parts if isinstance(part, str))]
    if request.response_schema is not None:
        texts.append(json.dumps(request.response_schema))
    return estimate(
        settings,
        calls=calls,
        image_sizes=[part.size for part in request.parts if isinstance(part, Image.Image)],
        text_bytes=sum(len(text.encode()) for text in texts),
        max_tokens=max_tokens,
    )
