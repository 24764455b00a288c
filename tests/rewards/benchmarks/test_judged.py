"""The benchmarks' rewards by a judge: what is asked, what is read, and what an unreadable answer becomes."""

import asyncio
import json
import math
import re

import pytest
from PIL import Image

from rewards.base import FatalRewardError, RetryableRewardError, RewardLoadError, RewardSpec
from rewards.benchmarks import dpg
from rewards.benchmarks.imgedit import GRADES, TYPES
from rewards.benchmarks.judged import DPGQuestions, GEditGrades, ImgEditGrades
from rewards.judge.messages import JudgeReply, Outcome
from rewards.loading import load_reward
from tests.fakes.judge_plays import SNAPSHOT, Play
from tests.fakes.judge_server import JudgeServer, pixels_sha256

QUESTIONS = [
    {"id": 1, "text": "Is there a cup?", "parents": [], "category": "entity - whole", "row": 0},
    {"id": 2, "text": "Is the cup red?", "parents": [1], "category": "attribute - color", "row": 1},
]


def reward(kind, client=None, **params):
    found = kind(model="some-judge", base_url="http://127.0.0.1:9/v1", api_key_env=None, **params)
    if client is not None:
        found._client = found._silence._asker = client
    return found


class Script:
    """Answers by the grey level of the judged picture and the text: the first entry that fits."""

    def __init__(self, *entries):
        self.entries, self.requests = entries, []

    async def ask(self, request):
        self.requests.append(request)
        pictures = [part for part in request.parts if not isinstance(part, str)]
        text = "\n".join(part for part in request.parts if isinstance(part, str))
        for level, pattern, answer in self.entries:
            if level in (None, pictures[-1].getpixel((0, 0))[0]) and re.search(pattern, text):
                if isinstance(answer, Outcome):
                    return JudgeReply(answer, detail="the reason")
                return JudgeReply(Outcome.OK, answer, model="judge-1")
        raise AssertionError(text)


