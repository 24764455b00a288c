"""`python -m rewards.geneval check`, and the bench that measures the same backends."""

import argparse
import hashlib
import re

import pytest

from bench import detectors as bench
from rewards.geneval.__main__ import main
from rewards.geneval.hub import HubMask2Former
from tests.fakes.tiny_detectors import SMALL, save_tiny_clip

SCALE = ["--scale", *map(str, SMALL), "--image-size", "64"]


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_mask2former_passes_and_the_report_says_what_it_is(swin_s, tiny_clip, capsys):
    words = [
        "check",
        "--detector",
        "mask2former",
        "--checkpoint",
        str(swin_s),
        "--clip",
        str(tiny_clip),
        *SCALE,
    ]
    assert main(words) == 0
    report = lines(capsys)
    assert all(line.startswith("ok  ") for line in report)
    assert hashlib.sha256(swin_s.read_bytes()).hexdigest() in report[1]
    text = "\n".join(report)
    assert "detector: mmdet-160x128: mmdet 3.3.0" in text
    assert "colours: clip-64-8" in text
    assert "(red first)" in text and "10 of 10 right" in text
    assert re.search(r"s an image singly, .* s in a batch of 4", text)


def test_transformers_passes_and_a_swapped_clip_fails(tiny_hub, tmp_path, capsys):
    clip = save_tiny_clip(tmp_path / "clip", swapped=True)
    words = ["check", "--detector", "transformers", "--checkpoint", str(tiny_hub), *SCALE]
    assert main(words) == 0
    assert "colours: lab" in capsys.readouterr().out
    assert main([*words, "--clip", str(clip)]) == 1
    (failed,) = [line for line in lines(capsys) if not line.startswith("ok")]
    assert failed.startswith("FAIL  channels of the colours: ")
    assert "red is called 'blue'" in failed and "swapped" in failed


def test_a_detector_that_swaps_the_channels_fails(tiny_hub, capsys, monkeypatch):
    right = HubMask2Former.network_input
    monkeypatch.setattr(HubMask2Former, "network_input", lambda self, image: right(self, image).flip(0))
    assert main(["check", "--detector", "transformers", "--checkpoint", str(tiny_hub), *SCALE]) == 1
    assert "red and blue are swapped" in capsys.readouterr().out


def test_shapes_pass(capsys):
    assert main(["check", "--detector", "shapes"]) == 0
    assert "detector: shapes" in capsys.readouterr().out


def test_reasons_are_given_for_what_fails(tmp_path, capsys):
    assert main(["check", "--detector", "mask2former"]) == 1
    assert lines(capsys)[0].startswith("FAIL  configuration: checkpoint is missing")
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"nothing")
    assert main(["check", "--detector", "mask2former", "--checkpoint", str(bad)]) == 1
    assert lines(capsys)[-1].startswith(f"FAIL  loading: checkpoint {bad}")


def test_the_bench_measures_every_backend(capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = [
        "--backend",
        "mask2former",
        "transformers",
        "shapes",
        "lab",
        *["--batch", "1", "2", "--warmup", "0"],
    ]
    arguments = parser.parse_args([*words, "--repeats", "1", "--scale", "64", "64", "--image-size", "48"])
    assert bench.run(arguments) == 0
    report = lines(capsys)
    assert report[0].startswith("CPU, ") and "torch" in report[0] and "64x64" in report[0]
    rows = [line.split(" | ") for line in report[4:]]
    assert [(row[0].lstrip("| "), row[2]) for row in rows] == [
        (name, batch) for name in words[1:5] for batch in ("1", "2")
    ]
    assert all(float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize("backend", bench.BACKENDS)
def test_the_bench_knows_its_backends(backend):
    assert callable(bench.BACKENDS[backend])
