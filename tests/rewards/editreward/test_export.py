"""The exported folder: stock vLLM answers what transformers answers, and takes the 7B's names and shapes too."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from core.files import COMPLETE, verify_folder
from models.qwen25_vl import qwen25_vl_7b, read_chat_template
from rewards.editreward.client_local import LocalModel
from rewards.editreward.model import build_model, load_model
from rewards.editreward.model_folder import ARCHITECTURE, folder_problems, read_card
from rewards.editreward.processing import classify_request
from rewards.editreward.settings import FILE, RUBRIC, EditRewardSettings, load_settings
from rewards.editreward.train.export import export_checkpoint, write_export
from tests.fakes.tiny_editreward import DIMENSIONS
from tests.rewards.editreward.editreward_data import make_base

ROOT = Path(__file__).resolve().parents[3]
SIZES = [(64, 64), (200, 90), (90, 200), (512, 512), (30, 240), (333, 250), (56, 140)]
REQUESTS = 50


def make_settings(base, **changes):
    values = {
        "dimensions": ("instruction", "quality"), "means": (5.0, 6.0), "stds": (2.0, 1.0), "score_low": 0.0,
        "score_high": 10.0, "combine": "geometric_mean", "view": "full", "rubric": RUBRIC,
        "chat_template": read_chat_template(base), "add_generation_prompt": True, "min_pixels": 4 * 784,
        "max_pixels": 16 * 784, "token_pixels": 28,
    }  # fmt: skip
    return EditRewardSettings(**values | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def random_model(base, dimensions):
    model = build_model(base, dimensions, bias=True, dtype=torch.float32)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    torch.nn.init.normal_(model.score.bias)
    return model


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_export(random_model(base, 2), base, make_settings(base), folder)
    return folder


def picture(size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def edits():
    """Every size as a source and as a result, and texts that are not ASCII."""
    return [
        (
            picture(SIZES[i % 7], i),
            picture(SIZES[(i // 7 + i) % 7], 1000 + i),
            f"Ändere {i} … {'sehr ' * (i % 9)}",
        )
        for i in range(REQUESTS)
    ]


@pytest.fixture(scope="module")
def answers(serving, editreward_folder, edits):
    """What vLLM answers to each edit, with several requests in flight."""
    settings, name = load_settings(editreward_folder), read_card(editreward_folder).served_name
    with httpx.Client(timeout=120) as client:

        def ask(edit):
            body = classify_request(*edit, settings, model=name)
            response = client.post(f"{serving.url}/classify", json=body)
            response.raise_for_status()
            return response.json()["data"][0]

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(ask, edits))


def test_vllm_answers_what_transformers_answers(editreward_folder, edits, answers):
    outputs = LocalModel(read_card(editreward_folder), "cpu", 4).outputs(edits)
    ours, theirs = np.array(outputs), np.array([answer["probs"] for answer in answers])
    assert theirs.shape == (REQUESTS, 3) and (ours.std(0) > 0.1).all(), (
        "scores must differ for this to mean anything"
    )
    assert np.abs(ours - theirs).max() < 1e-4
    assert {answer["label"] for answer in answers} <= set(DIMENSIONS)


CHECK = """
import sys
from transformers import Qwen2_5_VLConfig
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from rewards.editreward.model import meta_model

folder, rendezvous = sys.argv[1:]
config = EngineArgs(model=folder, runner="pooling", enforce_eager=True, dtype="bfloat16", max_model_len=2048,
                    limit_mm_per_prompt={"image": 2, "video": 0}).create_engine_config()
with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    with torch.device("meta"):
        served = initialize_model(config)
    ours = meta_model(Qwen2_5_VLConfig.from_pretrained(folder), 1, bias=False)
    wanted = {name for name, _ in served.named_parameters()}
    loaded = served.load_weights(ours.file_tensors())
print("RESULT", len(wanted), sorted(wanted - loaded), sorted(loaded - wanted))
"""


@pytest.mark.vllm
def test_vllm_takes_every_weight_of_the_7b_by_name_and_shape(base, tmp_path, vllm_forks):
    """vLLM's own class and loader on the meta device: it asserts shapes, and says what it took."""
    folder = tmp_path / "seven"
    write_export(
        random_model(base, 1),
        base,
        make_settings(base, dimensions=("overall",), means=(5.0,), stds=(1.0,)),
        folder,
    )
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    head = json.loads((folder / "config.json").read_text())
    kept = {key: head[key] for key in ("architectures", "num_labels", "id2label", "label2id")}
    tokens = {
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "vision_token_id": 151654,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(qwen25_vl_7b() | kept | tokens))
    code = [sys.executable, "-c", CHECK, str(folder), str(tmp_path / "rendezvous")]
    environment = os.environ | vllm_forks.commands(CHECK)
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), done.stderr[-3000:])
    # Stacked as vLLM does (q k v, gate up): 7 a decoder layer, 10 a vision block; embedding, norm, patches, 5 of the
    # merger, and the head.
    assert line == f"RESULT {28 * 7 + 32 * 10 + 9} [] []", line


def test_the_folder_is_complete_and_says_what_it_is(base, exported):
    assert verify_folder(exported) == [] and folder_problems(exported) == []
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == [ARCHITECTURE] and config["num_labels"] == 2
    assert config["id2label"] == {"0": "instruction", "1": "quality"} and config["dtype"] == "float32"
    assert load_settings(exported) == make_settings(base)
    assert (exported / "chat_template.jinja").read_text() == make_settings(base).chat_template
    size = json.loads((exported / "preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 4 * 784, "longest_edge": 16 * 784}
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"language_model.score.weight", "language_model.score.bias", "visual.merger.ln_q.weight"} < names
    with safe_open(base / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) - {"lm_head.weight"} == {n for n in names if ".score." not in n}


def test_what_is_loaded_is_what_was_exported(base, exported):
    before = random_model(base, 2).state_dict()
    after = load_model(exported, 2, dtype=torch.float32, device="cpu").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(ValueError, match="expected 3 rows"):
        load_model(exported, 3, dtype=torch.float32, device="cpu")


def test_a_folder_that_vllm_could_not_serve_is_named(exported, tmp_path):
    def damaged(change):
        folder = tmp_path / change.__name__
        shutil.copytree(exported, folder)
        change(folder)
        return folder_problems(folder)

    def architecture(folder):
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(record | {"architectures": ["LlamaForCausalLM"]}))

    def labels(folder):
        record = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(record | {"num_labels": 7}))

    def head(folder):
        settings = dataclasses.replace(load_settings(folder), dimensions=("a",), means=(0.0,), stds=(1.0,))
        (folder / FILE).write_text(json.dumps(settings.to_json()))

    def constants(folder):
        (folder / FILE).unlink()

    def marker(folder):
        (folder / COMPLETE).unlink()

    for change, message in (
        (architecture, "architectures is"),
        (labels, "num_labels is 7"),
        (head, "expected 1 rows"),
        (constants, "without its constants"),
        (marker, "never finished"),
    ):
        assert any(message in problem for problem in damaged(change)), change.__name__


def test_an_export_replaces_an_export_and_nothing_else(base, exported, tmp_path):
    settings = make_settings(base)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no exported model"):
        write_export(random_model(base, 2), base, settings, folder)
    again = tmp_path / "again"
    for _ in range(2):
        write_export(random_model(base, 2), base, settings, again)
    assert verify_folder(again) == [] and [p.name for p in tmp_path.iterdir()].count("again") == 1
    with pytest.raises(ValueError, match="no such folder"):
        export_checkpoint(tmp_path / "nothing", base, again)
