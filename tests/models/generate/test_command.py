"""The command line on the committed base and on tiny models: pictures that are right, repeat, resume or are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.generate.__main__ import main
from models.generate.metadata import KEY
from models.generate.page import Page
from models.generate.task_lines import Refused
from models.lora.attach import adapter_state, attach_lora
from models.lora.files import save_adapter
from models.pipeline import KontextPipeline
from tests.fakes.forked_workers import WorkerServer
from tests.fakes.tiny_models import make_tiny_transformer
from worlds.shapes.scoring.rewards import EditShapes, GenEvalShapes

ROOT = Path(__file__).resolve().parents[3]
BASE = "recipes/shapes/base"
QUICK = ["--steps", "3", "--threads", "1"]


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def record(path: Path) -> dict:
    return json.loads(Image.open(path).text[KEY])


def write_lines(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that changes what it draws."""
    transformer, path = make_tiny_transformer(), tmp_path_factory.mktemp("adapter")
    attach_lora(transformer, rank=2, alpha=4.0, targets=["attn.to_q", "attn.to_v"])
    state = {name: 0.5 * torch.ones_like(value) for name, value in adapter_state(transformer).items()}
    save_adapter(state, path, rank=2, alpha=4.0, targets=["attn.to_q", "attn.to_v"])
    return path


