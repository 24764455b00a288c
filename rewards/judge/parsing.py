"""From the judge's words to grades: strict about what is said, lenient about how it is wrapped.

Taken: JSON, alone, fenced or within prose, with single quotes or a trailing comma. Not taken: anything that
can be read in two ways. An answer that is not taken raises MalformedAnswer; no grade is ever guessed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rewards.judge.messages import JudgeReply

LONGEST_ANSWER = 20_000
"""Characters. A judge that writes more has lost the thread, and the search below stays fast."""

# A quote that is never closed takes the rest of the text (in a group), so that nothing is searched twice.
_DOUBLE, _SINGLE = r'"(?:[^"\\]|\\.)*(?:"|(\\?\Z))', r"'(?:[^'\\]|\\.)*(?:'|(\\?\Z))"
_TOKENS = {
    quotes: re.compile("|".join([r"[{}]", *strings]), re.DOTALL)
    for quotes, strings in {"\"'": [_DOUBLE, _SINGLE], '"': [_DOUBLE], "'": [_SINGLE], "": []}.items()
}
_TO_MEND = re.compile(rf"{_DOUBLE}|{_SINGLE}|,(?=\s*[}}\]])", re.DOTALL)
_NUMBER = re.compile(r"\d{1,3}(\.\d{1,6})?", re.ASCII)
_REFUSAL = re.compile(
    r"(i['’]?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately"
    r"|i['’]?m (unable|not able)|i am (unable|not able)|i (can['’]t|cannot|can not|won['’]t|will not))\b",
    re.IGNORECASE,
)


class MalformedAnswer(ValueError):
    """The answer does not say what was asked, or says it in two ways; the text is the reason."""


def loose_grades(text: str, names: Sequence[str], *, high: int) -> dict[str, float]:
    """The grades of a free-text answer, each a finite number in [0, high].

    Every JSON object that names one of the grades must be complete, and all of them must agree. Keys other
    than `names` are ignored. A grade may be a string that is a plain number. Raises MalformedAnswer.
    """
    _check_length(text)
    answers = []
    for span in _object_spans(text):
        if "\\" not in span and not any(name in span for name in names):
            continue  # thousands of braces would take longer to load than the event loop should stand still
        try:
            found = _load(_TO_MEND.sub(_mend, span))
        except MalformedAnswer:
            if any(name in span for name in names):
                raise
            continue  # braces in the prose
        if any(name in found for name in names):
            answers.append({name: _grade(found, name, high, whole=False) for name in names})
    if not answers:
        raise MalformedAnswer(f"holds no JSON object with {', '.join(names)}")
    if any(answer != answers[0] for answer in answers):
        raise MalformedAnswer(f"holds {len(answers)} JSON objects that disagree")
    return answers[0]


def schema_grades(text: str, names: Sequence[str], *, high: int) -> dict[str, float]:
    """The grades of an answer that had to follow `grades_schema`: that object and nothing around it.

    Raises MalformedAnswer; most often the endpoint does not enforce schemas then.
    """
    _check_length(text)
    found = _load(text)
    wanted = {"reasoning", *names}
    if set(found) != wanted:
        raise MalformedAnswer(f"has the keys {sorted(found)} where the schema asks for {sorted(wanted)}")
    if not isinstance(found["reasoning"], str):
        raise MalformedAnswer(f"reasoning is {_short(found['reasoning'])}, not a text")
    return {name: _grade(found, name, high, whole=True) for name in names}


def grades_schema(names: Sequence[str], *, high: int) -> dict[str, Any]:
    """JSON schema of whole grades from 0 to `high`, the reasoning before them.

    The range is an enumeration because every implementation of strict schemas knows `enum`, and not every one
    `minimum` and `maximum`.
    """
    grade = {"type": "integer", "enum": list(range(high + 1))}
    return {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}} | {name: grade for name in names},
        "required": ["reasoning", *names],
        "additionalProperties": False,
    }


def without_thoughts(reply: JudgeReply) -> JudgeReply:
    """The answer proper of a model that thinks aloud first: what follows `</think>`. Many chat templates open the
    thoughts themselves, so that `<think>` is not in the reply. Thoughts without an end are no answer, and one that
    begins with its JSON is left alone.
    """
    text, begin, said = reply.text.strip(), 0, ""
    if not text.startswith("{"):
        _, ended, answer = text.rpartition("</think>")
        text = answer if ended or not text.startswith("<think>") else ""
    for number, choice in enumerate(reply.choices, 1):
        # As much as may begin an end that a later token completes: looking at all that was said would be quadratic.
        _, ended, said = (said[1 - len("</think>") :] + choice.token).rpartition("</think>")
        begin = number if ended else begin
    return dataclasses.replace(reply, text=text, choices=reply.choices[begin:])


def is_refusal(text: str) -> bool:
    """Whether an answer from which nothing could be read begins as a refusal does: it is not asked again then, since
    the same model declines again. One that could be read is never a refusal, however it begins."""
    return "{" not in text and _REFUSAL.match(text.strip()) is not None


def _check_length(text: str) -> None:
    if not text.strip():
        raise MalformedAnswer("is empty")
    if len(text) > LONGEST_ANSWER:
        raise MalformedAnswer(f"is {len(text)} characters long; up to {LONGEST_ANSWER} are read")


def _object_spans(text: str) -> list[str]:
    """Every outermost `{...}`, braces inside strings apart. Quotes outside braces, or never closed, are prose."""
    spans, end, quotes = [], 0, "\"'"
    while (start := text.find("{", end)) >= 0:
        depth, end = 1, start + 1
        while depth:
            match = _TOKENS[quotes].search(text, end)
            if match is None:
                raise MalformedAnswer("has a brace that is never closed")
            token, end = match[0], match.end()
            if token in "{}":
                depth += 1 if token == "{" else -1
            elif match.lastindex:
                quotes, end = quotes.replace(token[0], ""), match.start() + 1
        spans.append(text[start:end])
    return spans


def _mend(match: re.Match[str]) -> str:
    """Single quotes become double, a comma before a closing bracket goes."""
    token = match.group()
    if token[0] == "'" and not match.lastindex:
        swap = {"\\'": "'", '"': '\\"'}
        inner = re.sub(r"\\.|\"", lambda found: swap.get(found[0], found[0]), token[1:-1], flags=re.DOTALL)
        return f'"{inner}"'
    return "" if token == "," else token


def _load(text: str) -> dict[str, Any]:
    """A JSON object. Raises MalformedAnswer for other JSON, NaN, a repeated key, and what is no JSON."""
    try:
        found = json.loads(
            text, strict=False, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except MalformedAnswer:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also covers integers of absurd length
        raise MalformedAnswer(f"is not JSON: {_short(text)} ({error})") from error
    if not isinstance(found, dict):
        raise MalformedAnswer(f"is {_short(found)}, not a JSON object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedAnswer(f"holds {name}, which is not a grade")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedAnswer("holds a JSON object with a repeated key")
    return found


def _grade(found: Mapping[str, Any], name: str, high: int, *, whole: bool) -> float:
    if name not in found:
        raise MalformedAnswer(f"has no {name}")
    value = found[name]
    if isinstance(value, str) and not whole and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedAnswer(f"{name} is {_short(value)}, not a number")
    if not 0 <= value <= high:  # JSON has neither NaN nor infinity, but 1e999
        raise MalformedAnswer(f"{name} is {_short(value)}, outside 0 to {high}")
    if whole and value != int(value):
        raise MalformedAnswer(f"{name} is {value}, not a whole number")
    return float(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
