"""What a run reads, by content: what changed is refused or named, what is the same is the same whatever its name."""

import logging
from importlib.metadata import version

import pytest

from core.failures import ClusterError
from core.inputs import (
    Inputs,
    check_files,
    compare_inputs,
    folder_files,
    hash_files,
    hash_together,
    software,
    stamp_files,
)
from core.recipe import ConfigError

BEFORE = Inputs({"prompts a": "1" * 64, "base": "2" * 64}, {"torch": "2.13"})


def test_nothing_changed_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        assert compare_inputs(BEFORE, BEFORE, step=3, accept=False) == []
    assert not caplog.text


def test_what_is_held_is_refused_each_by_its_name():
    now = Inputs({"prompts a": "3" * 64, "base": "4" * 64}, BEFORE.told)
    with pytest.raises(ConfigError) as caught:
        compare_inputs(BEFORE, now, step=3, accept=False)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "base changed since step 3, from 222222222222 to 444444444444",
        "prompts a changed since step 3, from 111111111111 to 333333333333",
    ]
    assert "--accept-changes" in str(caught.value)
    lines = compare_inputs(BEFORE, now, step=3, accept=True)
    assert len(lines) == 2 and all(line.endswith("accepted by --accept-changes") for line in lines)


def test_what_is_told_goes_on_and_is_in_the_log(caplog):
    now = Inputs({"prompts a": "1" * 64, "code b": "5"}, {"torch": "2.14"})
    assert compare_inputs(BEFORE, now, step=3, accept=False) == [
        "torch changed since step 3, from 2.13 to 2.14", "code b: new since step 3", "base: gone since step 3",
    ]  # fmt: skip
    assert "from 2.13 to 2.14" in caplog.text


def test_an_old_checkpoint_is_a_remark(caplog):
    assert compare_inputs(Inputs.read({"step": 3}), BEFORE, step=3, accept=False) == []
    assert "the checkpoint of step 3 does not say what its run read" in caplog.text


def test_files_together_are_their_names_and_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            (tmp_path / folder / name).write_text(name)
    files = {folder: [tmp_path / folder / name for name in "xy"] for folder in "ab"}
    first = hash_together(files["a"], tmp_path / "a")
    assert first == hash_together(reversed(files["b"]), tmp_path / "b")
    stamp = stamp_files(files["a"])
    files["a"][0].write_text("z")
    assert first != hash_together(files["a"], tmp_path / "a") and stamp != stamp_files(files["a"])


def test_a_node_with_other_weights_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "model.safetensors"
    weights.write_text("one")
    (tmp_path / "vae" / ".cache").write_text("")
    held = hash_files(folder_files("model.path", tmp_path))
    assert list(held) == ["model.path/vae/model.safetensors"]
    weights.write_text("two")
    with pytest.raises(
        ClusterError, match=r"other bytes than the driver in .* \(model.path/vae/model.safetensors\)"
    ):
        check_files(held, "model.path", tmp_path, ("vae",))
    check_files(held, "model.path", tmp_path, ("transformer",))
    check_files({}, "model.path", tmp_path)


def test_software_names_versions_and_the_sources():
    found = software()
    assert found["torch"] == version("torch") and found["this package"].endswith(")")
