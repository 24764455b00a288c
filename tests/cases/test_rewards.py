"""Rewards that break the protocol are refused by name before a run; odd ones that keep it are called as they are."""

import ast

import httpx
import pytest

from rewards.base import FatalRewardError, RewardSet, RewardSpec
from rewards.checks import check_rewards
from rewards.service.faults import Away, read_answer, read_output
from tests.cases.conftest import CASES

FILE = CASES / "rewards" / "odd.py"
BAD = {
    "swapped": "function(prompts, images) does not take images, prompts, references, metadata by keyword",
    "positional": "'images' parameter is positional only",
    "kw_only_other": "missing a required argument: 'image'",
    "Swaps2": "Swaps2.__call__(pictures, texts, **kw) does not take",
    "string": "returned '0.5'; a score is a number, or None when not scored",
    "numpy0d": "returned a float; return a list of 2 numbers",
    "column": "returned [0.5]; a score is a number",
    "gen": "returned a generator; return a list of 2 numbers",
    "dct": "returned a dict; return a list of 2 numbers",
    "bigint": "OverflowError: int too large to convert to float",
    "cplx": "returned 1j; a score is a number",
    "none": "returned a NoneType; return a list of 2 numbers",
    "exits": "the reward tried to end the process: SystemExit(3)",
    "kbd": "the reward tried to end the process: KeyboardInterrupt()",
    "tuplescore": "returned [0.5, 0.5]; a score is a number",
    "stopiter": "StopIteration",
    "recursion": "RecursionError: maximum recursion depth exceeded",
    "slow": "took longer than timeout_s 0.3; speed it up or allow more time",
    "asyngen": "returned a async_generator; return a list of 2 numbers",
    "decimal": "returned Decimal('0.5'); a score is a number",
    "absent": "has no 'absent'",
}
GOOD = {"swapped_kw", "Swaps", "boolean", "nan", "huge", "mutates", "prints", "asyn", "fraction"}
NAMES = {
    "geneval_shapez": "is not built in: did you mean 'geneval_shapes'?",
    "/absent/r.py:score": "cannot read /absent/r.py",
    "no.such.module:score": "cannot import no.such.module",
    f"{CASES}/prompts/bom.jsonl:x": "cannot import",
    f"{FILE}:FILE": "has no 'FILE'",
    f"{FILE}:np": "is a module; name a function or a class",
    ":x": "is not built in",
}


def problems(name: str) -> list[str]:
    return check_rewards(RewardSet("s", "t2i", [RewardSpec(name, timeout_s=0.3)]))


def test_no_case_is_forgotten():
    defined = {node.name for node in ast.parse(FILE.read_text()).body if hasattr(node, "name")}
    assert defined == (BAD.keys() | GOOD) - {"absent"}


@pytest.mark.parametrize("name", BAD)
def test_a_reward_is_refused_by_its_name(name):
    (problem,) = problems(f"{FILE}:{name}")
    assert BAD[name] in problem and name in problem


@pytest.mark.parametrize("name", sorted(GOOD))
def test_an_odd_reward_that_keeps_the_protocol_is_taken(name):
    assert problems(f"{FILE}:{name}") == []


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_nowhere(name):
    (problem,) = problems(name)
    assert problem.startswith(f"reward {name!r}") and NAMES[name] in problem


URL = "http://judge:8100"
PAGE = b"<html>gateway says no</html>"
ANSWERS = {
    "page": (200, PAGE, Away, "no JSON"),
    "empty": (200, b"", Away, "no JSON"),
    "half": (200, b'{"scores": [0.2', Away, "no JSON"),
    "deep": (200, b"[" * 100_000, Away, "no JSON"),
    "404": (404, PAGE, FatalRewardError, "is the URL right?"),
    "408": (408, PAGE, Away, "HTTP 408"),
    "425": (425, PAGE, Away, "HTTP 425"),
    "429": (429, PAGE, Away, "HTTP 429"),
    "502": (502, PAGE, Away, "HTTP 502"),
    "no scores": (200, b'{"components": {}}', FatalRewardError, "scores must be a list"),
    "no components": (200, b'{"scores": [1.0]}', FatalRewardError, "scores and components are missing"),
    "text": (200, b'{"scores": ["1"], "components": {}}', FatalRewardError, "a score is a number, null"),
    "bigint": (
        200,
        b'{"scores": [1%s], "components": {}}' % (b"0" * 400),
        FatalRewardError,
        "no float can hold",
    ),
    "list": (200, b"[0.5, 0.5]", FatalRewardError, "scores and components are missing"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_becomes_no_score(name):
    status, body, kind, expected = ANSWERS[name]
    with pytest.raises(kind) as caught:
        read_output(read_answer(httpx.Response(status, content=body), URL), URL)
    assert expected in str(caught.value)


def test_missing_scores_of_a_service_stay_missing():
    body = b'{"scores": [null, "nan", "-inf", 0.5], "components": {"c": [1, 2, 3, null]}, "sha256": "s"}'
    output, _ = read_output(read_answer(httpx.Response(200, content=body), URL), URL)
    assert [repr(score) for score in output.scores] == ["None", "nan", "-inf", "0.5"]
    assert output.components == {"c": [1.0, 2.0, 3.0, None]}
