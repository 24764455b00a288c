"""Finding a reward by its name, and errors that say what is wrong and what to do."""

import subprocess
import sys

import pytest

from rewards.base import RewardLoadError, RewardSpec, reward_label
from rewards.loading import BUILTIN_REWARDS, load_reward, set_problems

KEYWORDS = "*, images, prompts, references, metadata"


def message(name, **settings):
    with pytest.raises(RewardLoadError) as raised:
        load_reward(RewardSpec(name, **settings))
    assert name in str(raised.value)
    return str(raised.value)


def test_a_function_in_a_file_gets_its_params_at_each_call(reward_file):
    path = reward_file(f"def brightness({KEYWORDS}, scale=1.0): return [scale]")
    loaded = load_reward(RewardSpec(f"{path}:brightness", params={"scale": 2.0}))
    assert loaded.function(images=[], prompts=[], references=[], metadata=[], **loaded.arguments) == [2.0]
    assert loaded.label == "brightness" and loaded.owner is None


def test_a_class_gets_its_params_when_it_is_made(reward_file):
    path = reward_file(
        f"""
        class Brightness:
            def __init__(self, scale=1.0):
                self.scale = scale
            def score(self, {KEYWORDS}):
                return [self.scale]
        """
    )
    loaded = load_reward(RewardSpec(f"{path}:Brightness", params={"scale": 2.0}))
    assert loaded.function(images=[], prompts=[], references=[], metadata=[], **loaded.arguments) == [2.0]
    assert loaded.owner.scale == 2.0


def test_a_function_in_a_package():
    loaded = load_reward(RewardSpec("recipes.examples.custom_reward:colourfulness"))
    assert loaded.label == "colourfulness" and loaded.source.path is None


def test_a_relative_path_is_taken_from_the_working_directory(reward_file, monkeypatch):
    path = reward_file(f"def reward({KEYWORDS}): return []")
    monkeypatch.chdir(path.parent)
    assert load_reward(RewardSpec(f"{path.name}:reward")).source.path == str(path)


def test_the_sha256_of_a_file_is_logged_and_follows_the_file(reward_file, caplog):
    caplog.set_level("INFO", logger="rewards.loading")
    path = reward_file(f"def reward({KEYWORDS}): return [1.0]")
    before = load_reward(RewardSpec(f"{path}:reward"))
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[
        0
    ]
    assert before.source.sha256 == expected and before.source.path == str(path)
    assert expected in caplog.text and str(path) in caplog.text
    reward_file(f"def reward({KEYWORDS}): return [2.0]")
    after = load_reward(RewardSpec(f"{path}:reward"))
    assert after.function(images=[], prompts=[], references=[], metadata=[]) == [2.0]
    assert after.source.sha256 != expected


def test_two_rewards_of_one_file_share_its_module(reward_file):
    path = reward_file(f"state = []\ndef a({KEYWORDS}): return state\ndef b({KEYWORDS}): return state")
    a, b = (load_reward(RewardSpec(f"{path}:{name}")).function for name in "ab")
    assert a.__globals__["state"] is b.__globals__["state"]


def test_a_dataclass_with_annotations_as_text_works_in_a_reward_file(reward_file):
    path = reward_file(
        f"""
        from dataclasses import dataclass
        @dataclass
        class Reward:
            scale: "float" = 1.0
            def score(self, {KEYWORDS}): return [self.scale]
        """
    )
    assert load_reward(RewardSpec(f"{path}:Reward")).owner.scale == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("geneval_shape", "did you mean 'geneval_shapes'"),
        ("something", "path/to/file.py:function"),
        ("no_such_folder/file.py:reward", "No such file or directory; give a path that every node has"),
        ("no_such_package.rewards:reward", "is the package installed"),
        ("rewards.base:no_such", "rewards.base has no 'no_such'"),
        ("rewards.base:ON_MISSING", "is a tuple; name a function or a class"),
        ("rewards.base:RewardErrror", "it has RewardError"),
    ],
)
def test_a_reference_that_leads_nowhere_names_the_way_out(name, expected):
    assert expected in message(name)


