"""`python -m rl.evaluate`: what it refuses before Ray starts, and what a dry run says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.failures import ClusterError
from models.lora.attach import adapter_state, attach_lora
from models.lora.files import save_adapter
from rl.evaluate.__main__ import main
from tests.fakes.tiny_models import make_tiny_folder, make_tiny_transformer
from tests.fakes.tiny_run import write_prompts

ROOT = Path(__file__).resolve().parents[3]
CPU = ["--resources", "device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    make_tiny_folder(path / "model")
    write_prompts(path, 6)
    (path / "reward.py").write_text(
        "def half(*, images, prompts, references, metadata):\n    return [0.5 for _ in images]\n"
    )
    return path


def custom(folder, *more, task="t2i", data=None):
    words = ["custom", "--task", task, "--data", str(data or folder / f"{task}.jsonl")]
    words += ["--reward", f"{folder / 'reward.py'}:half", "--size", "32", "--dtype", "float32"]
    return [*words, *more, *CPU]


def refused(capsys, words):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("This evaluation cannot run:\n- ")
    return error


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder, tmp_path, capsys):
    words = custom(folder, "--model", str(folder / "model"), "--output", str(tmp_path / "out"), "--dry-run")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "custom: generate and score 6 prompts x 1 pictures in 1 batches, of which 1 lack pictures" in out
    assert out.endswith("Ready to run.\n")
    assert not (tmp_path / "out").exists()


def test_neither_a_dry_run_nor_a_refusal_loads_ray(folder, tmp_path):
    code = (
        "import sys; from rl.evaluate.__main__ import main; "
        "codes = [main(sys.argv[1:]), main([*sys.argv[1:], '--size', '7'])];"
        "sys.exit(0 if codes == [0, 2] and 'ray' not in sys.modules else 3)"
    )
    words = custom(folder, "--model", str(folder / "model"), "--output", str(tmp_path), "--dry-run")
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --model, to generate, or --images, to score"),
        (["--model", "{model}", "--images", "."], "give either --model, to generate, or --images, to score"),
        (["--images", "/absent"], "--images: /absent is not a folder"),
        (["--images", ".", "--adapter", "x"], "--adapter needs --model"),
        (["--images", ".", "--generate-only"], "--generate-only needs --model"),
        (["--model", "/absent"], "--model: /absent: no such model folder"),
        (["--model", "{model}", "--adapter", "/absent"], "/absent/adapter_config.json: missing"),
        (["--model", "{model}", "--size", "36"], "sides that are multiples of 8 and at most 128"),
        (["--model", "{model}", "--size", "136"], "sides that are multiples of 8 and at most 128"),
        (["--model", "{model}", "--num-prompts", "7"], "7 prompts are asked for, and the data holds 6"),
        (["--model", "{model}", "--num-images-per-prompt", "0"], "custom takes 1 or more"),
        (["--model", "{model}", "--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--model", "{model}", "--workers", "0"], "--workers 0: must be 1 or more"),
        (
            ["--model", "{model}", "--resources", "devise=cpu"],
            "unknown key '--resources devise': did you mean '--resources device'?",
        ),
        (
            ["--model", "{model}", "--resources", "placement=shared"],
            "--resources placement: an evaluation has no learner",
        ),
        (["--model", "{model}", "--resources", "device=tpu"], "device='tpu' is not one of cuda, cpu"),
        (["--model", "{model}", "--resources", "threads=0"], "threads=0 must be at least 1"),
        (["--model", "{model}", "--reward", "nowhere:absent"], "cannot import nowhere"),
        (
            ["--model", "{model}", "--reward-params", "colour"],
            "--reward-params 'colour': write it as key=value",
        ),
        (
            ["--model", "{model}", "--reward-params", "x=1"],
            "does not take images, prompts, references, metadata, x",
        ),
        (["--model", "{model}", "--data", "/absent.jsonl"], "/absent.jsonl: cannot be read"),
        (["--model", "{model}", "--references", "."], "--references is not used by custom"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, words, message):
    filled = [word.replace("{model}", str(folder / "model")) for word in words]
    assert message in refused(capsys, [*custom(folder, "--output", str(tmp_path / "out")), *filled])
    assert not (tmp_path / "out").exists(), "nothing is written before everything is right"


def test_everything_wrong_comes_in_one_message(folder, tmp_path, capsys):
    words = [
        *custom(folder, "--output", str(tmp_path)),
        "--model",
        "/absent",
        "--batch-size",
        "0",
        "--size",
        "0",
    ]
    error = refused(capsys, words)
    assert error.count("\n- ") >= 3


def test_a_published_number_of_pictures_that_the_layout_cannot_hold(tmp_path, capsys):
    data = ROOT / "tests" / "data" / "dpg" / "questions.csv"
    words = [
        "dpg",
        "--data",
        str(data),
        "--images",
        str(tmp_path),
        "--output",
        str(tmp_path),
        "--num-images-per-prompt",
        "3",
    ]
    assert "dpg takes 1 or 4" in refused(capsys, [*words, "--reward-params", "model=m"])


def test_benchmarks_without_their_data_say_where_it_is_to_be_had(tmp_path, capsys):
    for name, place in (
        ("geneval", "github.com/djghosh13/geneval"),
        ("dpg", "github.com/TencentQQGYLab/ELLA"),
        ("gedit", "stepfun-ai/GEdit-Bench"),
        ("imgedit", "sysuyy/ImgEdit"),
    ):
        error = refused(capsys, [name, "--images", str(tmp_path), "--output", str(tmp_path / "out")])
        assert "--data is missing; get" in error and place in error


def test_an_adapter_of_another_model_is_refused(folder, tmp_path, capsys):
    transformer = make_tiny_transformer()
    attach_lora(transformer, rank=2, alpha=4.0, targets=["attn.to_q"])
    wider = {
        name: torch.ones(value.shape[0], value.shape[1] + name.endswith("lora_A.weight"))
        for name, value in adapter_state(transformer).items()
    }
    save_adapter(wider, tmp_path / "adapter", rank=2, alpha=4.0, targets=["attn.to_q"])
    words = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    error = refused(capsys, custom(folder, "--model", str(folder / "model"), *words))
    assert f"--adapter {tmp_path / 'adapter'}: 3 of its tensors do not fit the transformer" in error


def test_a_source_picture_that_cannot_be_read_is_found(folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    data = tmp_path / "edit.jsonl"
    data.write_text(json.dumps({"prompt": "x", "image": "broken.png"}) + "\n")
    words = custom(
        folder, "--model", str(folder / "model"), "--output", str(tmp_path / "out"), task="edit", data=data
    )
    assert "broken.png" in refused(capsys, words)


def test_another_evaluation_in_the_same_folder_is_refused_key_by_key(folder, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps({"benchmark": "custom", "seed": 5, "num_steps": 28}))
    words = custom(folder, "--model", str(folder / "model"), "--output", str(tmp_path))
    error = refused(capsys, words)
    assert "seed was 5 in the evaluation that is in this folder and is 0 now" in error
    assert "num_steps" not in error and "model_sha256 was None" in error


def test_a_folder_of_pictures_is_looked_through(folder, tmp_path, capsys):
    words = custom(folder, "--images", str(tmp_path / "images"), "--output", str(tmp_path / "out"))
    samples = tmp_path / "images" / "00000" / "samples"
    samples.mkdir(parents=True)
    assert "holds none of the 6 prompts' pictures; custom looks for 00000/samples/00000.png" in refused(
        capsys, words
    )
    (samples / "00000.png").write_bytes(b"no picture")
    assert "00000.png: is not a readable picture" in refused(capsys, words)
    Image.new("RGB", (8, 8)).save(samples / "00000.png")
    (samples.parent / "metadata.jsonl").write_text('{"prompt": "something else"}')
    assert "these pictures are of 'something else'" in refused(capsys, words)
    (samples.parent / "metadata.jsonl").unlink()
    assert main([*words, "--dry-run"]) == 0


def test_a_submitted_job_needs_absolute_paths(folder, monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    error = refused(capsys, custom(folder, "--model", "recipes/shapes/base", "--output", "out"))
    assert "--output out is relative, and a submitted job runs in a temporary copy" in error
    assert "--model" not in error, "packaged paths are found on every node"


def test_the_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("geneval", "dpg", "gedit", "imgedit", "shapes", "custom"))


def test_an_evaluation_that_never_started_tells_why_and_leaves_its_folder_free(
    folder, tmp_path, monkeypatch, caplog
):
    """Ray is there and no worker starts: once for a reason that says all, once for one that nobody foresaw."""
    monkeypatch.setattr("core.cluster.actors.connect", lambda: False)
    words = custom(folder, "--model", str(folder / "model"), "--output", str(tmp_path))
    for error, traced in ((ClusterError("0 of 1 GPU"), False), (KeyError("surprise"), True)):

        def start(*_, error=error):
            raise error

        monkeypatch.setattr("rl.evaluate.cluster.start_cluster", start)
        caplog.clear()
        assert main(words) == 3
        assert str(error) in caplog.text and ("Traceback" in caplog.text) == traced
    assert main([*words, "--seed", "5", "--dry-run"]) == 0, "with other settings in the same folder"
