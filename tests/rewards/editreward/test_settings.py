"""The constants saved with a model: how outputs become a reward, and what is refused."""

import dataclasses
import json
import statistics

import pytest

from rewards.editreward.settings import FILE, EditRewardSettings, SettingsError, load_settings

SETTINGS = EditRewardSettings(
    dimensions=("a", "b", "c"),
    means=(5.0, 6.0, 7.0),
    stds=(2.0, 1.0, 0.5),
    score_low=0.0,
    score_high=10.0,
    combine="mean",
    view="full",
    rubric="Do {instruction} now",
    chat_template="{{ messages }}",
    add_generation_prompt=True,
    min_pixels=3136,
    max_pixels=12544,
    token_pixels=28,
)


@pytest.mark.parametrize("rule", ["mean", "min", "geometric_mean"])
def test_outputs_become_label_units_then_one_number_then_a_share_of_the_scale(rule):
    settings = dataclasses.replace(SETTINGS, combine=rule)
    assert settings.label_units([1.0, -2.0, 0.5]) == [7.0, 4.0, 7.25]
    expected = {
        "mean": (7 + 4 + 7.25) / 3,
        "min": 4.0,
        "geometric_mean": statistics.geometric_mean([7, 4, 7.25]),
    }[rule]
    assert settings.score([1.0, -2.0, 0.5]) == pytest.approx(expected)
    assert settings.reward([1.0, -2.0, 0.5]) == pytest.approx(expected / 10)
    assert settings.reward([9.0, 9.0, 9.0]) == 1.0
    with pytest.raises(SettingsError, match="2 outputs for 3 dimensions"):
        settings.score([1.0, 2.0])


def test_a_geometric_mean_takes_a_negative_prediction_for_zero():
    settings = dataclasses.replace(SETTINGS, combine="geometric_mean")
    assert settings.score([-9.0, 0.0, 0.0]) == 0.0


def test_braces_of_an_instruction_stay_as_they_are():
    assert SETTINGS.text("write {x} {instruction}") == "Do write {x} {instruction} now"


def test_the_file_gives_the_same_settings_back(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(SETTINGS.to_json()))
    assert load_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(EditRewardSettings)] + ["format"])
def test_a_missing_constant_is_refused(tmp_path, key):
    record = SETTINGS.to_json()
    del record[key]
    (tmp_path / FILE).write_text(json.dumps(record))
    with pytest.raises(SettingsError, match=f"{key}.*export the model again"):
        load_settings(tmp_path)


def test_a_folder_without_constants_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="without its constants scores mean nothing"):
        load_settings(tmp_path)
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(SettingsError, match="expected a JSON object"):
        load_settings(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(SETTINGS.to_json() | {"temperature": 1}))
    with pytest.raises(SettingsError, match="unknown keys .*temperature"):
        load_settings(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": ()}, "dimensions is empty"),
        ({"dimensions": ("a", "a", "b")}, "repeats"),
        ({"means": (1.0,)}, "one number for each of 3"),
        ({"means": (1.0, float("nan"), 1.0)}, "finite"),
        ({"stds": (1.0, 0.0, 1.0)}, "above 0"),
        ({"score_low": 10.0}, "is empty"),
        ({"combine": "median"}, "not one of mean, min, geometric_mean"),
        ({"combine": "geometric_mean", "score_low": -1.0}, "never negative"),
        ({"view": "source"}, "not one of full, result"),
        ({"rubric": "no place for it"}, "once"),
        ({"view": "result"}, "not at all"),
        ({"chat_template": ""}, "chat_template is empty"),
        ({"min_pixels": 20000}, "is no range"),
    ],
)
def test_constants_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(SETTINGS, **change)
