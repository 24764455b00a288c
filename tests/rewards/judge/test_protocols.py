"""The judge's protocols on scripted answers: what is asked, and what becomes of every reply."""

import asyncio
import itertools
import math

import pytest
from PIL import Image

from rewards.judge.messages import JudgeReply, Outcome, TokenChoices
from rewards.judge.protocols import LEAST_MASS, PROTOCOLS
from rewards.judge.questions import TASKS, Sample, judge_sample
from rewards.judge.template_files import load_template

SOURCE, RESULT = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
SAMPLES = {
    "edit": Sample("edit", "paint it blue", RESULT, SOURCE),
    "t2i": Sample("t2i", "a blue square", RESULT),
}
SC = {"edit": ("success", "preservation"), "t2i": ("content", "details")}
ROLES = {f"{name}/{task}": PROTOCOLS[name]().roles(task) for name in PROTOCOLS for task in TASKS}


class Script:
    """Answers by template name and ask from a dict; keeps the requests, and how many were open at once."""

    def __init__(self, replies):
        self.replies, self.requests, self.open, self.most_open = replies, [], 0, 0

    async def ask(self, request):
        self.requests.append(request)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0)
        self.open -= 1
        found = self.replies[request.template.removesuffix(".v1")]
        return found[min(request.ask, len(found) - 1)] if isinstance(found, list) else found


def run(name, script, task="edit", *, max_asks=2):
    protocol = PROTOCOLS[name]()
    templates = {role: load_template(role) for role in protocol.roles(task)}
    return asyncio.run(
        judge_sample(script, protocol, SAMPLES[task], templates, max_asks=max_asks, max_tokens=64)
    )


def ok(text, **more):
    return JudgeReply(Outcome.OK, text, model="snapshot-1", attempts=1, **more)


def grades(names, *values):
    body = ", ".join(f'"{name}": {value}' for name, value in zip(names, values, strict=True))
    return ok(f'{{"reasoning": "seen", {body}}}')


PQ = ("naturalness", "cleanness")


def viescore(task, sc, pq):
    return {f"viescore_{task}_sc": grades(SC[task], *sc), "viescore_pq": grades(PQ, *pq)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("sc", "pq", "score"),
    [
        ((8, 5), (9, 7), math.sqrt(5 * 7) / 10),
        ((10, 10), (10, 10), 1),
        ((0, 9), (9, 9), 0),
        ((9, 9), (4, 0), 0),
    ],
)
def test_viescore_is_the_root_of_two_least_grades(task, sc, pq, score):
    script = Script(viescore(task, sc, pq))
    judged = run("viescore", script, task)
    assert judged.outcome is Outcome.OK and judged.score == pytest.approx(score)
    assert judged.parts == {
        "sc": min(sc),
        "pq": min(pq),
        **dict(zip(SC[task], sc, strict=True)),
        **dict(zip(PQ, pq, strict=True)),
    }
    assert (judged.asks, judged.cached, judged.models) == (2, False, {"snapshot-1"})
    assert script.most_open == 2  # both questions at once


THOUGHTS = 'Perhaps {"success": 1, "preservation": 1, "naturalness": 1, "cleanness": 1}?'


@pytest.mark.parametrize("opened", ["<think>\n", ""])
def test_an_answer_is_what_follows_the_thoughts(opened):
    plain = viescore("edit", (8, 5), (9, 7))
    aloud = {name: ok(f"{opened}{THOUGHTS}\n</think>\n\n{reply.text}") for name, reply in plain.items()}
    judged = run("viescore", Script(aloud))
    assert judged.score == run("viescore", Script(plain)).score and judged.asks == 2
    unended = {name: ok(f"<think>{THOUGHTS} I cannot say") for name in plain}
    assert run("viescore", Script(unended), max_asks=1).outcome is Outcome.MALFORMED


def test_thoughts_in_an_answer_are_no_thoughts_before_it():
    said = '{"reasoning": "the sign reads </think>", "naturalness": 9, "cleanness": 7}'
    script = Script(viescore("edit", (8, 5), (9, 7)) | {"viescore_pq": ok(said)})
    assert run("viescore", script).parts["pq"] == 7


def test_a_digit_is_read_behind_the_thoughts():
    tokens = [token(text, [(text, 1.0)]) for text in ("<think>", "1", "</th", "ink>\n\n", "8")]
    reply = ok("<think>1</think>\n\n8", choices=tuple(tokens))
    assert run("expected_score", Script({"expected_score_edit": reply})).score == pytest.approx(8 / 9)


