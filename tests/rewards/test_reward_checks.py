"""A reward is tried before a run depends on it, and every problem is told at once."""

import pytest

from core.prompts import Prompt
from rewards import checks
from rewards.base import RewardSet, RewardSpec, ServiceSpec
from rewards.checks import check_rewards

KEYWORDS = "*, images, prompts, references, metadata"


def reward_set(path, task="t2i", attribute="reward", **settings):
    example = {key: settings.pop(key) for key in ("example_prompt", "example_metadata") if key in settings}
    return RewardSet("stage/x", task, [RewardSpec(f"{path}:{attribute}", **settings)], **example)


@pytest.mark.parametrize("prefix", ["", "async "])
@pytest.mark.parametrize(("task", "count"), [("t2i", 0), ("edit", 1)])
def test_the_dry_call_looks_like_the_task(reward_file, prefix, task, count, caplog):
    caplog.set_level("INFO", logger="rewards.checks")
    path = reward_file(
        f"""
        {prefix}def reward({KEYWORDS}):
            assert len(images) == len(prompts) == len(references) == len(metadata) == 2
            assert all(image.mode == "RGB" for image in images)
            assert [[r.mode for r in pictures] for pictures in references] == [["RGB"] * {count}] * 2
            assert prompts[0] == "two cats" and metadata[0] == {{"tag": "counting"}}
            return [None, 1.0]
        """
    )
    rewards = reward_set(path, task, example_prompt="two cats", example_metadata={"tag": "counting"})
    assert check_rewards(rewards) == []
    assert "reward reward, tried: no score for a grey gradient, 1 for plain red" in caplog.text


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return [1.0]", "returned 1 scores for 2 images"),
        ("return ['a', 'b']", "returned 'a'"),
        ("return metadata[0]['missing']", "the dry call raised KeyError: 'missing' (FILE:3)"),
        ("time.sleep(0.5)", "longer than timeout_s 0.05"),
        ("raise FatalRewardError('no key')", "no key"),
    ],
)
def test_a_dry_call_that_fails_is_a_problem(reward_file, body, expected):
    path = reward_file(f"def reward({KEYWORDS}): {body}")
    (problem,) = check_rewards(reward_set(path, timeout_s=0.05))
    assert expected.replace("FILE", str(path)) in problem


def test_every_problem_of_a_set_is_told(reward_file):
    path = reward_file(f"def reward({KEYWORDS}): return []")
    specs = [RewardSpec(name) for name in (f"{path}:absent", f"{path}:reward", "nothing", f"{path}:reward")]
    problems = check_rewards(RewardSet("s", "t2i", specs))
    assert [
        part in problem
        for part, problem in zip(
            ["used 2 times", "absent", "returned 0 scores", "not built in", "returned 0 scores"],
            problems,
            strict=True,
        )
    ] == [True] * 5


PROMPTS = [
    Prompt(i, "t2i", f"p{i}", metadata={"k": "x" if i in (20, 33) else 1}, origin=f"a:{i}") for i in range(40)
]


def test_the_metadata_of_every_prompt_are_tried_and_the_bad_ones_named(reward_file):
    path = reward_file(f"def reward({KEYWORDS}): return [1 + m.get('k', 1) for m in metadata]")
    problems = check_rewards(reward_set(path), prompts=PROMPTS)
    assert [problem.split(" raised ")[0] for problem in problems] == [
        f"a:{i}: reward 'reward': the dry call" for i in (20, 33)
    ]
    always = reward_file(
        f"def reward({KEYWORDS}): return [{{}}[m['k']] if m else 0 for m in metadata]", name="b.py"
    )
    *named, rest = check_rewards(reward_set(always), prompts=PROMPTS)
    assert len(named) == checks.NAMED and rest == "reward 'reward': and 35 prompts more"


def test_a_reward_with_a_check_of_metadata_is_not_called(reward_file):
    path = reward_file(
        f"""
        class reward:
            def check(self): return []
            def check_metadata(self, metadata):
                if metadata["k"] == "x": raise ValueError("metadata.k: 'x' is no number")
            def score(self, {KEYWORDS}): raise AssertionError
        """
    )
    assert check_rewards(reward_set(path), prompts=PROMPTS) == [
        f"a:{i}: reward 'reward': metadata.k: 'x' is no number" for i in (20, 33)
    ]


