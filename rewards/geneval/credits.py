"""GenEval's verdicts as the output of a reward: which one is the score, and which are logged beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.base import RewardOutput
from rewards.geneval.rules import TAGS, GenEvalResult

CREDITS = ("dense", "strict", "correct", "flow_grpo_compat")
PARTS = ("dense", "strict", "correct")


def check_credit(credit: str) -> str:
    """The credit itself. Raises ValueError when there is none of that name."""
    if credit not in CREDITS:
        raise ValueError(f"credit: {credit!r} is not one of {', '.join(CREDITS)}")
    return credit


def geneval_output(results: Sequence[GenEvalResult], credit: str) -> RewardOutput:
    """Verdicts as scores of the chosen credit, with the other verdicts as components."""
    columns = _columns(results)
    return RewardOutput(scores=columns[credit], components={name: columns[name] for name in PARTS})


def labelled_output(results: Sequence[GenEvalResult], credit: str, scoring: str) -> RewardOutput:
    """As `geneval_output`, with one for each tag; every component's name begins with `scoring`.

    The component of each of the six tags holds the score of its own samples and None for all others, so its
    mean is the tag's. The prefix keeps the figures of different detectors and colour rules apart in the log.
    """
    columns = _columns(results)
    by_tag = {
        tag: [
            score if result.tag == tag else None
            for result, score in zip(results, columns[credit], strict=True)
        ]
        for tag in TAGS
    }
    parts: dict[str, Sequence[float | None]] = {**{name: columns[name] for name in PARTS}, **by_tag}
    return RewardOutput(
        scores=columns[credit], components={f"{scoring}.{name}": values for name, values in parts.items()}
    )


def _columns(results: Sequence[GenEvalResult]) -> dict[str, list[float]]:
    return {name: [float(getattr(result, name)) for result in results] for name in CREDITS}
