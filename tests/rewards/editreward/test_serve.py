"""`serve`: folders that vLLM cannot serve. How servers are supervised and placed is in tests/core/test_servers.py.

The command with a real vLLM, killed in mid-run, is in `test_client.py`: a server takes most of a minute.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.files import COMPLETE
from rewards.editreward.model_folder import ModelFolderError
from rewards.editreward.serve.checks import _ASK as ASK
from rewards.editreward.serve.checks import check_model, engine_problems
from tests.fakes.forked_workers import WorkerServer
from tests.fakes.tiny_editreward import make_tiny_editreward

ROOT = Path(__file__).resolve().parents[3]

# ---- folders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_editreward(tmp_path_factory.mktemp("editreward") / "model")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"] = weights.pop("language_model.score.weight")
    save_file(weights, path)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda f: change_json(f / "config.json", architectures=["Qwen2_5_VLForConditionalGeneration"]),
        "not ['Qwen2_5_VLForSequenceClassification']",
    ),
    "num_labels": (lambda f: change_json(f / "config.json", num_labels=1), "num_labels is 1"),
    "no head": (rename_head, "language_model.score.weight"),
    "no constants": (lambda f: (f / "editreward.json").unlink(), "editreward.json does not exist"),
    "other constants": (lambda f: change_json(f / "editreward.json", stds=[1.0, 1.0, 1.0]), "changed"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 200_000), "weight file is not whole"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "unfinished copy": (lambda f: (f / COMPLETE).unlink(), f"no {COMPLETE} file"),
    "dtype": (lambda f: change_json(f / "config.json", dtype="float8_e4m3fn"), "dtype is 'float8_e4m3fn'"),
    "other model": (
        lambda f: change_json(f / "config.json", model_type="qwen3_vl"),
        "model_type is 'qwen3_vl'",
    ),
}


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_a_folder_that_vllm_cannot_serve_is_refused_by_what_is_wrong(
    folder: Path, tmp_path: Path, fault: str
) -> None:
    spoil, said = BAD_FOLDERS[fault]
    bad = shutil.copytree(folder, tmp_path / "bad")
    spoil(bad)
    with pytest.raises(ModelFolderError) as caught:
        check_model(bad)
    assert any(said in problem and str(bad) in problem for problem in caught.value.problems)


@pytest.mark.vllm
def test_a_head_size_that_vllm_refuses_is_found_by_asking_it(
    folder: Path, vllm_forks: WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in vllm_forks.commands(ASK).items():
        monkeypatch.setenv(name, value)
    card, facts = check_model(folder)
    assert engine_problems(card, facts, tensor_parallel=1) == []
    (problem,) = engine_problems(card, replace(facts, head_size=16), tensor_parallel=1)
    assert "attention heads of size 16, which this vLLM refuses" in problem and " 64," in problem


def test_cards_must_share_out_the_attention_heads(folder: Path) -> None:
    card, facts = check_model(folder)
    seven_b = replace(facts, attention_heads=28, key_value_heads=4, head_size=128)
    for cards, fine in ((1, True), (2, True), (4, True), (7, False), (8, False), (3, False)):
        problems = engine_problems(card, seven_b, tensor_parallel=cards)
        assert (not problems) == fine, (cards, problems)


# ---- the command line -------------------------------------------------------------------------------------


def test_the_command_line_refuses_a_bad_folder_and_says_why(folder: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    change_json(bad / "config.json", num_labels=2)
    command = [sys.executable, "-m", "rewards.editreward", "serve", str(bad)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Cannot serve:" in done.stderr and "num_labels is 2" in done.stderr
    assert "Traceback" not in done.stderr
