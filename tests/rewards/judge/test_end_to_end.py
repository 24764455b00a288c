"""The reward `judge` over real HTTP, as a recipe loads it, against a server that judges by pixels and misbehaves."""

import asyncio

import pytest
from PIL import Image

from rewards.base import FatalRewardError, RetryableRewardError, RewardOutput, RewardSpec
from rewards.calling import RewardBatch
from rewards.judge.budget import most_of
from rewards.judge.judge import FAILURES
from rewards.judge.protocols import VieScore
from rewards.judge.questions import Sample
from rewards.judge.template_files import load_template
from rewards.loading import LoadedReward, load_reward
from rewards.scoring import score_group
from tests.fakes.judge_plays import SNAPSHOT, Play
from tests.fakes.judge_server import JudgeServer, brightness, pixels_sha256

GREYS = (25, 102, 178, 255)
PROTOCOLS = ("viescore", "structured", "expected_score")
QUESTIONS = {"viescore": 2, "structured": 1, "expected_score": 1}


def batch(task="edit"):
    """Result k has its own grey; every source is blue."""
    sources = [Image.new("RGB", (16, 12), "blue")] if task == "edit" else []
    return RewardBatch(
        images=[Image.new("RGB", (16, 12), (grey, grey, grey)) for grey in GREYS],
        prompts=["make it grey"] * len(GREYS),
        references=[sources] * len(GREYS),
        metadata=[{}] * len(GREYS),
    )


def load(server, protocol="viescore", **params) -> LoadedReward:
    settings = {"model": "pixels", "base_url": server.base_url, "api_key_env": None, "attempts": 1}
    return load_reward(RewardSpec("judge", params={"protocol": protocol, **settings, **params}))


def run(loaded: LoadedReward, given: RewardBatch | None = None) -> RewardOutput:
    async def call():
        try:
            return await loaded.owner.score(**(given or batch()).keywords(sources=False))
        finally:
            await loaded.owner._client.close()

    return asyncio.run(call())


def expected(protocol):
    """Grades are tenths of the brightness, rounded; the expected digit is 9 times the brightness, exactly."""
    shares = [brightness([image], "") for image in batch().images]
    return shares if protocol == "expected_score" else [round(10 * share) / 10 for share in shares]


@pytest.mark.parametrize("task", ["edit", "t2i"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pixels_become_scores_and_requests_have_the_form_of_the_protocol(protocol, task):
    with JudgeServer() as server:
        output = run(load(server, protocol), batch(task))
    assert output.scores == pytest.approx(expected(protocol))
    assert len(server.records) == QUESTIONS[protocol] * len(GREYS)
    source = pixels_sha256(Image.new("RGB", (16, 12), "blue"))
    results = {pixels_sha256(image) for image in batch().images}
    for record in server.records:
        alone = task == "t2i" or "make it grey" not in record.text  # PQ sees neither source nor instruction
        assert record.images[:-1] == (() if alone else (source,))
        assert record.images[-1] in results
        assert record.mimes == record.magics == ("image/png",) * len(record.images)
        assert record.parts[0] == record.parts[-1] == "text"
        assert ("response_format" in record.arguments) == (protocol == "structured")
        assert record.arguments.get("top_logprobs") == (20 if protocol == "expected_score" else None)
        if protocol == "structured":
            form = record.arguments["response_format"]["json_schema"]
            assert form["strict"] and list(form["schema"]["properties"])[0] == "reasoning"


WRAPPED = ("fenced", "prose", "single_quotes", "trailing_comma")
ENDS = {
    "out_of_range": "malformed",
    "nan": "malformed",
    "nonsense": "malformed",
    "empty": "malformed",
    "refusal": "refused",
    "filtered": "filtered",
    "filtered_400": "filtered",
    "truncated": "truncated",
}


@pytest.mark.parametrize("kind", [*WRAPPED, *ENDS])
def test_every_way_to_answer_ends_as_it_should(kind):
    with JudgeServer([Play(kind, times=0)]) as server:
        outputs = {protocol: run(load(server, protocol)) for protocol in ("viescore", "structured")}
    requests = 0
    for protocol, output in outputs.items():
        outcome = ENDS.get(kind, "ok" if protocol == "viescore" else "malformed")
        assert output.scores == (pytest.approx(expected(protocol)) if outcome == "ok" else [None] * 4)
        counts = {name.value: sum(output.components[name.value]) for name in FAILURES}
        assert counts == dict.fromkeys(counts, 0) | ({} if outcome == "ok" else {outcome: 4})
        requests += (2 if outcome == "malformed" else 1) * QUESTIONS[protocol] * len(GREYS)
    assert len(server.records) == requests


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        ("truncated_whole", "ok"),  # its first token was all that was asked for
        ("nonsense", "malformed"),
        ("out_of_range", "ok"),  # the play changes JSON grades; a digit cannot be out of range
        ("refusal", "refused"),
        ("filtered", "filtered"),
    ],
)
def test_expected_score_ends_as_it_should(kind, outcome):
    with JudgeServer([Play(kind, times=0)]) as server:
        output = run(load(server, "expected_score"))
    assert output.scores == (pytest.approx(expected("expected_score")) if outcome == "ok" else [None] * 4)
    assert outcome == "ok" or output.components[outcome] == [1] * 4