def test_viescore_requests():
    script = Script(viescore("edit", (8, 8), (8, 8)))
    run("viescore", script)
    sc, pq = script.requests
    assert [part for part in sc.parts if not isinstance(part, str)] == [SOURCE, RESULT]
    assert [part for part in pq.parts if not isinstance(part, str)] == [RESULT]
    assert (sc.template, pq.template) == ("viescore_edit_sc.v1", "viescore_pq.v1")
    assert sc.template_sha256 == load_template("viescore_edit_sc").sha256
    assert (sc.instruction, pq.instruction) == ("paint it blue", "")  # PQ is the same for every instruction
    assert any("paint it blue" in part for part in sc.parts if isinstance(part, str))
    assert all("paint it blue" not in part for part in pq.parts if isinstance(part, str))
    for request in (sc, pq):
        assert (request.max_tokens, request.response_schema, request.top_logprobs, request.ask) == (
            64,
            None,
            0,
            0,
        )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("values", [(8, 5, 9, 7), (10, 10, 10, 10), (1, 9, 0, 9)])
def test_structured_combines_as_viescore_does(task, values):
    script = Script({f"structured_{task}": grades((*SC[task], *PQ), *values)})
    judged = run("structured", script, task)
    assert judged.score == pytest.approx(math.sqrt(min(values[:2]) * min(values[2:])) / 10)
    assert (judged.parts["sc"], judged.parts["pq"]) == (min(values[:2]), min(values[2:]))
    (request,) = script.requests
    assert request.response_schema["required"] == ["reasoning", *SC[task], *PQ]
    shown = [part for part in request.parts if not isinstance(part, str)]
    assert shown == ([SOURCE, RESULT] if task == "edit" else [RESULT])


def token(text, alternatives):
    return TokenChoices(
        text, tuple((word, math.log(share) if share else -9999.0) for word, share in alternatives)
    )


def digits(*choices, outcome=Outcome.OK):
    text = "".join(choice.token for choice in choices) if outcome is Outcome.OK else ""
    return JudgeReply(outcome, text, choices=tuple(choices), model="snapshot-1")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("choices", "expected", "mass"),
    [
        ([token("7", [("7", 1.0)])], 7, 1),
        ([token("7", [("7", 0.5), ("8", 0.25), ("6", 0.25)])], 7, 1),
        ([token("9", [("9", 0.6), ("0", 0.2), ("I", 0.2)])], 6.75, 0.8),  # renormalised over digits
        ([token(" 7", [(" 7", 0.5), ("7", 0.25), ("8", 0.25)])], 7.25, 1),  # one digit, two tokens
        ([token("\n", [("\n", 1.0)]), token("3", [("3", 0.75), ("4", 0.25)])], 3.25, 1),
        ([token("3", [("3", 1.0)]), token("\n", [("\n", 1.0)])], 3, 1),
        ([token("3", [("3", 1.0)]), token(".", [(".", 1.0)])], 3, 1),
        # Neither 10 nor 95 nor a full-width 7 is a digit of the scale.
        ([token("1", [("1", 0.6), ("10", 0.2), ("95", 0.1), ("７", 0.1)])], 1, 0.6),
        ([token("7", [("7", 0.9), ("8", 0.0)])], 7, 0.9),
        ([token("7", [("7", LEAST_MASS)])], 7, LEAST_MASS),
    ],
)
def test_expected_score(task, choices, expected, mass):
    script = Script({f"expected_score_{task}": digits(*choices)})
    judged = run("expected_score", script, task)
    assert judged.score == pytest.approx(expected / 9)
    assert judged.parts["expected"] == pytest.approx(expected)
    assert judged.parts["digit_mass"] == pytest.approx(mass)
    assert script.requests[0].top_logprobs == 20


def test_expected_score_agrees_with_numpy_and_is_continuous():
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(50):
        share = rng.dirichlet(np.ones(10)) * rng.uniform(0.6, 1)
        script = Script({"expected_score_t2i": digits(token("5", [(str(d), share[d]) for d in range(10)]))})
        judged = run("expected_score", script, "t2i")
        mean = np.average(np.arange(10), weights=share)
        spread = np.sqrt(np.average((np.arange(10) - mean) ** 2, weights=share))
        assert judged.score == pytest.approx(mean / 9)
        assert judged.parts["spread"] == pytest.approx(spread)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (ok("7"), "without log-probs"),
        (digits(token("7", [("7", 0.4), ("The", 0.6)])), "only 0.400 of its probability on digits"),
        (digits(token("The", [("The", 0.3), ("7", 0.7)])), "does not begin with one digit"),
        (digits(token("10", [("10", 0.1), ("9", 0.9)])), "does not begin with one digit"),
        (digits(token("-", [("-", 1.0)]), token("3", [("3", 1.0)])), "does not begin with one digit"),
        (digits(token("1", [("1", 1.0)]), token("0", [("0", 1.0)])), "'10' is not one digit"),
        (digits(token("7", [("7", 1.0)]), token(".", []), token("5", [])), "'7.5' is not one digit"),
        (digits(token("7", [("7", 1.0)]), token(".5", [])), "'7.5' is not one digit"),
        (digits(token("\n", [("\n", 1.0)])), "does not begin with one digit"),
        (digits(token("7", [])), "only 0.000"),
        (digits(token("7", [("7", 0.9), ("7", 0.9)])), "sum to 1.8"),
        (digits(TokenChoices("7", (("7", math.nan),))), "log-probability nan"),
        (digits(TokenChoices("7", (("7", 0.5),))), "log-probability 0.5"),
    ],
)
def test_expected_score_refuses(reply, reason):
    judged = run("expected_score", Script({"expected_score_edit": reply}))
    assert (judged.outcome, judged.score, judged.parts) == (Outcome.MALFORMED, None, {})
    assert reason in judged.detail and "expected_score_edit.v1" in judged.detail


