"""What the judge may write and what is read from it: the grades it states, or a reason, never a guess."""

import contextlib
import itertools
import json
import time

import jsonschema
import pytest

from rewards.judge.messages import JudgeReply, Outcome, TokenChoices
from rewards.judge.parsing import (
    LONGEST_ANSWER,
    MalformedAnswer,
    grades_schema,
    is_refusal,
    loose_grades,
    schema_grades,
    without_thoughts,
)

NAMES = ("success", "preservation")
GOOD = '{"reasoning": "fine", "success": 7, "preservation": 9}'
GRADES = {"success": 7.0, "preservation": 9.0}


def read(text):
    return loose_grades(text, NAMES, high=10)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n\n  {GOOD}\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}```",
        f"Here's my answer, as you've asked:\n{GOOD}\nI hope it's of use.",
        f'The "before" picture isn\'t bad. {GOOD}',
        GOOD.replace('"', "'"),
        "{'reasoning': 'it says \"hi\"', 'success': 7, 'preservation': 9}",
        "{'reasoning': 'it\\'s fine', 'success': 7, 'preservation': 9}",
        "{'reasoning': \"it's fine\", 'success': 7, 'preservation': 9}",
        "{'reasoning': 'a \\\\ and a \\\"', 'success': 7, 'preservation': 9}",
        '{"reasoning": "fine", "success": 7, "preservation": 9,}',
        '{"reasoning": "fine", "success": 7, "preservation": 9 ,\n }',
        '{"reasoning": "a, } b {", "success": 7, "preservation": 9}',
        '{"reasoning": "say \\"10\\", then }", "success": 7, "preservation": 9}',
        '{"reasoning": "two\nlines", "success": 7, "preservation": 9}',
        '{"success": 7.0, "preservation": 9e0}',
        '{"success": "7", "preservation": " 9.0 "}',
        '{"preservation": 9, "success": 7, "seen": ["a", {"b": null}], "sure": true}',
        f"{GOOD}\n{GOOD}",
        f"I use {{braces}} freely. {GOOD}",
        f"First {{'a': 1}}, then {GOOD}",
        f"[{GOOD}]",
        "{" * 9000 + "}" * 9000 + GOOD,  # braces in prose, however many, do not hide the answer
    ],
)
def test_wrappings_that_leave_no_doubt(text):
    assert read(text) == GRADES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("success 7, preservation 9", "no JSON object"),
        ("7 9", "no JSON object"),
        ("[7, 9]", "no JSON object"),
        ("null", "no JSON object"),
        ('{"reasoning": "fine"}', "no JSON object with success"),
        ('{"success": 7}', "no preservation"),
        ('{"Success": 7, "preservation": 9}', "no success"),
        ('{"success": 11, "preservation": 9}', "success is '11', outside 0 to 10"),
        ('{"success": -1, "preservation": 9}', "outside"),
        ('{"success": 10.001, "preservation": 9}', "outside"),
        ('{"success": "11", "preservation": 9}', "outside"),
        ('{"success": NaN, "preservation": 9}', "NaN"),
        ('{"success": Infinity, "preservation": 9}', "Infinity"),
        ('{"success": -Infinity, "preservation": 9}', "-Infinity"),
        ('{"success": 1e999, "preservation": 9}', "outside"),
        ('{"success": "NaN", "preservation": 9}', "not a number"),
        ('{"success": true, "preservation": 9}', "not a number"),
        ("{'success': True, 'preservation': 9}", "not JSON"),
        ('{"success": null, "preservation": 9}', "not a number"),
        ('{"success": "seven", "preservation": 9}', "not a number"),
        ('{"success": "7/10", "preservation": 9}', "not a number"),
        ('{"success": "٧", "preservation": 9}', "not a number"),
        ('{"success": "", "preservation": 9}', "not a number"),
        ('{"success": [7], "preservation": 9}', "not a number"),
        ('{"success": 7/10, "preservation": 9}', "not JSON"),
        ('{"success": 7 or 8, "preservation": 9}', "not JSON"),
        ('{"success": 07, "preservation": 9}', "not JSON"),
        ('{"success": 1_0, "preservation": 9}', "not JSON"),
        ('{"success": 0x7, "preservation": 9}', "not JSON"),
        ('{"success": 7, "success": 3, "preservation": 9}', "repeated key"),
        ('{"success": 7, "preservation": 9', "never closed"),
        ('{"success": 7, "preservation": 9}}{', "never closed"),
        ("{success: 7, preservation: 9}", "not JSON"),
        ("{'reasoning': 'it's fine', 'success': 7, 'preservation': 9}", "not JSON"),
        ('{"scores": {"success": 7, "preservation": 9}}', "no JSON object"),
        (f"{GOOD} or rather {GOOD.replace('7', '8')}", "disagree"),
        (GOOD + ' but {"success": 7}', "no preservation"),
        (GOOD + ' but {"success": 99, "preservation": 9}', "outside"),
        (GOOD + " but {success: 3}", "not JSON"),
        (GOOD + ' but {"success": 3', "never closed"),
        ('{"success": ' + "9" * 5000 + ', "preservation": 9}', "not JSON"),
        ('{"success": ' + "[" * 9000 + "]" * 9000 + ', "preservation": 9}', "not JSON"),
        ("x" * LONGEST_ANSWER + GOOD, "characters long"),
    ],
)
def test_doubtful_answers_are_malformed(text, reason):
    with pytest.raises(MalformedAnswer, match=reason):
        read(text)


def test_every_cut_of_a_good_answer_is_malformed():
    for end in range(len(GOOD)):
        with pytest.raises(MalformedAnswer):
            read(GOOD[:end])


def test_every_pair_of_grades_is_read_as_written_or_refused():
    """All values against a rule of one line each: what is not a number in range must not pass."""
    values = [0, 3, 9.5, 10, -1, 10.5, True, False, None, "4", "x", "", [], {}, [3], "1e1"]
    for first, second in itertools.product(values, values):
        text = json.dumps({"reasoning": "r", "success": first, "preservation": second})
        expected = []
        for value in (first, second):
            number = {"4": 4}.get(value, value) if isinstance(value, str) else value
            good = type(number) in (int, float) and 0 <= number <= 10
            expected.append(float(number) if good else None)
        for wrapped in (text, f"```json\n{text}\n```", text[:-1] + ",}"):
            try:
                found = list(read(wrapped).values())
            except MalformedAnswer:
                assert None in expected, text
            else:
                assert found == expected, text


@pytest.mark.parametrize("text", [GOOD, f" {GOOD}\n", GOOD.replace("7", "7.0")])
def test_schema_answers(text):
    assert schema_grades(text, NAMES, high=10) == GRADES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"```json\n{GOOD}\n```", "not JSON"),
        (f"Sure: {GOOD}", "not JSON"),
        (GOOD.replace('"', "'"), "not JSON"),
        (GOOD.replace("9}", "9,}"), "not JSON"),
        (f"[{GOOD}]", "not a JSON object"),
        ('{"success": 7, "preservation": 9}', "has the keys"),
        (GOOD.replace("}", ', "more": 1}'), "has the keys"),
        (GOOD.replace('"fine"', "3"), "reasoning"),
        (GOOD.replace("7", "7.5"), "not a whole number"),
        (GOOD.replace("7", '"7"'), "not a number"),
        (GOOD.replace("7", "true"), "not a number"),
        (GOOD.replace("7", "11"), "outside"),
        (GOOD.replace("7", "NaN"), "NaN"),
        (GOOD.replace("7", "1e999"), "outside"),
        ("", "empty"),
    ],
)
def test_schema_answers_are_taken_literally(text, reason):
    with pytest.raises(MalformedAnswer, match=reason):
        schema_grades(text, NAMES, high=10)


def test_schema_is_strict_and_puts_the_reasoning_first():
    schema = grades_schema(NAMES, high=10)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert list(schema["properties"]) == schema["required"] == ["reasoning", *NAMES]
    assert schema["additionalProperties"] is False
    jsonschema.validate(json.loads(GOOD), schema)
    for bad in (GOOD.replace("7", "11"), GOOD.replace("7", "7.5"), GOOD.replace('"success": 7, ', "")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(bad), schema)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot grade this picture.", True),
        ("  I can't assist with that request.", True),
        ("I am unable to view the images.", True),
        ("Unfortunately, this picture breaks the rules.", True),
        ('I\'m sorry for the delay: {"success": 3}', False),
        ("The edit is sorry work.", False),
        ("I can see a cat.", False),
        ("", False),
    ],
)
def test_refusals_in_plain_words(text, refusal):
    assert is_refusal(text) is refusal


HOSTILE = (
    "{", "[", "{}", "}{", '{"', "{'", "\\", ",", "{, ", "9", "1e9", "0.1", " ", "<think>", "</think>", "<", "sorry ",
    '{"success": 7}', "{success}", '{"success": ', '{"success": [',
)  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
@pytest.mark.parametrize("frame", ["{}", '{{"success": {}}}', "'{}", "<think>{}"])
def test_a_hostile_answer_is_read_in_milliseconds(unit, frame):
    """It is read on the event loop, on which all other rewards and the sign of life wait meanwhile."""
    text = frame.format(unit * ((LONGEST_ANSWER - len(frame)) // len(unit)))
    began = time.process_time()
    for parse in (loose_grades, schema_grades):
        with contextlib.suppress(MalformedAnswer):
            parse(text, NAMES, high=10)
    is_refusal(text)
    assert time.process_time() - began < 0.25, "measured: .02 s at most"


@pytest.mark.parametrize("token", ["x", "<", "</think>", "<think>"])
def test_thoughts_of_many_tokens_are_skipped_in_one_pass(token):
    choices = tuple(TokenChoices(token, ()) for _ in range(100_000))
    began = time.process_time()
    without_thoughts(JudgeReply(Outcome.OK, "8", choices=choices))
    assert time.process_time() - began < 1.5, "quadratic: 3 s and more; in one pass .06 s"


def test_an_end_of_thoughts_may_be_cut_anyhow():
    for cuts in itertools.combinations(range(1, 10), 2):
        said = "a</think>7"
        parts = [said[a:b] for a, b in itertools.pairwise((0, *cuts, len(said)))]
        choices = tuple(TokenChoices(part, ()) for part in parts)
        found = without_thoughts(JudgeReply(Outcome.OK, said, choices=choices))
        assert found.text == "7" and "".join(c.token for c in found.choices) == ("7" if 9 in cuts else "")
