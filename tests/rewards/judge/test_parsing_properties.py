"""What holds of the parser for every text: grades come back as written, and nothing else is ever a number."""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards.judge.parsing import LONGEST_ANSWER, MalformedAnswer, loose_grades, schema_grades

NAMES = ("success", "preservation")
HIGH = 10
GRADES = st.fixed_dictionaries({name: st.integers(0, HIGH) | st.floats(0, HIGH) for name in NAMES})
WHOLE = st.fixed_dictionaries({name: st.integers(0, HIGH) for name in NAMES})
LETTERS = "ab 7.,:[]é’😀\t\n\\\"'"
PROSE = st.text(LETTERS, max_size=40)
REASONING = st.text(LETTERS + "{}", max_size=60)
PIECES = st.sampled_from(
    [*"{}[]\"',:\\ \n", '"success"', "'preservation'", '"preservation"', "success", "7", "11", "-1", "9.5", "1e999",
     "NaN", "true", "null", "it's", '{"success": 7, "preservation": 9}', "{'success': 7, 'preservation': 3,}"]
)  # fmt: skip
HOSTILE = st.lists(PIECES, max_size=16).map("".join) | st.text(LETTERS + "{}", max_size=80)


def read(text: str) -> dict[str, float] | None:
    try:
        return loose_grades(text, NAMES, high=HIGH)
    except MalformedAnswer:
        return None


@settings(max_examples=200, deadline=None)
@given(GRADES, REASONING, PROSE, PROSE, st.sampled_from(["plain", "fenced", "comma", "list"]))
def test_grades_come_back_as_they_were_written(
    grades: dict[str, float], reasoning: str, before: str, after: str, wrapping: str
) -> None:
    text = json.dumps({"reasoning": reasoning, **grades})
    wrapped = {
        "plain": text, "fenced": f"```json\n{text}\n```", "comma": f"{text[:-1]},}}", "list": f"[{text}]",
    }[wrapping]  # fmt: skip
    assert read(before + wrapped + after) == grades


@settings(max_examples=100, deadline=None)
@given(GRADES, st.text('ab 7.,:[]é’\t\n"{}', max_size=40))
def test_single_quotes_are_read_as_double_ones(grades: dict[str, float], reasoning: str) -> None:
    body = ", ".join(f"'{name}': {grade}" for name, grade in grades.items())
    assert read(f"{{'reasoning': '{reasoning}', {body}}}") == grades


@settings(max_examples=100, deadline=None)
@given(WHOLE, REASONING)
def test_answers_by_schema_come_back_as_they_were_written(grades: dict[str, int], reasoning: str) -> None:
    assert schema_grades(json.dumps({"reasoning": reasoning, **grades}), NAMES, high=HIGH) == grades


@settings(max_examples=100, deadline=None)
@given(GRADES, GRADES, PROSE)
def test_two_answers_count_only_where_they_agree(
    first: dict[str, float], second: dict[str, float], between: str
) -> None:
    found = read(json.dumps(first) + between + json.dumps(second))
    assert found == (first if first == second else None)


@settings(max_examples=100, deadline=None)
@given(WHOLE, REASONING, st.data())
def test_a_cut_answer_is_never_a_number(grades: dict[str, int], reasoning: str, data: st.DataObject) -> None:
    text = json.dumps({"reasoning": reasoning, **grades})
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    assert read(cut) is None
    with pytest.raises(MalformedAnswer):
        schema_grades(cut, NAMES, high=HIGH)


@settings(max_examples=300, deadline=None)
@given(HOSTILE)
def test_a_number_is_one_that_stands_beside_its_name(text: str) -> None:
    """Whatever the text: no other exception, and no grade that is not written after its name in it."""
    found = read(text)
    if found is None:
        return
    assert list(found) == list(NAMES)
    for name, grade in found.items():
        written = re.findall(rf"""["']{name}["']\s*:\s*["']?\s*([0-9.eE+-]+)""", text)
        assert 0 <= grade <= HIGH and grade in [float(number) for number in written]


SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-3, 14)
    | st.floats()
    | st.sampled_from(["4", "9.5", "x", "", "1e1"])
)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({name: SCALARS for name in NAMES}))
def test_what_is_no_number_in_range_is_refused(values: dict[str, Any]) -> None:
    plain = {"4": 4.0, "9.5": 9.5}
    numbers = {name: plain.get(value) if isinstance(value, str) else value for name, value in values.items()}
    fine = all(type(number) in (int, float) and 0 <= number <= HIGH for number in numbers.values())
    assert read(json.dumps(values)) == (numbers if fine else None)


@settings(max_examples=30, deadline=None)
@example(['"\\'])
@example(["{", "'\\"])
@example(["'\"\\"])
@given(st.lists(PIECES | st.text(LETTERS, max_size=3), min_size=1, max_size=6))
def test_time_is_bounded_on_hostile_text(pieces: Sequence[str]) -> None:
    """Any short pattern repeated up to the longest text that is read; those named here once took over a second."""
    pattern = "".join(pieces) or "{"
    text = (pattern * (LONGEST_ANSWER // len(pattern) + 1))[:LONGEST_ANSWER]
    began = time.process_time()
    read(text)
    assert time.process_time() - began < 0.3, "processor time, so load does not count"
