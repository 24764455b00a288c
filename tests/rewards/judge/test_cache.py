"""The cache: what makes two questions the same, what is kept, replay without a network, files that are refused."""

import dataclasses
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import rewards.judge.cache as cache_module
from rewards.judge.cache import KEPT_IN_MEMORY, FileAnswers, MemoryAnswers, identify
from rewards.judge.client import JudgeClient
from rewards.judge.messages import JudgeReply, Outcome, TokenChoices
from rewards.judge.settings import JudgeSettings
from rewards.judge.store import StoreError
from tests.fakes.judge_plays import SNAPSHOT, Play
from tests.fakes.judge_questions import ask, picture, question, settings_for
from tests.fakes.judge_server import JudgeServer

ROOT = Path(__file__).resolve().parents[3]
BASE = JudgeSettings("judge")
NOBODY = "http://127.0.0.1:9/v1"


def turned(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_180)


CHANGES = {
    "model": (dataclasses.replace(BASE, model="other"), {}),
    "temperature": (dataclasses.replace(BASE, temperature=0.1), {}),
    "no temperature": (dataclasses.replace(BASE, temperature=None), {}),
    "seed": (dataclasses.replace(BASE, seed=7), {}),
    "image format": (dataclasses.replace(BASE, image_format="jpeg"), {}),
    "image detail": (dataclasses.replace(BASE, image_detail="low"), {}),
    "template": (BASE, {"template": "test.v2"}),
    "template hash": (BASE, {"template_sha256": "cd" * 32}),
    "system": (BASE, {"system": "You are kind."}),
    "text": (BASE, {"parts": ("content - how many", picture())}),
    "pixel": (BASE, {"parts": ("content - how much", picture(129))}),
    "turned": (BASE, {"parts": ("content - how much", turned(picture()))}),
    "shape": (BASE, {"parts": ("content - how much", picture(size=(12, 16)))}),
    "mode": (BASE, {"parts": ("content - how much", picture().convert("L"))}),
    "order": (BASE, {"parts": (picture(), "content - how much")}),
    "one more": (BASE, {"parts": ("content - how much", picture(), picture())}),
    "instruction": (BASE, {"instruction": "a blue square"}),
    "max_tokens": (BASE, {"max_tokens": 65}),
    "schema": (BASE, {"response_schema": {"type": "object"}}),
    "top_logprobs": (BASE, {"top_logprobs": 5}),
    "ask": (BASE, {"ask": 1}),
}


def test_everything_that_shapes_an_answer_changes_the_key() -> None:
    keys = {
        name: identify(settings, question(**changes)).key for name, (settings, changes) in CHANGES.items()
    }
    keys["base"] = identify(BASE, question()).key
    assert len(set(keys.values())) == len(keys)


def test_the_keys_of_stored_answers_stay_what_they_were() -> None:
    """Another hash would make every cache that exists worthless."""
    settings = JudgeSettings("judge", temperature=None, seed=3, image_format="jpeg")
    schema, parts = {"b": 1, "a": [1]}, (picture(3), "x", picture(4))
    asked = question(parts=parts, system="", response_schema=schema, top_logprobs=4, ask=2)
    keys = identify(BASE, question()).key, identify(settings, asked).key
    assert keys == (
        "a418afcf0cf3a002e1145872a2f90d17a32cb4f266e1598d560a2b4efa06540e",
        "d769449183b296205009fefdb172390ab30e89e2216047a0b3661c58c0bbfcd2",
    )


def test_how_it_is_asked_does_not_change_the_key() -> None:
    moved = dataclasses.replace(
        BASE, base_url="http://elsewhere/v1", api_key_env=None, concurrency=1, timeout_s=1.0, mode="record",
        cache="x", attempts=9, requests_per_minute=3,
    )  # fmt: skip
    assert identify(moved, question()).key == identify(BASE, question()).key
    one = {"type": "object", "title": "t"}
    other = dict(reversed(one.items()))
    assert (
        identify(BASE, question(response_schema=one)).key
        == identify(BASE, question(response_schema=other)).key
    )


def test_two_cut_texts_are_not_one_text() -> None:
    assert identify(BASE, question(parts=("ab", "c"))).key != identify(BASE, question(parts=("a", "bc"))).key


@pytest.mark.parametrize("mode", ["live", "record"])
def test_the_second_run_asks_nothing_and_hears_the_same(tmp_path, mode) -> None:
    texts = [f"content - how {number}" for number in range(5)]
    asked = [question(text, top_logprobs=2) for text in texts]
    with JudgeServer() as server:
        settings = settings_for(server, cache=str(tmp_path / "deep" / "answers.sqlite"), mode=mode)
        first, second = ask(settings, *asked), ask(settings, *asked)
        assert len(server.records) == 5
    for before, after in zip(first, second, strict=True):
        assert before.outcome is Outcome.OK and before.choices and before.model == SNAPSHOT
        assert after == dataclasses.replace(
            before, attempts=0, prompt_tokens=0, completion_tokens=0, cached=True
        )


