"""What was measured, as a table for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from bench.engine import EngineResult, Settings
from bench.measure import Measurement, device_name, peak_tflops


def document(settings: Settings, result: EngineResult) -> dict[str, Any]:
    """Settings, device, and per phase: seconds a batch, samples/s, TFLOP a sample, TFLOP/s, share of peak."""
    device = torch.device(settings.device)
    peak = peak_tflops(device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype])
    phases = {
        "rollout": _phase(result.rollout, settings.batch, result.rollout_flops, peak),
        "update": _phase(result.update, settings.batch, result.update_flops, peak),
    }
    seconds = sum(phase["seconds"] for phase in phases.values())
    flops = result.rollout_flops + result.update_flops
    phases["both"] = _rates(seconds, settings.batch, flops, peak)
    return {
        "settings": asdict(settings),
        "device": device_name(device),
        "torch": torch.__version__,
        "peak_tflops": peak,
        "log_prob_gap": result.log_prob_gap,
        "phases": phases,
    }


def table(doc: dict[str, Any]) -> str:
    """The document's phases as a Markdown table under one line of settings."""
    s = doc["settings"]
    lines = [
        f"{s['size']} {s['task']} {s['resolution']} px, batch {s['batch']}, T={s['steps']}, "
        f"{s['train_steps']} trained steps, guidance {s['guidance']:g}, {s['text_tokens']} text tokens, "
        f"LoRA rank {s['lora_rank']}, {s['dtype']}, {doc['device']}, torch {doc['torch']}",
        "",
        "| phase | s/batch | samples/s | TFLOP/sample | TFLOP/s | of peak | peak memory GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, phase in doc["phases"].items():
        share = "unknown" if phase["share_of_peak"] is None else f"{100 * phase['share_of_peak']:.1f} %"
        memory = f"{phase['peak_gib']:.2f}" if "peak_gib" in phase else ""
        lines.append(
            f"| {name} | {phase['seconds']:.3f} | {phase['samples_per_second']:.3g} | "
            f"{phase['tflop_per_sample']:.4g} | {phase['tflops']:.3g} | {share} | {memory} |"
        )
    lines += ["", f"log-probability gap between rollout and replay: {doc['log_prob_gap']:.2e}"]
    return "\n".join(lines)


def _phase(measured: Measurement, batch: int, flops: int, peak: float | None) -> dict[str, Any]:
    return _rates(measured.seconds, batch, flops, peak) | {
        "fastest": measured.fastest,
        "slowest": measured.slowest,
        "peak_gib": measured.peak_gib,
    }


def _rates(seconds: float, batch: int, flops: int, peak: float | None) -> dict[str, Any]:
    tflops = batch * flops / seconds / 1e12
    return {
        "seconds": seconds,
        "samples_per_second": batch / seconds,
        "tflop_per_sample": flops / 1e12,
        "tflops": tflops,
        "share_of_peak": None if peak is None else tflops / peak,
    }
