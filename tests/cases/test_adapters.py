"""`models.generate` refuses an adapter that it cannot use: exit code 2, the folder and the reason, and no picture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.generate.__main__ import main
from models.lora.attach import adapter_state, attach_lora
from models.lora.files import PEFT_CONFIG, PEFT_WEIGHTS, save_adapter
from tests.fakes.tiny_models import make_tiny_folder, make_tiny_transformer

SETTINGS = {"rank": 2, "alpha": 4.0, "targets": ["attn.to_q"]}
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
CONFIGS = {
    "alpha NaN": (
        {"lora_alpha": float("nan")},
        "lora_alpha is nan, and must be a finite number other than 0",
    ),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0, and must be a finite number other than 0"),
    "rank": ({"r": 4}, "adapter_config says r = 4"),
    "dora": ({"use_dora": True}, "only a plain LoRA"),
    "pattern": ({"target_modules": ".*attn.*"}, "only a plain LoRA with a list of target_modules"),
    "kind": ({"peft_type": "LOHA"}, "only a plain LoRA"),
    "targets": ({"target_modules": ["attn.nowhere"]}, "attn.nowhere"),
}
TENSORS: dict[str, tuple[Change, str]] = {
    "int8": (lambda state: {k: v.to(torch.int8) for k, v in state.items()}, "is of type torch.int8"),
    "B zero": (
        lambda state: {k: v * ("lora_A" in k) for k, v in state.items()},
        "the adapter changes nothing",
    ),
    "NaN": (lambda state: {k: v * torch.nan for k, v in state.items()}, "holds NaN or infinity"),
    "names": (lambda state: {f"{k}x": v for k, v in state.items()}, "is not lora_A.weight or lora_B.weight"),
    "fewer": (lambda state: dict(list(state.items())[:2]), "do not fit the transformer of"),
    "model": (
        lambda state: {
            k: torch.nn.functional.pad(v, (0, 0, 0, 1)) if "lora_B" in k else v for k, v in state.items()
        },
        "do not fit the transformer of",
    ),
}
FILES = {
    "cut": (PEFT_WEIGHTS, b"\x10\0\0\0\0\0\0\0{", f"{PEFT_WEIGHTS} is damaged"),
    "html": (PEFT_WEIGHTS, b"<html>404</html>", f"{PEFT_WEIGHTS} is damaged"),
    "empty": (PEFT_CONFIG, b"", f"its {PEFT_CONFIG} or"),
    "deep": (PEFT_CONFIG, b"[" * 100_000, f"its {PEFT_CONFIG} or"),
    "list": (PEFT_CONFIG, b"[]", "only a plain LoRA"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    transformer = make_tiny_transformer()
    attach_lora(transformer, **SETTINGS)
    return {name: torch.full_like(value, 0.5) for name, value in adapter_state(transformer).items()}


@pytest.fixture
def refusal(tmp_path, model, capsys):
    """What the command says of an adapter folder."""

    def run(adapter: Path) -> str:
        words = ["--model", str(model), "--adapter", str(adapter), "--prompt", "a red fox"]
        assert main([*words, "--output", "fox.png", "--threads", "1"]) == 2
        said = capsys.readouterr().err
        assert f"--adapter {adapter}: " in said
        return said

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_settings(tmp_path, state, refusal, name):
    change, expected = CONFIGS[name]
    save_adapter(state, tmp_path / "a", **SETTINGS)
    config = json.loads((tmp_path / "a" / PEFT_CONFIG).read_text())
    (tmp_path / "a" / PEFT_CONFIG).write_text(json.dumps(config | change))
    assert expected in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(tmp_path, state, refusal, name):
    change, expected = TENSORS[name]
    save_adapter(change(state), tmp_path / "a", **SETTINGS)
    assert expected in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, state, refusal, name):
    file, content, expected = FILES[name]
    save_adapter(state, tmp_path / "a", **SETTINGS)
    (tmp_path / "a" / file).write_bytes(content)
    assert expected in refusal(tmp_path / "a")


def test_a_folder_without_an_adapter(tmp_path, refusal):
    assert f"{PEFT_CONFIG}: missing; an adapter is a PEFT folder with" in refusal(tmp_path / "a")