def grey(level, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def score(found, images, prompts=None, references=None, metadata=None):
    count = len(images)
    return asyncio.run(
        found.score(
            images=images,
            prompts=prompts or ["make it red"] * count,
            references=references or [[]] * count,
            metadata=metadata or [{}] * count,
        )
    )


def grades(**values):
    return json.dumps({"reasoning": "seen", **values})


def test_gedit_asks_by_viescore_and_keeps_sc_and_pq():
    client = Script(
        (10, "success", grades(success=7, preservation=4)),
        (10, "naturalness", grades(naturalness=9, cleanness=5)),
        (20, "success", Outcome.REFUSED),
        (20, "naturalness", grades(naturalness=9, cleanness=9)),
    )
    found = score(reward(GEditGrades, client), [grey(10), grey(20)], references=[[grey(1)], [grey(1)]])
    assert found.scores == [pytest.approx(math.sqrt(4 * 5) / 10), None]
    assert found.components["sc"] == [4, None] and found.components["pq"] == [5, None]
    assert found.components["answered_by.judge-1"] == [1.0, 1.0]
    assert found.components["ended.refused"] == [None, 1.0]


def test_gedit_shows_the_edit_at_the_size_of_its_source():
    client = Script((None, "", grades(success=5, preservation=5, naturalness=5, cleanness=5)))
    score(reward(GEditGrades, client), [grey(10, (8, 8))], references=[[grey(1, (12, 6))]])
    shown = [part.size for request in client.requests for part in request.parts if not isinstance(part, str)]
    assert shown == [(12, 6)] * 3


def test_imgedit_asks_once_by_the_criteria_of_the_type():
    client = Script((None, "", grades(adherence=4, quality=3, preservation=2)))
    found = score(
        reward(ImgEditGrades, client),
        [grey(10), grey(20)],
        references=[[grey(1)]] * 2,
        metadata=[{"edit_type": "add"}, {"edit_type": "extract"}],
    )
    assert found.scores == [pytest.approx((3 - 1) / 4)] * 2
    assert [found.components[name] for name in GRADES] == [[4, 4], [3, 3], [2, 2]]
    texts = ["".join(p for p in request.parts if isinstance(p, str)) for request in client.requests]
    assert "the thing that was asked for is there" in texts[0] and "lifted out" not in texts[0]
    assert "lifted out and stands on a plain background" in texts[1]
    assert all("{criteria}" not in text and "make it red" in text for text in texts)
    assert client.requests[0].template_sha256 != client.requests[1].template_sha256


def test_imgedit_has_criteria_for_every_type_and_every_grade():
    templates = reward(ImgEditGrades).templates
    assert list(templates) == list(TYPES)
    for template in templates.values():
        assert all(re.search(rf"^{name}: \w+", template.user, re.MULTILINE) for name in GRADES)
    assert len({template.sha256 for template in templates.values()}) == len(TYPES)


@pytest.mark.parametrize(
    "answer", [grades(adherence=0, quality=3, preservation=3), grades(adherence=3.5, quality=3, preservation=3),
               grades(adherence=6, quality=3, preservation=3), grades(adherence=3, quality=3), "fine"],
)  # fmt: skip
def test_imgedit_takes_whole_grades_from_1_to_5_and_nothing_else(answer):
    client = Script((None, "", answer))
    found = score(
        reward(ImgEditGrades, client), [grey(10)], references=[[grey(1)]], metadata=[{"edit_type": "add"}]
    )
    assert found.scores == [None]
    assert len(client.requests) == 2, "asked again once"
    assert found.components["ended.malformed"] == [1.0]


def test_imgedit_needs_to_know_the_type():
    with pytest.raises(ValueError, match="edit_type: None is not one of add"):
        score(reward(ImgEditGrades), [grey(10)], references=[[grey(1)]])


def test_dpg_asks_every_question_by_itself_and_keeps_each_answer():
    client = Script(
        (10, "cup red", "no"),
        (10, "there a cup", "Yes."),
        (20, "there a cup", "No, I see none"),
        (20, "", "yes"),
    )
    images = [grey(10), grey(20)]
    found = score(reward(DPGQuestions, client), images, metadata=[{"questions": QUESTIONS}] * 2)
    assert found.scores == [0.5, 0.0]
    assert found.components["q1"] == [1.0, 0.0] and found.components["q2"] == [0.0, 1.0]
    assert {request.instruction for request in client.requests} == {"Is there a cup?", "Is the cup red?"}
    assert all(request.template == "dpg_question.v1" for request in client.requests)


def test_dpg_keeps_what_was_answered_where_the_rest_leaves_the_picture_open():
    client = Script((None, "cup red", Outcome.FILTERED), (10, "", "yes"), (20, "", "no"))
    found = score(reward(DPGQuestions, client), [grey(10), grey(20)], metadata=[{"questions": QUESTIONS}] * 2)
    assert found.scores == [None, 0.0], "under a no the other answer does not matter"
    assert found.components["q1"] == [1.0, 0.0] and "q2" not in found.components
    assert found.components["ended.filtered"] == [1.0, 1.0]


@pytest.mark.parametrize("answer", ["maybe", "It does: yes", "Yes, and no", "", "not sure"])
def test_dpg_takes_yes_or_no_at_the_beginning_and_nothing_else(answer):
    client = Script((None, "", answer))
    found = score(reward(DPGQuestions, client), [grey(10)], metadata=[{"questions": QUESTIONS[:1]}])
    assert found.scores == [None]
    assert len(client.requests) == 2


def test_failures_that_no_call_can_mend_stop_the_run_and_outages_are_tried_again():
    for outcome, error in ((Outcome.FATAL, FatalRewardError), (Outcome.UNAVAILABLE, RetryableRewardError)):
        client = Script((None, "", outcome))
        with pytest.raises(error, match="some-judge at http://127.0.0.1:9/v1: .*the reason"):
            score(reward(DPGQuestions, client), [grey(10)], metadata=[{"questions": QUESTIONS}])
    client = Script((10, "", Outcome.TIMEOUT), (20, "", "yes"))
    found = score(reward(DPGQuestions, client), [grey(10), grey(20)], metadata=[{"questions": QUESTIONS}] * 2)
    assert found.scores == [None, 1.0], "what was scored is kept"


def test_wrong_parameters_are_refused_when_the_reward_is_loaded():
    for params, message in (
        ({}, "model is not set"),
        ({"model": "x", "modle": "y"}, "parameter .modle. is not known; did you mean .mode.[?]"),
        ({"model": "x", "max_asks": 0}, "max_asks is 0"),
    ):
        with pytest.raises(RewardLoadError, match=message):
            load_reward(RewardSpec("rewards.benchmarks.judged:GEditGrades", params=params))
    assert reward(DPGQuestions, concurrency=0).check() != []
    assert reward(DPGQuestions).check() == []


@pytest.mark.parametrize("kind", [GEditGrades, ImgEditGrades, DPGQuestions])
def test_estimates_say_calls_and_money(kind):
    task = "t2i" if kind is DPGQuestions else "edit"
    lines = kind(model="gpt-4.1", api_key_env=None).estimate(images=10, task=task, height=512, width=512)
    calls = {
        GEditGrades: "20 calls (2 per image)",
        ImgEditGrades: "10 calls (1 per",
        DPGQuestions: "140 calls (14 per",
    }
    assert calls[kind] in lines[0]


def test_over_http_the_snapshot_is_kept_and_the_cache_answers_the_second_time(tmp_path):
    def answer(images, text):
        return grades(adherence=5, quality=4, preservation=3)

    cache = str(tmp_path / "answers.sqlite")
    with JudgeServer([Play("overloaded", headers={"retry-after": "0"})], score=answer) as server:
        params = {"model": "m", "base_url": server.base_url, "api_key_env": None, "cache": cache}
        for _ in range(2):
            found = score(
                ImgEditGrades(**params), [grey(10)], references=[[grey(1)]], metadata=[{"edit_type": "add"}]
            )
            assert found.scores == [0.75]
            assert found.components[f"answered_by.{SNAPSHOT}"] == [1.0]
        assert [record.play for record in server.records] == ["overloaded", "ok"]
        assert server.records[1].images == (pixels_sha256(grey(1)), pixels_sha256(grey(10)))
        assert asyncio.run(ImgEditGrades(**params | {"cache": None}).readiness()) == []
    problems = asyncio.run(ImgEditGrades(**params | {"cache": None, "attempts": 1}).readiness())
    assert len(problems) == 1 and "a trial question ended unavailable" in problems[0]


def test_a_broken_graph_is_scored_by_its_answers_alone():
    broken = [QUESTIONS[0] | {"parents": [9]}]
    client = Script((None, "", "yes"))
    found = score(reward(DPGQuestions, client), [grey(10)], metadata=[{"questions": broken}])
    assert found.scores == [1.0]
    with pytest.raises(KeyError):
        dpg.image_score(dpg.questions_of({"questions": broken}), {1: 1.0})