def test_a_malformed_answer_is_asked_again_and_then_counts():
    with JudgeServer([Play("nan", times=3)]) as server:
        output = run(load(server))
    assert output.scores == pytest.approx(expected("viescore"))
    assert sum(output.components["asks"]) == len(server.records) == 8 + 3
    assert sum("could not be read" in record.text for record in server.records) == 3


@pytest.mark.parametrize("kind", ["unauthorized", "not_found", "quota", "bad_request"])
def test_a_hopeless_answer_stops_the_run_and_names_the_endpoint(kind):
    with JudgeServer([Play(kind)]) as server, pytest.raises(FatalRewardError) as caught:
        run(load(server))
    assert server.base_url in str(caught.value) and "pixels" in str(caught.value)


@pytest.mark.parametrize("kind", ["error_500", "overloaded", "reset", "rate_limited", "not_json"])
def test_an_endpoint_in_trouble_is_called_again(kind):
    with JudgeServer([Play(kind, times=0)]) as server:
        with pytest.raises(RetryableRewardError, match="4 of 4 samples got no answer") as caught:
            run(load(server))
        assert server.base_url in str(caught.value)


def test_a_slow_endpoint_is_called_again():
    slow = Play("slow", times=0, seconds=1)
    with JudgeServer([slow]) as server, pytest.raises(RetryableRewardError, match="timeout"):
        run(load(server, timeout_s=0.2))


def test_a_repeated_call_pays_only_for_what_is_open():
    """Without a cache file: what was answered before the outage is remembered by the client."""
    with JudgeServer([Play("error_500", when="make it grey", times=4)]) as server:
        loaded = load(server)

        async def no_wait(seconds):
            return None

        group = asyncio.run(score_group(0, [loaded], batch(), sleep=no_wait))
    assert group.rewards == pytest.approx(expected("viescore"))
    assert group.attempts == {"judge": 2}
    assert len(server.records) == 8 + 4  # four quality grades and four failures, then the four open questions


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_second_run_with_the_cache_asks_nothing_and_scores_the_same(protocol, tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    plays = [Play("nonsense"), Play("refusal")]
    with JudgeServer(plays) as server:
        first = run(load(server, protocol, cache=cache, mode="record"))
        asked = len(server.records)
    assert None in first.scores and asked
    replayed = load(server, protocol, cache=cache, mode="replay")  # the server is gone
    assert replayed.owner.check() == []
    second = run(replayed)
    assert second.scores == first.scores
    assert second.components["refused"] == first.components["refused"]
    assert second.components["cached"] == [1] * 4
    with JudgeServer() as server:
        live = run(load(server, protocol, cache=cache))
    assert len(server.records) == 1  # the refusal alone is asked again
    assert None not in live.scores


def test_another_template_is_another_question(tmp_path):
    cache, own = str(tmp_path / "answers.sqlite"), tmp_path / "own.txt"
    own.write_text("[user]\n{result}\nnaturalness - how natural\ncleanness - how clean\n[again]\nAgain\n")
    with JudgeServer() as server:
        run(load(server, cache=cache))
        asked = len(server.records)
        output = run(load(server, cache=cache, templates={"viescore_pq": str(own)}))
    assert len(server.records) == asked + len(GREYS)
    assert output.scores == pytest.approx(expected("viescore"))


def test_readiness_over_http(caplog):
    with JudgeServer() as server:
        assert asyncio.run(load(server).owner.readiness()) == []
        caplog.set_level("INFO")
        run(load(server))
    assert f"answered by the snapshot {SNAPSHOT}" in caplog.text
    (problem,) = asyncio.run(load(server).owner.readiness())  # the server is gone
    assert server.base_url in problem and "unavailable" in problem


def source_question():
    given = batch()
    sample = Sample("edit", given.prompts[0], given.images[0], given.references[0][0])
    templates = {role: load_template(role) for role in VieScore().roles("edit")}
    return VieScore().questions(sample, templates, VieScore.max_tokens)[0]


def test_a_budget_stops_the_run_and_a_larger_one_resumes_it(tmp_path):
    files = {"cache": str(tmp_path / "answers.sqlite")}
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 1.0}
    with JudgeServer() as server:
        # Room for one question at a time, each billed 120 tokens, so that the fourth is one too many.
        reserved = sum(most_of(load(server).owner.settings, source_question().request(0)))
        tight = load(server, **files, **prices, max_total_tokens=reserved + 250, concurrency=1)
        with pytest.raises(FatalRewardError, match="max_total_tokens"):
            run(tight)
        paid = len(server.records)
        assert 0 < paid < 8
        output = run(load(server, **files, **prices, max_total_tokens=1_000_000))
    assert output.scores == pytest.approx(expected("viescore"))
    assert len(server.records) == 8  # what was paid for is not asked again