def test_answers_of_another_endpoint_are_used_with_a_warning(tmp_path, caplog) -> None:
    """The judge has moved, or another model is served under its name: nobody but the user knows."""
    cache = str(tmp_path / "answers.sqlite")
    with JudgeServer() as first, JudgeServer() as second:
        ask(settings_for(first, cache=cache), question())
        ask(settings_for(first, cache=cache, base_url=[second.base_url, first.base_url]), question())
        assert "another cache" not in caplog.text
        for _ in range(2):
            caplog.clear()
            ask(settings_for(second, cache=cache), question())
            assert f"at {second.base_url}: the answers in {cache} are of {first.base_url}" in caplog.text
        caplog.clear()
        ask(settings_for(second, cache=cache, mode="replay"), question())
        ask(settings_for(second, cache=cache, model="other"), question())
        assert not caplog.text and len(second.records) == 1


def test_a_run_is_replayed_without_server_and_key(tmp_path, monkeypatch) -> None:
    """Failures replay as they were recorded; a failure that was later mended replays as the answer."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    cache = str(tmp_path / "answers.sqlite")
    good, refused, mended = (
        question("content - how a"),
        question("content - how b"),
        question("content - how c"),
    )
    plays = [Play("refusal", when="how b", times=0), Play("error_500", when="how c", times=2)]
    with JudgeServer(plays) as server:
        settings = settings_for(server, cache=cache, mode="record", attempts=2)
        recorded = ask(settings, good, refused, mended)
        assert [r.outcome for r in recorded] == [Outcome.OK, Outcome.REFUSED, Outcome.UNAVAILABLE]
        assert ask(settings, mended)[0].outcome is Outcome.OK
        asked_before = len(server.records)
    replay = JudgeSettings("judge", NOBODY, "NO_SUCH_KEY", mode="replay", cache=cache)
    assert JudgeClient(replay).problems() == []
    replayed = ask(replay, good, refused, mended)
    assert [r.outcome for r in replayed] == [Outcome.OK, Outcome.REFUSED, Outcome.OK]
    assert replayed[0].text == recorded[0].text and replayed[1].detail == recorded[1].detail
    assert all(reply.cached and reply.attempts == 0 for reply in replayed)
    assert len(server.records) == asked_before


def test_a_miss_in_replay_is_fatal_and_says_what_was_asked(tmp_path) -> None:
    cache = str(tmp_path / "answers.sqlite")
    with JudgeServer() as server:
        ask(settings_for(server, cache=cache), question())
    missing = question(instruction="a green square")
    (reply,) = ask(JudgeSettings("judge", NOBODY, mode="replay", cache=cache), missing)
    assert (reply.outcome, reply.text, reply.attempts) == (Outcome.FATAL, "", 0)
    digest = identify(BASE, missing).images[0]
    for part in (cache, "judge", "test.v1", "a green square", digest[:12], "mode record"):
        assert part in reply.detail


def test_replay_never_makes_a_file(tmp_path) -> None:
    cache = tmp_path / "none.sqlite"
    settings = JudgeSettings("judge", NOBODY, mode="replay", cache=str(cache))
    assert "no such file" in JudgeClient(settings).problems()[0]
    assert ask(settings, question())[0].outcome is Outcome.FATAL
    assert not cache.exists()


@pytest.mark.parametrize("mode", ["live", "record"])
@pytest.mark.parametrize(
    "kind", ["refusal", "filtered", "truncated", "empty", "rate_limited", "error_500", "quota"]
)
def test_a_failure_is_asked_again(tmp_path, mode, kind) -> None:
    with JudgeServer([Play(kind)]) as server:
        settings = settings_for(server, cache=str(tmp_path / "a.sqlite"), mode=mode, attempts=1)
        assert ask(settings, question())[0].outcome is not Outcome.OK
        assert ask(settings, question())[0].outcome is Outcome.OK
        assert len(server.records) == 2


def test_an_answer_read_from_log_probabilities_is_kept_though_cut_off(tmp_path) -> None:
    with JudgeServer([Play("truncated_whole", content="8", times=0)]) as server:
        settings = settings_for(server, cache=str(tmp_path / "a.sqlite"))
        asked = question(top_logprobs=3)
        (first,), (second,) = ask(settings, asked), ask(settings, asked)
        assert len(server.records) == 1
    assert (second.outcome, second.choices, second.cached) == (Outcome.TRUNCATED, first.choices, True)


def test_without_a_file_the_last_answers_are_kept_in_memory() -> None:
    kept = MemoryAnswers()
    questions = [
        dataclasses.replace(identify(BASE, question()), key=str(number))
        for number in range(KEPT_IN_MEMORY + 1)
    ]
    for number, one in enumerate(questions):
        kept.put(one, JudgeReply(Outcome.OK, str(number)))
        kept.get(questions[0])
    assert kept.get(questions[1]) is None, "the one used longest ago went"
    assert kept.get(questions[0]) == JudgeReply(Outcome.OK, "0")


def test_answers_in_memory_bear_many_threads(monkeypatch) -> None:
    monkeypatch.setattr(cache_module, "KEPT_IN_MEMORY", 2)
    kept, base = MemoryAnswers(), identify(BASE, question())
    questions = [dataclasses.replace(base, key=str(number)) for number in range(4)]

    def work(first: int) -> None:
        for number in range(20_000):
            one = questions[(first + number) % 4]
            kept.put(one, JudgeReply(Outcome.OK, one.key))
            found = kept.get(one)
            assert found is None or found.text == one.key

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


WRITE = """
import dataclasses, sys
from rewards.judge.cache import FileAnswers, identify
from rewards.judge.messages import JudgeReply, Outcome
from rewards.judge.settings import JudgeSettings
from tests.fakes.judge_questions import question
answers, base = FileAnswers(sys.argv[1], read_only=False), identify(JudgeSettings("judge"), question())
for number in range(60):
    one = dataclasses.replace(base, key=str(number))
    answers.put(one, JudgeReply(Outcome.OK, sys.argv[2]))
    assert answers.get(one).text in ("one", "two")