def test_the_message_for_an_unknown_name_lists_every_built_in_name():
    assert all(name in message("unknown") for name in BUILTIN_REWARDS)


def test_a_file_without_the_function(reward_file):
    path = reward_file(f"def brightness({KEYWORDS}): return []")
    assert f"{path} has no 'brightnes'; it has brightness" in message(f"{path}:brightnes")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def broken(:", "SyntaxError"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package' (FILE:3)"),
        ("raise SystemExit('no key')", "SystemExit: no key (FILE:3)"),
    ],
)
def test_a_file_that_does_not_run_names_the_line(reward_file, code, expected):
    path = reward_file(code)
    for _ in range(2):  # a failed module must not be found half made the second time
        assert expected.replace("FILE", str(path)) in message(f"{path}:reward")


@pytest.mark.parametrize(
    ("code", "params", "expected"),
    [
        (
            "def reward(images): return []",
            {},
            "does not take images, prompts, references, metadata by keyword",
        ),
        ("def reward(a, b, c, d, /): return []", {}, "by keyword"),
        (f"def reward({KEYWORDS}, threshold): return []", {}, "missing a required argument: 'threshold'"),
        (f"def reward({KEYWORDS}, threshold): return []", {"treshold": 1}, "treshold=1"),
        (f"def reward({KEYWORDS}): return []", {"prompts": 1}, "params may not hold ['prompts']"),
        ("class reward: pass", {}, "neither `score` nor `__call__`"),
        ("class reward:\n    score = 3", {}, "neither `score` nor `__call__`"),
        (f"class reward:\n    def score(self, {KEYWORDS}): pass", {"scale": 1}, "constructor"),
        ("class reward:\n    def score(self, images): pass", {}, "reward.score"),
        ("class reward:\n    def __init__(self): raise OSError('no weights')", {}, "OSError: no weights"),
    ],
)
def test_a_signature_that_does_not_fit(reward_file, code, params, expected):
    assert expected in message(f"{reward_file(code)}:reward", params=params)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": float("nan")},
        {"timeout_s": 0.0},
        {"attempts": 0},
        {"on_missing": "ignore"},
        {"constant_steps": -1},
        {"max_missing_share": 1.5},
        {"label": "a/b"},
    ],
)
def test_a_value_out_of_range_names_the_key_and_the_value(settings):
    (key, value), text = *settings.items(), message("geneval_shapes", **settings)
    assert key in text and str(value) in text


def test_all_values_out_of_range_are_named_at_once():
    assert len(message("geneval_shapes", attempts=0, timeout_s=-1.0).splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("geneval_shapes", None, "geneval_shapes"),
        ("package.module:reward", None, "reward"),
        ("path/to/file.py:reward", None, "reward"),
        ("path/to/file.py:reward", "mine", "mine"),
    ],
)
def test_the_label_is_the_tail_of_the_name_unless_given(name, label, expected):
    assert reward_label(RewardSpec(name, label=label)) == expected


def test_two_rewards_under_one_label_are_refused():
    spec = RewardSpec("recipes.examples.custom_reward:colourfulness")
    assert set_problems([spec, RewardSpec(spec.name, label="other")]) == []
    (problem,) = set_problems([spec, spec])
    assert "label 'colourfulness' is used 2 times" in problem


@pytest.mark.parametrize("specs", [[], [RewardSpec("geneval_shapes", weight=0.0)]])
def test_a_set_that_trains_on_nothing_is_refused(specs):
    assert set_problems(specs) == ["no reward has a weight other than 0; give at least one"]


def test_loading_and_scoring_need_neither_torch_nor_ray():
    code = (
        "import sys, rewards.loading, rewards.checks, rewards.scoring, rewards.monitor; "
        "from rewards.base import RewardSpec; "
        "rewards.loading.load_reward(RewardSpec('recipes.examples.custom_reward:Restraint')); "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
