"""The text of a prompt from its include clauses, as GenEval words it.

With the wording `geneval` (the default) the text is the one of the official prompts, plurals by its plain rule
and all ("knifes", "sheeps", "three persons"). Where we differ from upstream: names that are plurals already
stay as they are ("two scissors"); its rule would write "scissorses", which no official prompt does. The wording
`english` writes what a person would ("knives", "sheep", "three people", "two pairs of scissors").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen",
)  # fmt: skip

WORDINGS = ("geneval", "english")

_ALREADY_PLURAL = ("scissors", "skis")
_IRREGULAR = {"person": "people", "knife": "knives", "sheep": "sheep", "mouse": "mice"}
_MEASURES = {"scissors": "pair", "skis": "pair", "broccoli": "head"}
"""English counts these by a measure: three pairs of scissors."""

_VOWEL_SOUND = re.compile(
    r"(?!eu|one\b|once\b|uni(?![nm])|us[aeu]|ut[ei]|uku)[aeiou]|heir|honest|honou?r|hour", re.I
)


def article(words: str) -> str:
    """`words` after "a" or "an", told from the spelling: an orange, an hourglass, a unicorn."""
    return f"{'an' if _VOWEL_SOUND.match(words) else 'a'} {words}"


def plural(name: str, wording: str = "geneval") -> str:
    """The plural of a class name; only its last word changes."""
    head, space, last = name.rpartition(" ")
    if last in _ALREADY_PLURAL:
        return name
    if wording == "geneval":
        return f"{name}es" if name.endswith("s") else f"{name}s"
    if last in _IRREGULAR:
        return f"{head}{space}{_IRREGULAR[last]}"
    if re.search(r"(s|x|z|ch|sh)$", last):
        return f"{name}es"
    return f"{name[:-1]}ies" if re.search(r"[^aeiou]y$", last) else f"{name}s"


def noun_phrase(
    name: str,
    count: int = 1,
    color: str | None = None,
    wording: str = "geneval",
    plurals: Mapping[str, str] | None = None,
) -> str:
    """`count` (at most 15) objects in words: "an orange cow", "three wine glasses".

    plurals: class name -> its plural, which goes before the wording's own.
    """
    paint = f"{color} " if color else ""
    measure = _MEASURES.get(name.rpartition(" ")[2]) if wording == "english" else None
    if measure and name not in (plurals or {}):
        return f"{article(measure) if count == 1 else f'{NUMBERS[count]} {measure}s'} of {paint}{name}"
    if count == 1:
        return article(f"{paint}{name}")
    return f"{NUMBERS[count]} {paint}{(plurals or {}).get(name) or plural(name, wording)}"


def prompt_text(
    include: Sequence[Mapping[str, Any]],
    wording: str = "geneval",
    plurals: Mapping[str, str] | None = None,
) -> str:
    """The prompt of one include clause, of two, or of a clause and another placed against it."""
    nouns = [
        noun_phrase(clause["class"], clause["count"], clause.get("color"), wording, plurals)
        for clause in include
    ]
    position = include[-1].get("position")
    if position is not None:
        relation, target = position
        return f"a photo of {nouns[-1]} {relation} {nouns[target]}"
    return f"a photo of {' and '.join(nouns)}"