@pytest.mark.parametrize(("task", "reward"), [("edit", EditShapes), ("t2i", GenEvalShapes)])
def test_the_base_draws_and_edits_what_a_recipes_prompt_set_asks_for(
    tmp_path: Path, task: str, reward: type
) -> None:
    """What was asked for is in the pictures: the base's README has .66 for both tasks at guidance 2 and 10 steps."""
    count = 16
    lines = (
        (ROOT / "recipes" / "shapes" / "prompts" / f"{task}_heldout.jsonl").read_text().splitlines()[:count]
    )
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    words = ["--guidance", "2", "--steps", "10", "--batch-size", "16", "--threads", "1", "--model", BASE]
    assert (
        main([*words, "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "made")]) == 0
    )
    files = sorted((tmp_path / "made").iterdir())
    assert [file.name for file in files] == [f"{number:05d}.png" for number in range(1, count + 1)]
    images = [Image.open(file) for file in files]
    assert {image.size for image in images} == {(32, 32)}
    asked = [json.loads(line) for line in lines]
    scored = reward().score(
        images=images,
        prompts=[one["prompt"] for one in asked],
        references=[[]] * count,
        metadata=[one["metadata"] for one in asked],
    )
    assert np.mean(scored.scores) > 0.45, scored.scores
    assert {record(file)["max_sequence_length"] for file in files} == {12}, "as the base's tokenizer has it"


def test_a_picture_is_that_of_the_pipeline_and_says_how_it_was_made(
    tmp_path: Path, folder: Path, adapter: Path
) -> None:
    source, output = tmp_path / "source.png", tmp_path / "deep" / "blue.png"
    picture(64, 32).save(source)
    words = [
        "--model",
        str(folder),
        "--adapter",
        str(adapter),
        "--prompt",
        "make it blue",
        "--image",
        str(source),
    ]
    assert main([*words, "--output", str(output), "--seed", "7", "--negative-prompt", "red", *QUICK]) == 0

    pipeline = KontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_adapter(adapter)
    (expected,) = pipeline(
        "make it blue", Image.open(source), "red", height=16, width=32, num_inference_steps=3,
        generator=torch.Generator().manual_seed(7), max_sequence_length=64,
    ).images  # fmt: skip
    assert (pixels(output) == np.asarray(expected)).all()
    found = record(output)
    told = {
        key: found[key] for key in ("prompt", "negative_prompt", "image", "height", "width", "steps", "seed")
    }
    assert told == {
        "prompt": "make it blue", "negative_prompt": "red", "image": str(source), "height": 16, "width": 32,
        "steps": 3, "seed": 7,
    }  # fmt: skip
    assert found["guidance"] == 3.5 and found["dtype"] == "float32" and found["vlm"] is None
    assert found["model"] == str(folder) and found["adapter"] == str(adapter)
    assert all(len(found[f"{part}_sha256"]) == 64 for part in ("model", "adapter", "image"))


def test_several_references_reach_the_pipeline_in_order_and_repeat(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named on the command line and in a file; made again from the metadata, wherever the pictures are by then."""
    room, cat = tmp_path / "room.png", tmp_path / "cat.png"
    picture().save(room)
    picture(64, 16, 1).save(cat)
    common = ["--model", str(folder), "--seed", "7", "--reference-pixels", "1280", *QUICK]
    words = [*common, "--prompt", "put it there"]
    assert main([*words, "--image", str(room), str(cat), "--output", str(tmp_path / "a.png")]) == 0
    pipeline = KontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        "put it there", [Image.open(room), Image.open(cat)], height=32, width=32, num_inference_steps=3,
        generator=torch.Generator().manual_seed(7), max_sequence_length=64, reference_pixels=1280,
    ).images  # fmt: skip
    made = pixels(tmp_path / "a.png")
    assert (made == np.asarray(expected)).all()
    told = record(tmp_path / "a.png")
    assert told["further_images"] == [str(cat)] and told["reference_pixels"] == 1280

    line = {"prompt": "put it there", "references": ["cat.png", "room.png"], "height": 32, "width": 32}
    lines = write_lines(tmp_path / "p.jsonl", line, line | {"references": ["room.png", "cat.png"]})
    assert main([*common, "--prompts", str(lines), "--output", str(tmp_path / "made")]) == 0
    assert (pixels(tmp_path / "made" / "00002.png") == made).all()
    assert (pixels(tmp_path / "made" / "00001.png") != made).any()

    moved = cat.rename(tmp_path / "moved.png")
    again = ["--from-metadata", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png")]
    assert main([*again, "--image", str(room), str(moved)]) == 0
    assert (pixels(tmp_path / "b.png") == made).all()
    for wrong, said in (([room], "made from 2"), ([moved, room], "moved.png has changed")):
        assert main([*again, "--image", *map(str, wrong)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["kontext", "metaquery"])
def test_a_picture_is_repeated_exactly_from_its_metadata(
    tmp_path: Path,
    folder: Path,
    metaquery_folders: tuple[Path, Path],
    adapter: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, made, again = (tmp_path / name for name in ("source.png", "made.png", "again.png"))
    picture(40, 32).save(source)
    model, vlm = metaquery_folders
    parts = ["--model", str(folder)] if kind == "kontext" else ["--model", str(model), "--vlm", str(vlm)]
    words = [
        *parts,
        "--adapter",
        str(adapter),
        "--prompt",
        "make it red",
        "--image",
        str(source),
        "--seed",
        "3",
    ]
    assert main([*words, "--output", str(made), *QUICK]) == 0
    assert record(made)["position_mode"] == (None if kind == "kontext" else "flat")
    torch.set_num_threads(1)
    moved = source.rename(tmp_path / "moved.png")
    repeat = ["--from-metadata", str(made), "--output", str(again)]
    assert main(repeat) == 2
    assert "source.png is unreadable" in capsys.readouterr().err
    assert main([*repeat, "--image", str(moved)]) == 0
    assert (pixels(again) == pixels(made)).all()
    other = {"image": str(moved)}
    assert record(again) == record(made) | other

    picture(40, 32, seed=1).save(moved)
    assert main([*repeat, "--image", str(moved)]) == 2
    assert "moved.png has changed" in capsys.readouterr().err
    assert main([*repeat, "--steps", "9", "--num-images", "2"]) == 2
    assert "--steps: --from-metadata takes it" in (said := capsys.readouterr().err) and "--num-images" in said


def test_other_weights_do_not_pass_for_those_that_made_a_picture(
    tmp_path: Path, folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(folder), "--prompt", "a star", "--output", str(tmp_path / "a.png"), *QUICK]
    assert main([*words, "--adapter", str(adapter)]) == 0
    loud = shutil.copytree(adapter, tmp_path / "loud")
    config = json.loads((loud / "adapter_config.json").read_text())
    (loud / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8.0}))
    for changed in (["--adapter", str(loud)], ["--model", BASE]):
        assert (
            main(["--from-metadata", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png"), *changed])
            == 2
        )
    said = capsys.readouterr().err
    assert "its adapter_sha256 is" in said and "--adapter" in said
    assert main([*words, "--adapter", str(loud)]) == 2
    assert "was made with other settings: adapter_sha256" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_pictures_that_are_there_stay_and_others_are_refused(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "a star"},
        {"prompt": "a cross", "seed": 5, "output": "sub/cross.png", "height": 16, "width": 48},
    )
    output = tmp_path / "made"
    words = ["--model", str(folder), "--prompts", str(prompts), "--output", str(output), "--num-images", "2"]
    assert main([*words, *QUICK]) == 0
    names = ["00001_42.png", "00001_43.png", "sub/cross_5.png", "sub/cross_6.png"]
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.png")) == names
    assert Image.open(output / "sub" / "cross_5.png").size == (48, 16)
    assert (pixels(output / "00001_42.png") != pixels(output / "00001_43.png")).any()
    before = {name: (output / name).read_bytes() for name in names}
    stamps = {name: (output / name).stat().st_mtime_ns for name in names}

    (output / names[1]).unlink()
    assert main([*words, *QUICK]) == 0
    assert "1 pictures made, 3 there already, 0 not made" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in names} == before
    now = {name: (output / name).stat().st_mtime_ns for name in names}
    assert [name for name in names if now[name] != stamps[name]] == [names[1]]

    with monkeypatch.context() as patch:
        patch.setattr(
            "models.generate.model.Generator.__init__", lambda *_: pytest.fail("nothing is left to do")
        )
        assert main([*words, *QUICK]) == 0
        (output / names[0]).write_bytes(before[names[0]][:-200])
        picture().save(output / names[1])
        assert main([*words, "--steps", "4", "--threads", "1"]) == 2
    said = capsys.readouterr().err
    assert f"p.jsonl:1: {output / names[0]}: not a readable PNG" in said
    assert f"p.jsonl:1: {output / names[1]}: says nothing of how it was made" in said
    assert f"p.jsonl:2: {output / names[2]} was made with other settings: steps 3, now 4" in said
    assert main([*words, *QUICK, "--overwrite"]) == 0
    assert {name: (output / name).read_bytes() for name in names} == before


def test_a_killed_run_leaves_whole_pictures_and_the_next_makes_the_rest(
    tmp_path: Path, folder: Path, worker_server: WorkerServer
) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", *({"prompt": f"a star {k}", "seed": k} for k in range(40)))
    words = [
        "--model",
        str(folder),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "made"),
        "--threads",
        "1",
    ]
    words += ["--steps", "20"]
    worker_server.start()
    process = subprocess.Popen(
        [sys.executable, "-m", "models.generate", *words],
        cwd=ROOT,
        env=os.environ | worker_server.commands("models.generate"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((tmp_path / "made").glob("*.png"))) >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    made = {path: path.read_bytes() for path in (tmp_path / "made").glob("[0-9]*.png")}
    assert 2 <= len(made) < 40, errors[-2000:]
    assert main(words) == 0, "every file that the killed run left is whole, or this would be refused"
    assert len(list((tmp_path / "made").glob("[0-9]*.png"))) == 40
    assert {path: path.read_bytes() for path in made} == made


def test_workers_make_the_pictures_that_one_process_makes(
    tmp_path: Path, folder: Path, ray_session: object
) -> None:
    picture(32, 48).save(tmp_path / "source.png")
    lines = [{"prompt": f"a star {k}", "seed": k} for k in range(4)]
    lines += [{"prompt": f"make it {k}", "image": "source.png", "seed": k} for k in range(3)]
    prompts = write_lines(tmp_path / "p.jsonl", *lines)
    for name, more in (("here", []), ("there", ["--workers", "2"])):
        words = ["--model", str(folder), "--prompts", str(prompts), "--output", str(tmp_path / name)]
        assert main([*words, *QUICK, *more]) == 0
    for number in range(1, 8):
        here, there = (tmp_path / name / f"{number:05d}.png" for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes(), number


def test_one_bad_prompt_of_a_batch_leaves_the_others(
    tmp_path: Path, metaquery_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": prompt} for prompt in ("a star", "a <|im_end|> star", "a cross")]
    prompts = write_lines(tmp_path / "p.jsonl", *lines)
    model, vlm = metaquery_folders
    words = [
        "--model",
        str(model),
        "--vlm",
        str(vlm),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*words, *QUICK, "--batch-size", "3"]) == 1
    said = capsys.readouterr()
    assert "2 pictures made, 0 there already, 1 not made" in said.out
    assert "p.jsonl:2:" in said.err and "control tokens" in said.err
    assert [path.name for path in sorted((tmp_path / "made").iterdir())] == ["00001.png", "00003.png"]


def test_a_page_draws_as_the_command_line_does_and_asks_for_gradio(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.generate.jobs import Options
    from models.generate.model import ModelSpec, checked

    words = ["--model", str(folder), "--prompt", "a star", "--output", str(tmp_path / "a.png"), *QUICK]
    assert main(words) == 0
    page = Page(
        checked(ModelSpec(model=folder, dtype="float32", device="cpu", threads=1)), Options(), tmp_path
    )
    drawn = Path(page.draw("a star", None, 42.0, 3.0, 3.5))
    assert drawn.read_bytes() == (tmp_path / "a.png").read_bytes()
    picture().save(tmp_path / "room.png")
    picture(seed=1).save(tmp_path / "cat.png")
    names = [str(tmp_path / name) for name in ("room.png", "cat.png")]
    both = Path(page.draw("put it there", names[0], 42.0, 3.0, 3.5, names[1:]))
    assert record(both)["further_images"] == names[1:]
    with pytest.raises(Refused, match="beside a picture to edit"):
        page.draw("put it there", None, 42.0, 3.0, 3.5, names[1:])
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--model", str(folder), "--page"]) == 2
    assert "pip install 'unipic-rl[page]'" in capsys.readouterr().err
