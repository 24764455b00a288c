"""The folder check, which dry runs rely on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.components import load_scheduler, load_transformer, save_component
from models.folders import PARTS, check_model_folder


@pytest.fixture
def copy(tmp_path: Path, folder: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_a_whole_folder_has_no_problem(folder: Path) -> None:
    assert check_model_folder(folder) == []
    assert load_scheduler(folder).config.shift == 3.0


def test_every_problem_is_reported_at_once(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder_3")
    (copy / "vae" / "config.json").write_text("{")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "tokenizer_2" / "tokenizer.json").unlink()
    (copy / "scheduler" / "scheduler_config.json").unlink()
    problems = check_model_folder(copy)
    for part in ("text_encoder_3: missing", "vae/config.json: not readable", "transformer: no *.safetensors",
                 "tokenizer_2: no tokenizer file", "scheduler_config.json: missing"):  # fmt: skip
        assert sum(part in problem for problem in problems) == 1, problems
    assert len(problems) == 5
    assert check_model_folder(copy, ("text_encoder", "tokenizer")) == []
    with pytest.raises(FileNotFoundError, match=r"transformer: no \*\.safetensors"):
        load_transformer(copy, dtype=torch.float32)


def test_missing_shards_are_named(copy: Path) -> None:
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    (copy / "transformer" / "part-1.safetensors").touch()
    problems = check_model_folder(copy)
    assert len(problems) == 1 and "part-2.safetensors: weight shard" in problems[0]
    index.write_text("[]")
    assert "not a readable weight index" in check_model_folder(copy)[0]


def test_an_absent_folder_is_one_problem(tmp_path: Path) -> None:
    problems = check_model_folder(tmp_path / "absent")
    assert len(problems) == 1 and "no such model folder" in problems[0]


def test_checking_needs_no_torch() -> None:
    program = (
        "import sys; import models, models.folders, models.preflight, models.lora.targets, models.sd35_medium; "
        "heavy = {'torch', 'transformers', 'diffusers', 'peft', 'numpy'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"a dry run would load {result.stderr}"


def test_saving_replaces_a_part_whole(copy: Path) -> None:
    stale = copy / "transformer" / "stale.safetensors"
    stale.touch()
    transformer = load_transformer(copy, dtype=torch.float32)
    save_component(transformer, copy / "transformer")
    assert not stale.exists()
    assert sorted(path.name for path in copy.iterdir()) == sorted(PARTS)
    modes = {path.stat().st_mode for path in (copy / "transformer").iterdir()}
    assert len(modes) == 1, "weights must be readable by whoever can read the config"
