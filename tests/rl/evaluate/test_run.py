"""Whole evaluations on a real Ray: killed and run again, other workers, adapters, edits of several shapes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.lora.attach import adapter_state, attach_lora
from models.lora.files import save_adapter
from rl.evaluate.__main__ import main
from tests.fakes.tiny_metaquery import make_tiny_metaquery
from tests.fakes.tiny_models import make_tiny_folder, make_tiny_transformer
from tests.fakes.tiny_run import REWARD_SOURCE, write_prompts

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = 64
RESOURCES = [
    "--resources", "device=cpu", "rollout_cpus=0.25", "reward_cpus=0.25", "encode_cpus=0.25", "reward_workers=1",
    "threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate_run")
    make_tiny_folder(path / "model")
    colours, shapes = ("red", "green", "blue", "white"), ("circle", "square", "star", "cross")
    lines = [
        {"prompt": f"a {colours[k % 4]} {shapes[k // 4 % 4]} {k}", "metadata": {"tag": f"group {k % 3}"}}
        for k in range(PROMPTS)
    ]
    (path / "t2i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "reward.py").write_text(REWARD_SOURCE)
    return path


def words(folder, output, *more, task="t2i", batch_size=4, steps=10):
    return [
        "custom", "--task", task, "--data", str(folder / f"{task}.jsonl"), "--output", str(output),
        "--reward", f"{folder / 'reward.py'}:redness", "--model", str(folder / "model"), "--size", "32",
        "--max-sequence-length", "16", "--dtype", "float32", "--num-steps", str(steps), "--guidance-scale", "2",
        "--batch-size", str(batch_size), "--gallery", "4", *more, *RESOURCES,
    ]  # fmt: skip


def stamps(output):
    return {str(p.relative_to(output)): p.stat().st_mtime_ns for p in (output / "images").rglob("*.png")}


def pictures(output):
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted((output / "images").rglob("*.png"))}


@pytest.fixture(scope="module")
def straight(folder, ray_session):
    """An undisturbed evaluation of all prompts."""
    output = folder / "straight"
    assert main(words(folder, output)) == 0
    return output


def test_an_evaluation_leaves_everything_it_promises(straight, folder):
    results = json.loads((straight / "results.json").read_text())
    assert results["images"] == {"expected": PROMPTS, "present": PROMPTS, "scored": PROMPTS}
    overall = results["table"][0]
    scores = [score for prompt in results["prompts"] for score in prompt["scores"]]
    assert overall["value"] == pytest.approx(np.mean(scores))
    assert overall["low"] < overall["value"] < overall["high"]
    assert [row["name"] for row in results["table"]] == ["score", *(f"score, group {k}" for k in range(3))]
    for name in ("model_sha256", "prompts_sha256", "seed", "num_steps", "guidance_scale"):
        assert results["generation"][name] not in (None, "")
    assert set(results["scorers"][0]["files"]) == {"code"}
    assert len({seed for prompt in results["prompts"] for seed in prompt["seeds"]}) == PROMPTS
    picture = np.asarray(Image.open(straight / "images" / "00005" / "samples" / "00000.png"), dtype=float)
    redness = (picture[..., 0] - picture[..., 1]).mean() / 510 + 0.5
    assert results["prompts"][5]["scores"] == [pytest.approx(redness)], "scored as the file holds it"
    with Image.open(straight / "gallery.png") as gallery:
        assert gallery.width > 4 * 128
    assert (straight / "results.md").read_text().startswith("# custom\n")
    assert list((straight / "spool").iterdir()) == []


def test_an_evaluation_killed_at_a_random_moment_and_run_again_gives_the_same_table(
    straight, folder, ray_session, worker_server
):
    output, moment = folder / "killed", random.randint(1, PROMPTS // 2)
    address = ray_session.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.evaluate", *words(folder, output)],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address} | worker_server.commands("rl.evaluate"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (output / "images").is_dir() and len(stamps(output)) >= moment:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    before = stamps(output)
    spooled = len(list((output / "spool").glob("[0-9]*.npz")))
    assert moment <= len(before) < PROMPTS, (
        f"killed at {moment} pictures, found {len(before)}: {errors[-3000:]}"
    )

    assert main(words(folder, output, "--workers", "2")) == 0, "other workers draw the same"
    after = stamps(output)
    assert {name: after[name] for name in before} == before, "no picture was made again"
    assert spooled <= 1 and len(after) == PROMPTS
    assert pictures(output) == pictures(straight)
    for name in ("results.md", "results.json"):
        assert (output / name).read_text() == (straight / name).read_text()


def test_a_metaquery_model_is_evaluated_with_its_vlm(tmp_path, ray_session, capsys):
    """Edits under guidance: the VLM sees the picture beside prompt and negative prompt."""
    _, vlm = make_tiny_metaquery(tmp_path)
    write_prompts(tmp_path, 4)
    (tmp_path / "reward.py").write_text(REWARD_SOURCE)
    output = tmp_path / "out"
    call = words(tmp_path, output, "--negative-prompt", "blurry", task="edit", steps=2)
    assert (
        main(call) == 2 and "(it has conditioner/): give its Qwen2.5-VL as --vlm" in capsys.readouterr().err
    )
    assert main([*call, "--vlm", str(vlm)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["images"] == {"expected": 4, "present": 4, "scored": 4}
    assert len(results["generation"]["vlm_sha256"]) == 64
    assert main([*call, "--vlm", str(vlm), "--position-mode", "mrope"]) == 2
    assert "position_mode was 'flat'" in capsys.readouterr().err


def test_a_finished_evaluation_is_done_again_without_ray_and_gives_the_same_files(
    straight, folder, monkeypatch
):
    before = {path: path.read_bytes() for path in straight.iterdir() if path.is_file()}
    monkeypatch.setattr("core.cluster.actors.connect", lambda: pytest.fail("nothing is left to do"))
    assert main(words(folder, straight)) == 0
    assert {path: path.read_bytes() for path in straight.iterdir() if path.is_file()} == before


def test_a_score_that_is_lost_is_made_again_and_no_picture_is(straight, folder, monkeypatch):
    (scores,) = straight.glob("scores_*.jsonl")
    whole, results = scores.read_text(), (straight / "results.md").read_text()
    scores.write_text("".join(whole.splitlines(keepends=True)[:5]) + '{"batch": 6, "ima')
    before = stamps(straight)
    assert main(words(folder, straight)) == 0
    assert stamps(straight) == before
    assert (straight / "results.md").read_text() == results
    assert len(scores.read_text().splitlines()) == len(whole.splitlines())


def test_an_adapter_draws_something_else(straight, folder):
    transformer = make_tiny_transformer()
    attach_lora(transformer, rank=2, alpha=4.0, targets=["attn.to_q", "attn.to_k"])
    state = {name: 0.5 * torch.ones_like(value) for name, value in adapter_state(transformer).items()}
    save_adapter(state, folder / "adapter", rank=2, alpha=4.0, targets=["attn.to_q", "attn.to_k"])
    adapter = ["--adapter", str(folder / "adapter")]
    assert main(words(folder, folder / "tuned", "--num-prompts", "8", *adapter)) == 0
    base, tuned = pictures(straight), pictures(folder / "tuned")
    assert len(tuned) == 8 and all(tuned[name] != base[name] for name in tuned)
    record = json.loads((folder / "tuned" / "evaluation.json").read_text())
    assert (
        len(record["adapter_sha256"]) == 64
        and record["model_sha256"] in (straight / "results.json").read_text()
    )


def test_edits_keep_the_shape_of_their_sources_and_pictures_alone_need_no_reward(folder, ray_session, capsys):
    lines = []
    for k, size in enumerate([(40, 40), (60, 40), (40, 60), (64, 36), (41, 40)]):
        Image.new("RGB", size, (40 * k, 90, 200)).save(folder / f"source{k}.png")
        lines.append({"prompt": f"make it {k}", "image": f"source{k}.png"})
    (folder / "edit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = folder / "edits"
    more = ["--num-images-per-prompt", "2", "--generate-only"]
    assert main(words(folder, output, *more, task="edit", steps=2)) == 0
    assert "5 of 5 prompts have their pictures" in capsys.readouterr().out
    sizes = []
    for k in range(5):
        first, second = (
            Image.open(output / "images" / f"{k:05d}" / "samples" / f"0000{n}.png") for n in (0, 1)
        )
        assert first.size == second.size and first.tobytes() != second.tobytes()
        sizes.append(first.size)
    assert sizes == [(32, 32), (40, 24), (24, 40), (40, 24), (32, 32)]
    assert not (output / "results.json").exists()


def test_a_reward_that_scores_nothing_stops_the_evaluation(straight, folder, capsys):
    (folder / "silent.py").write_text(
        "def silent(*, images, prompts, references, metadata):\n    return [None for _ in images]\n"
    )
    before = stamps(straight)
    command = words(folder, straight)
    command[command.index("--reward") + 1] = f"{folder / 'silent.py'}:silent"
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "came back without a single score" in error and "run the same command again" in error
    assert stamps(straight) == before
    assert len(list(straight.glob("scores_*.jsonl"))) == 2, "another reward's scores have a file of their own"