"""


def test_two_processes_write_one_file_and_the_first_answer_stays(tmp_path) -> None:
    path = str(tmp_path / "answers.sqlite")
    names = ["one", "two"]
    workers = [subprocess.Popen([sys.executable, "-c", WRITE, path, name], cwd=ROOT) for name in names]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    answers, base = FileAnswers(path, read_only=True), identify(BASE, question())
    for number in range(60):
        one = dataclasses.replace(base, key=str(number))
        before = answers.get(one)
        assert before is not None and before.text in names
        FileAnswers(path, read_only=False).put(one, JudgeReply(Outcome.OK, "three"))
        assert answers.get(one) == before


def test_a_row_says_where_its_score_came_from(tmp_path) -> None:
    path = str(tmp_path / "answers.sqlite")
    reply = JudgeReply(
        Outcome.OK, "8", choices=(TokenChoices("8", (("8", -0.1), ("7", -2.0))),), model=SNAPSHOT,
        prompt_tokens=9, completion_tokens=1, attempts=2,
    )  # fmt: skip
    answers, asked = FileAnswers(path, read_only=False), identify(BASE, question())
    answers.put(asked, reply)
    assert answers.get(asked) == reply
    row = sqlite3.connect(path).execute(
        "SELECT model, snapshot, template, template_sha256, instruction, images, answered_at > 1.7e9 FROM answers"
    )
    assert row.fetchall() == [
        ("judge", SNAPSHOT, "test.v1", "ab" * 32, "a red square", f'["{asked.images[0]}"]', 1)
    ]


def damage(path: Path, kind: str) -> None:
    if kind == "foreign file":
        path.write_bytes(b"not a database, but long enough to have been one" * 40)
    elif kind == "foreign database":
        sqlite3.connect(path).execute("CREATE TABLE other (x)")
    else:
        answers = FileAnswers(str(path), read_only=False)
        for number in range(15):
            one = dataclasses.replace(identify(BASE, question()), key=str(number))
            answers.put(one, JudgeReply(Outcome.OK, "x" * 3000))
        answers.close()
        content = path.read_bytes()
        if kind == "other version":
            sqlite3.connect(path).execute("PRAGMA user_version = 99")
        elif kind == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:5000] + bytes(20000) + content[25000:])


@pytest.mark.parametrize("mode", ["live", "replay"])
@pytest.mark.parametrize("kind", ["foreign file", "foreign database", "other version", "truncated", "zeroed"])
def test_a_file_that_cannot_be_trusted_is_refused_by_name(tmp_path, mode, kind) -> None:
    path = tmp_path / "answers.sqlite"
    damage(path, kind)
    settings = JudgeSettings("judge", NOBODY, None, mode=mode, cache=str(path))
    (problem,) = JudgeClient(settings).problems()
    assert str(path) in problem and "give another path" in problem
    (reply,) = ask(settings, question())
    assert (reply.outcome, reply.text, reply.attempts) == (Outcome.FATAL, "", 0)
    assert str(path) in reply.detail


def test_a_place_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    answers = FileAnswers(str(tmp_path / "file" / "answers.sqlite"), read_only=False)
    with pytest.raises(StoreError, match="cannot be made"):
        answers.check()