@pytest.mark.parametrize(
    ("code", "taken"),
    [
        (f"def reward({KEYWORDS}): return [len(r) / 1 for r in references]", None),
        (f"def reward({KEYWORDS}): return [0.5] * len(images)\nreward.most_references = 2", 2),
        (f"class reward:\n    most_references = 1\n    def score(self, {KEYWORDS}): return [0.5] * len(images)", 1),
        ("class reward:\n    most_references = 1\n    def check(self): return []\n"
         f"    def score(self, {KEYWORDS}): raise AssertionError", 1),
    ],
)  # fmt: skip
def test_more_references_than_a_reward_takes_are_refused_by_line(reward_file, code, taken):
    prompts = [Prompt(i, "edit", "p", ("a.png",) * n, origin=f"a:{i}") for i, n in enumerate((1, 2, 3))]
    found = check_rewards(reward_set(reward_file(code), "edit"), prompts=prompts)
    assert [problem.split(";")[0] for problem in found] == [
        f"a:{i}: {i + 1} references, and reward 'reward' takes at most {taken}"
        for i in range(3)
        if taken is not None and i + 1 > taken
    ]


@pytest.mark.parametrize("name", ["editreward", "judge"])
def test_builtin_rewards_that_take_one_reference_say_so_behind_a_service_too(name):
    spec = RewardSpec(name, service=ServiceSpec(("http://127.0.0.1:9",)))
    prompts = [Prompt(0, "edit", "p", ("a.png", "b.png"), origin="a:7")]
    (problem,) = check_rewards(RewardSet("s", "edit", [spec]), prompts=prompts)
    assert problem.startswith(f"a:7: 2 references, and reward {name!r} takes at most 1; ")


def test_what_cannot_be_tried_in_time_is_said(reward_file, monkeypatch, caplog):
    monkeypatch.setattr(checks, "TRIES_S", 0.0)
    path = reward_file(f"def reward({KEYWORDS}): return [1.0] * len(images)")
    assert check_rewards(reward_set(path), prompts=PROMPTS) == []
    assert "the metadata of 0 of 40 prompts were tried in 0 s" in caplog.text


def test_metadata_that_no_service_can_be_sent(monkeypatch):
    spec = RewardSpec("x.py:reward", service=ServiceSpec(("http://127.0.0.1:9",)))
    prompts = [Prompt(0, "t2i", "p", metadata={"k": float("nan")}, origin="a:7")]
    (problem,) = check_rewards(RewardSet("s", "t2i", [spec]), prompts=prompts)
    assert problem.startswith("a:7: reward 'reward': Out of range float values are not JSON compliant")


SERVED = f"""
    class reward:
        def __init__(self, url="", up=True):
            self.url, self.up = url, up
        def check(self):
            return [] if self.url else ["url is empty; give the address of the server"]
        PREFIXdef readiness(self):
            return [] if self.up else [f"no answer from {{self.url}}"]
        def score(self, {KEYWORDS}):
            raise AssertionError("a served reward is not called to try it")
"""


@pytest.mark.parametrize("prefix", ["", "async "])
def test_a_served_reward_is_asked_for_its_configuration_and_probed_on_demand(reward_file, prefix):
    path = reward_file(SERVED.replace("PREFIX", prefix))
    down = reward_set(path, params={"url": "http://judge", "up": False})
    assert check_rewards(down) == []
    assert check_rewards(down, probe=True) == ["reward 'reward': no answer from http://judge"]
    assert check_rewards(reward_set(path, params={"url": "http://judge"}), probe=True) == []
    unset = check_rewards(reward_set(path), probe=True)
    assert unset == ["reward 'reward': url is empty; give the address of the server"]


def test_a_probe_that_raises_is_a_problem(reward_file):
    path = reward_file(
        "class reward:\n    def readiness(self): raise OSError('refused')\n    def score(self, **_): 0"
    )
    (problem,) = check_rewards(reward_set(path), probe=True)
    assert "its check or readiness raised OSError: refused" in problem
