"""The benchmark does the work it reports: it samples, replays to the bit, and trains the adapter alone."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.engine import EngineBench, Settings
from bench.measure import measure
from bench.report import document, table

SMALL = Settings(
    size="tiny",
    task="t2i",
    resolution=32,
    batch=2,
    steps=3,
    train_steps=2,
    guidance=4.5,
    text_tokens=5,
    lora_rank=2,
    dtype="float32",
    device="cpu",
    repeats=1,
    warmup=0,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_both_engines_run_and_agree(task: str, guidance: float) -> None:
    settings = dataclasses.replace(SMALL, task=task, guidance=guidance)
    result = EngineBench(settings).run()
    assert result.log_prob_gap <= 1e-6
    assert result.rollout.seconds > 0 and result.update.seconds > 0
    assert result.rollout.peak_gib > 0
    assert settings.tokens().reference == (4 if task == "edit" else 0)


def test_an_update_moves_the_adapter_and_nothing_else() -> None:
    bench = EngineBench(SMALL)
    before = {name: tensor.clone() for name, tensor in bench.transformer.state_dict().items()}
    trajectory = bench.rollout()
    assert trajectory.latents.shape == (2, 4, 16, 4, 4)
    bench.update(trajectory)
    moved = {
        name for name, tensor in bench.transformer.state_dict().items() if not tensor.equal(before[name])
    }
    assert moved and all("lora_" in name for name in moved)
    assert bench.log_prob_gap(trajectory) > 0  # the policy is no longer the one that sampled


def test_gradient_checkpointing_gives_the_same_update() -> None:
    plain, checkpointed = (
        EngineBench(dataclasses.replace(SMALL, gradient_checkpointing=flag)) for flag in (False, True)
    )
    losses = [bench.update(bench.rollout()) for bench in (plain, checkpointed)]
    torch.testing.assert_close(losses[0], losses[1])
    for one, other in zip(plain.optimizer.masters, checkpointed.optimizer.masters, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_keeps_float32_copies() -> None:
    bench = EngineBench(dataclasses.replace(SMALL, dtype="bfloat16"))
    bench.update(bench.rollout())
    for parameter, master in zip(bench.optimizer.parameters, bench.optimizer.masters, strict=True):
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert parameter.equal(master.bfloat16())


def test_repeats_and_warmup_are_what_is_run() -> None:
    calls: list[int] = []
    measured = measure(lambda: calls.append(1), device=torch.device("cpu"), warmup=2, repeats=3)
    assert len(calls) == 5
    assert measured.fastest <= measured.seconds <= measured.slowest


def test_rates_follow_from_seconds_and_formula() -> None:
    result = EngineBench(SMALL).run()
    doc = document(SMALL, result)
    rollout = doc["phases"]["rollout"]
    assert rollout["samples_per_second"] == pytest.approx(SMALL.batch / result.rollout.seconds)
    assert rollout["tflops"] * 1e12 * result.rollout.seconds == pytest.approx(2 * result.rollout_flops)
    both = doc["phases"]["both"]
    assert both["seconds"] == pytest.approx(result.rollout.seconds + result.update.seconds)
    assert both["tflop_per_sample"] * 1e12 == pytest.approx(result.rollout_flops + result.update_flops)
    assert doc["peak_tflops"] is None and "unknown" in table(doc)


def test_command_line_needs_neither_ray_nor_deepspeed(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'torchvision'): sys.modules[name] = None\n"
        "from bench.__main__ import main\n"
        f"main({arguments(tmp_path / 'out.json')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| rollout |" in done.stdout and "| update |" in done.stdout
    doc = json.loads((tmp_path / "out.json").read_text())
    assert doc["settings"]["task"] == "edit" and set(doc["phases"]) == {"rollout", "update", "both"}


def test_bad_options_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["engine", "--train-steps", "11", "--resolution", "100", "--batch", "0"])
    message = capsys.readouterr().err
    assert "--train-steps must lie between 1 and --steps=10" in message
    assert "--resolution must be a multiple of 16 up to 512" in message
    assert "--batch must be at least 1" in message


def arguments(json_path: Path) -> list[str]:
    small = {"--task": "edit", "--resolution": 32, "--batch": 1, "--steps": 2, "--repeats": 1, "--warmup": 0}
    words = [str(word) for pair in small.items() for word in pair]
    return ["engine", *words, "--text-tokens", "5", "--lora-rank", "2", "--json", str(json_path)]
