"""One name for every command; what recipes say and since where; what a machine lacks, with the way out."""

import socket
from pathlib import Path

import pytest

from rl.door import doctor
from rl.door.__main__ import COMMANDS, main
from rl.door.recipes import PAPER, compare, leaves
from tests.fakes.tiny_run import tiny_recipe

FAST = "recipes/pdtr_sd35m_kontext_fast.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


def test_no_command_and_an_unknown_one_are_told_what_there_is(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "no command 'trian'" in said and all(f"  {name} " in said for name in COMMANDS)


def test_packaged_recipes_are_listed_with_their_evidence(capsys):
    assert main(["recipes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(FAST)
    assert lines[at + 1].strip().startswith("PDTR on UniPic2-SD3.5M-Kontext with branching groups")
    assert lines[at + 2].strip().startswith("evidence: untested at full size")


def test_every_value_is_shown_with_who_set_it(capsys):
    assert main(["recipes", "show", FAST, "learner.kl_beta=0.1", "stages[0].steps=7"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["learner.kl_beta"] == ["0.1", "override"]
    assert rows["stages[0].steps"] == ["7", "override"]
    assert rows["stages[0].task"] == ["edit", PAPER]
    assert rows["rollout.branch"] == ["True", FAST]
    assert rows["learner.ranks"] == ["8", PAPER]
    assert rows["learner.cfg_gradient"] == ["conditional", "default"]


def test_the_fast_recipe_differs_from_the_papers_in_what_its_header_says():
    header, *rows = compare(FAST, PAPER)
    assert header.split() == [FAST, PAPER]
    assert [row.split() for row in rows] == [
        ["name", "pdtr-sd35m-kontext-fast", "pdtr-sd35m-kontext"], ["rollout.window_size", "1", "0"],
        ["rollout.window_last", "5", "10"], ["rollout.branch", "True", "False"],
        ["learner.micro_batch_size", "32", "8"], ["learner.old_log_prob", "replay", "rollout"],
    ]  # fmt: skip
    assert compare(PAPER, PAPER)[1:] == []


def test_a_recipe_that_cannot_be_read_is_refused(capsys):
    assert main(["recipes", "show", "absent.yaml"]) == 2
    assert main(["recipes", "diff", FAST, "absent.yaml"]) == 2
    assert capsys.readouterr().err.count("absent.yaml does not exist") == 2


def test_leaves_name_places_as_overrides_do():
    assert leaves({"a": {"b": [{"c": 1}, {"c": 2}]}, "d": [1, 2], "e": {}}) == {
        "a.b[0].c": 1, "a.b[1].c": 2, "d": [1, 2], "e": {},
    }  # fmt: skip


def found(capsys, *arguments: str) -> tuple[int, list[str]]:
    code = main(["doctor", *arguments])
    return code, capsys.readouterr().out.splitlines()


def test_a_recipe_that_can_run_here_is_told_with_its_command(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = str(tiny_recipe(tmp_path))
    code, lines = found(capsys, recipe, "name=x")
    assert code == 0 and lines[-1] == f"ok    {recipe} can run here: python -m rl.train {recipe} name=x"
    assert any(line.startswith("ok    torch ") for line in lines)


def test_what_a_recipe_lacks_is_told_with_the_way_out(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = str(tiny_recipe(tmp_path))
    code, lines = found(
        capsys, recipe, "resources.device=cuda", "resources.rollout_cpus=4000", "model.path=/absent"
    )
    assert code == 1
    failed = [line for line in lines if line.startswith("FAIL")]
    assert any("model.path: /absent: no such model folder; download or build" in line for line in failed)
    assert any(
        "the plan needs 1 GPUs and this machine has 0: join a cluster" in line for line in failed
    ) or any(line.startswith("ok    card") for line in lines)
    assert any("CPUs and this machine has" in line and "lower resources" in line for line in failed)
    code, lines = found(capsys, recipe, "learner.kl_bta=1")
    assert code == 1 and "learner.kl_beta" in lines[-1]


def test_an_address_where_no_ray_is_and_missing_packages(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert f"ok    RAY_ADDRESS=127.0.0.1:{port}" in found(capsys)[1]
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_extra": "judge"})
    code, lines = found(capsys)
    assert code == 1
    assert "FAIL  no_such_package is missing: make setup" in lines
    assert any(line.startswith("note  no_such_extra is missing: only the extra 'judge'") for line in lines)
    assert any(line.startswith("FAIL  RAY_ADDRESS=") and "nothing listens there" in line for line in lines)