def test_a_cut_off_answer_still_has_its_first_digit():
    chatty = digits(token("7", [("7", 1.0)]), token(" because", []), outcome=Outcome.TRUNCATED)
    assert run("expected_score", Script({"expected_score_edit": chatty})).score == pytest.approx(7 / 9)
    cut = JudgeReply(Outcome.TRUNCATED, detail="64 tokens")
    assert run("expected_score", Script({"expected_score_edit": cut})).outcome is Outcome.TRUNCATED


def test_a_malformed_answer_is_asked_for_again_and_may_then_count():
    replies = viescore("edit", (8, 5), (9, 7))
    replies["viescore_edit_sc"] = [ok("eight or so"), replies["viescore_edit_sc"]]
    script = Script(replies)
    judged = run("viescore", script)
    assert judged.score == pytest.approx(math.sqrt(35) / 10)
    assert judged.asks == 3
    first, second = (request for request in script.requests if "_sc" in request.template)
    assert (first.ask, second.ask) == (0, 1)
    assert "could not be read" in second.parts[-1] and "could not be read" not in first.parts[-1]
    assert [p for p in second.parts if not isinstance(p, str)] == [SOURCE, RESULT]


@pytest.mark.parametrize("max_asks", [1, 2, 3])
def test_asks_are_bounded(max_asks):
    for reply in (
        ok('{"success": 11, "preservation": 3}'),
        JudgeReply(Outcome.MALFORMED, detail="no choices"),
    ):
        script = Script(viescore("edit", (8, 8), (9, 9)) | {"viescore_edit_sc": reply})
        judged = run("viescore", script, max_asks=max_asks)
        assert (judged.outcome, judged.score) == (Outcome.MALFORMED, None)
        assert judged.asks == max_asks + 1
        assert ("outside 0 to 10" if reply.text else "no choices") in judged.detail


FAILURES = [outcome for outcome in Outcome if outcome is not Outcome.OK]


@pytest.mark.parametrize("outcome", [outcome for outcome in FAILURES if outcome is not Outcome.MALFORMED])
@pytest.mark.parametrize("case", ROLES)
def test_no_failure_is_asked_again_or_becomes_a_number(case, outcome):
    name, task = case.split("/")
    script = Script({role: JudgeReply(outcome, detail="the reason") for role in ROLES[case]})
    judged = run(name, script, task, max_asks=3)
    assert (judged.outcome, judged.score, judged.parts) == (outcome, None, {})
    assert "the reason" in judged.detail
    assert len(script.requests) == len(ROLES[case])


@pytest.mark.parametrize("case", ROLES)
def test_a_refusal_in_plain_words_is_a_refusal(case):
    name, task = case.split("/")
    refusal = ok(
        "I'm sorry, I can't help with that.", choices=(token("I", [("I", 1.0)]), token("'m sorry", []))
    )
    script = Script(dict.fromkeys(ROLES[case], refusal))
    judged = run(name, script, task)
    assert (judged.outcome, judged.score, judged.asks) == (Outcome.REFUSED, None, len(ROLES[case]))


def test_the_graver_of_two_failures_is_named():
    gravity = list(Outcome)
    for sc, pq in itertools.product(FAILURES, FAILURES):
        script = Script(
            {"viescore_edit_sc": JudgeReply(sc, detail="a"), "viescore_pq": JudgeReply(pq, detail="b")}
        )
        judged = run("viescore", script, max_asks=1)
        assert judged.outcome is min(sc, pq, key=gravity.index)
    # What cannot be mended comes before what waiting mends, so that no retry is spent on a lost sample.
    assert gravity.index(Outcome.REFUSED) < gravity.index(Outcome.UNAVAILABLE)


def test_cached_only_when_all_was():
    replies = viescore("edit", (8, 8), (9, 9))
    both = {name: JudgeReply(Outcome.OK, reply.text, cached=True) for name, reply in replies.items()}
    assert run("viescore", Script(both)).cached
    assert not run("viescore", Script(replies | {"viescore_pq": both["viescore_pq"]})).cached


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", "paint", RESULT), "against its source picture, and this sample has none"),
        (("t2i", "paint", RESULT, SOURCE), "came with a source picture"),
        (("video", "paint", RESULT), "task is 'video'"),
        (("t2i", "  ", RESULT), "instruction is empty"),
    ],
)
def test_unsound_samples_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sample(*arguments)
