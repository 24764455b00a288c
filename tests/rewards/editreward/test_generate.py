"""`generate` on real Ray workers with the tiny models: what is drawn, what is written, and being killed."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from core.prompts import Prompt
from core.recipe import ConfigError, value_problems
from models.components import load_transformer
from models.lora.attach import adapter_settings, adapter_state, attach_lora, hash_state
from models.lora.files import save_adapter
from rewards.editreward.__main__ import main
from rewards.editreward.data.generate_config import GenerateSection, load_section
from rewards.editreward.data.generate_plan import draw_settings, plan_edits, plan_jobs
from rewards.editreward.data.generate_run import edit_type, read_failures
from rewards.editreward.data.shards import EditSample, read_shard
from tests.fakes.forked_workers import WorkerServer
from tests.fakes.tiny_models import make_tiny_folder

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, adapter, prompts and recipe."""
    place = tmp_path_factory.mktemp("generate")
    make_tiny_folder(place / "model")
    transformer = load_transformer(place / "model", dtype=torch.float32)
    attach_lora(transformer, rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(transformer).items()
    }
    settings = adapter_settings(transformer)
    save_adapter(state, place / "adapter", rank=2, alpha=4.0, targets=settings.targets)
    (place / "prompts.jsonl").write_text("".join(json.dumps(line(i)) + "\n" for i in range(PROMPTS)))
    recipe = {
        "name": "run",
        "output_dir": str(place / "runs"),
        "seed": 5,
        "generate": {
            "model": str(place / "model"), "prompts": str(place / "prompts.jsonl"), "edits_per_prompt": 4,
            "num_steps": [1, 2, 3], "guidance_scale": [1.0, 2.5], "noise_level": [0.0, 0.7],
            "adapters": ["base", str(place / "adapter")], "edit_type_key": "edit.kind", "dtype": "float32",
            "height": 32, "width": 32, "max_sequence_length": 16, "chunk_size": 2, "prompts_per_shard": 2,
            "device": "cpu", "workers": 2, "worker_cpus": 0.25, "encode_cpus": 0.25, "threads": 1,
            "placement_timeout_s": 60, "start_timeout_s": 240, "call_timeout_s": 240,
        },
        "train": {"steps": 1},
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


def line(i: int) -> dict[str, Any]:
    pixels = np.random.default_rng(i).integers(0, 255, (32 + 8 * i, 32 + 8 * i, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    if i == 3:
        uri = "data:image/png;base64,broken"
    return {
        "prompt": f"make it {('red', 'blue')[i % 2]}",
        "image": uri,
        "metadata": {"edit": {"kind": f"kind{i % 2}"}},
    }


def generate(place: Path, output: Path, *words: str) -> int:
    return main(["generate", str(place / "recipe.yaml"), f"generate.output={output}", *words])


def files(folder: Path) -> dict[str, bytes]:
    """What a run made; `status.json` tells of the process that made it."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != "status.json"}


@pytest.fixture(scope="module")
def straight(place: Path, ray_session: Any) -> Path:
    """A run that nobody disturbed."""
    assert generate(place, place / "straight") == 0
    return place / "straight"


def test_every_edit_is_there_once_with_its_settings_and_provenance(place: Path, straight: Path) -> None:
    samples = [sample for path in sorted(straight.glob("*.tar")) for sample in read_shard(path)]
    assert [path.name for path in sorted(straight.glob("*.tar"))] == [f"edits-{k:05d}.tar" for k in range(5)]
    assert [s.key for s in samples] == [
        f"{i:07d}-{k:03d}" for i in range(PROMPTS) if i != 3 for k in range(4)
    ]
    record = json.loads((straight / "generation.json").read_text())
    for sample in samples:
        i, given = sample.provenance["prompt_index"], line(sample.provenance["prompt_index"])
        assert (sample.instruction, sample.edit_type) == (given["prompt"], f"kind{i % 2}")
        assert sample.source.size == (32 + 8 * i, 32 + 8 * i) and sample.result.size == (32, 32)
        assert sample.scores == {}
        assert sample.provenance["metadata"] == given["metadata"]
        assert sample.provenance["model_sha256"] == record["model_sha256"]
    hashes = {sample.provenance["adapter"]["sha256"] for sample in samples}
    names = {sample.provenance["adapter"]["name"] for sample in samples}
    from models.lora.files import read_adapter

    assert names == {"base", "adapter"} and hashes == {None, hash_state(read_adapter(place / "adapter")[0])}
    seeds = [sample.provenance["seed"] for sample in samples]
    assert len(set(seeds)) == len(seeds)
    failures = read_failures(straight)
    assert [failure["key"] for failure in failures] == [f"0000003-{k:03d}" for k in range(4)]
    assert "unreadable" in failures[0]["detail"]


def test_an_edit_is_what_a_worker_makes_of_its_recorded_settings(place: Path, straight: Path) -> None:
    """An independent way to one of the pictures: the sampler itself, from the sample's provenance alone."""
    from models.lora.attach import load_adapter_state
    from models.lora.files import read_adapter
    from rollout.encoder import Encoder, EncoderSpec
    from rollout.engine import ReplicaSpec, RolloutEngine, SampleRequest
    from rollout.sampler import SamplingSpec

    state, lora = read_adapter(place / "adapter")
    shard = list(read_shard(straight / "edits-00002.tar"))

    def made(sample: EditSample) -> tuple[Any, ...]:
        settings = sample.provenance["settings"]
        return tuple(sorted(settings.items())), str(sample.provenance["adapter"])

    alone = [s for s in shard if Counter(made(x) for x in shard)[made(s)] == 1]
    sample = next(s for s in alone if s.provenance["adapter"]["name"] == "adapter")
    settings = sample.provenance["settings"]
    engine = RolloutEngine(
        ReplicaSpec(str(place / "model"), "float32", "cpu", 32, 32, lora.rank, lora.alpha, lora.targets, 1)
    )
    load_adapter_state(engine.transformer, state, "rollout")
    encoder = Encoder(EncoderSpec(str(place / "model"), "float32", "cpu", 32, 32, 16, 2**20, 1))
    given = line(sample.provenance["prompt_index"])
    conditioning = encoder.encode_one(Prompt(0, "edit", given["prompt"], (given["image"],)))
    spec = SamplingSpec(settings["num_steps"], settings["noise_level"], settings["guidance_scale"])
    request = SampleRequest(0, 0, (sample.provenance["seed"],), spec.stochastic_steps(0))
    _, _, images = engine.sample(request, spec, encoder.encode_text(""), [conditioning])
    assert np.array_equal(images[0], np.asarray(sample.result))


def test_killed_with_sigkill_it_goes_on_and_yields_the_same_bytes(
    place: Path, straight: Path, ray_session: Any, worker_server: WorkerServer
) -> None:
    output = place / "killed"
    address = ray_session.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.editreward", "generate", str(place / "recipe.yaml"),
         f"generate.output={output}", "generate.workers=1"],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address} | worker_server.environment()
        | worker_server.commands("rewards.editreward"),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(output.glob("*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    left = set(files(output))
    assert "edits-00004.tar" not in left, "it was killed too late to prove anything"
    (output / ".edits-00004.tar.0badcafe.tmp").write_bytes(b"half a shard")
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert generate(place, output) == 0
    assert files(output) == files(straight)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), (
        "what is there is not redone"
    )


def test_another_seed_or_model_in_the_same_folder_is_refused(
    place: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(straight)
    assert generate(place, straight, "seed=6", "generate.num_steps=[4]") == 2
    said = capsys.readouterr().err
    assert "seed was 5, is now 6" in said and "num_steps was [1, 2, 3], is now [4]" in said
    assert "choose another output" in said
    assert files(straight) == before


def test_two_runs_cannot_write_to_one_folder(place: Path, straight: Path, capsys: Any) -> None:
    from rewards.editreward.data.generate_record import only_one

    with only_one(straight):
        assert generate(place, straight) == 2
    assert "another run writes there now" in capsys.readouterr().err


def test_draws_depend_on_seed_prompt_and_k_alone() -> None:
    section = GenerateSection(model="m", prompts="p", adapters=["base", "base", "a"])
    draws = [draw_settings(section, 1, i, k) for i in range(300) for k in range(8)]
    assert draws == [draw_settings(section, 1, i, k) for i in range(300) for k in range(8)]
    assert draws != [draw_settings(section, 2, i, k) for i in range(300) for k in range(8)]
    for values, expected in (
        ([d.num_steps for d in draws], {6: 1 / 3, 10: 1 / 3, 28: 1 / 3}),
        ([d.noise_level for d in draws], {0.0: 0.5, 0.7: 0.5}),
        ([section.adapters[d.adapter] for d in draws], {"base": 2 / 3, "a": 1 / 3}),
    ):
        shares = {value: count / len(draws) for value, count in Counter(values).items()}
        assert shares == {value: pytest.approx(share, abs=0.04) for value, share in expected.items()}


def test_jobs_hold_equal_settings_and_every_edit_once() -> None:
    section = GenerateSection(model="m", prompts="p", adapters=["base", "a"], edits_per_prompt=5)
    prompts = [Prompt(i, "edit", "x", ("y",)) for i in range(20, 30)]
    edits = plan_edits(prompts, section, seed=3)
    jobs = plan_jobs(2, edits, chunk_size=3)
    assert sorted(e.key for job in jobs for e in job.edits) == [e.key for e in edits]
    assert all(len({edit.settings for edit in job.edits}) == 1 and len(job.edits) <= 3 for job in jobs)
    adapters = [job.settings.adapter for job in jobs]
    assert adapters == sorted(adapters), "a worker changes its adapter once a shard"


def test_the_kind_of_edit_is_found_in_the_metadata() -> None:
    assert edit_type({"edit": {"kind": "move"}}, "edit.kind") == "move"
    assert edit_type({"edit_type": "add"}, "edit_type") == "add"
    assert edit_type({"edit": "move"}, "edit.kind") == edit_type({}, "edit_type") == "unknown"


def test_what_is_wrong_is_said_before_ray_is_asked_for_anything(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match="unknown key 'generate.num_step': did you mean 'generate.num_steps'"
    ):
        load_section(place / "recipe.yaml", ["generate.num_step=[3]"], "generate", GenerateSection)
    words = [
        "num_steps=[]",
        "guidance_scale=[0.5]",
        "dtype=float8",
        "num_prompts=99",
    ]
    assert generate(place, tmp_path / "out", *(f"generate.{w}" for w in words), "generate.model=/none") == 2
    said = capsys.readouterr().err
    for part in (
        "num_steps is empty",
        "guidance_scale[0]=0.5 must be at least 1",
        "dtype='float8' is not one of",
        "holds 9 prompts",
        "/none",
    ):
        assert part in said
    assert generate(place, tmp_path / "out", f"generate.adapters=[{tmp_path}]") == 2
    assert "adapter_config.json" in capsys.readouterr().err


def test_sources_of_other_proportions_are_refused_by_line(place: Path, tmp_path: Path, capsys: Any) -> None:
    """The model would edit a squashed source, and shards keep it as it is."""
    words = "generate.width=64", "generate.num_prompts=2", "--dry-run"
    assert generate(place, tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert f"{place / 'prompts.jsonl'}:2: its reference image is 40 x 40 px" in said
    assert "drawn at 64 x 32" in said and "set generate.width and generate.height to its own" in said
    assert ":3: its reference" not in said


def test_prompts_with_several_references_are_refused_by_line(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    """A sample of EditReward has one source."""
    one, prompt = line(0)["image"], line(0)["prompt"]
    two = place / "two.jsonl"
    two.write_text(json.dumps({"prompt": prompt, "references": [one, one]}) + "\n")
    words = f"generate.prompts={two}", "generate.num_prompts=1", "--dry-run"
    assert generate(place, tmp_path / "out", *words) == 2
    assert f"{two}:1: 2 references; the edits that EditReward learns from have one" in capsys.readouterr().err


def test_the_dry_run_prints_the_plan(place: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    assert generate(place, tmp_path / "out", "--dry-run") == 0
    assert "9 prompts x 4 = 36 edits of 32 x 32 in 5 shards" in caplog.text
    assert not (tmp_path / "out").exists()


def test_the_packaged_recipe_is_sound() -> None:
    _, section = load_section("recipes/editreward_generate.yaml", [], "generate", GenerateSection)

    assert value_problems(section, "generate.") == []
