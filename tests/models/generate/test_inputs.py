"""What the command line is given: lines that are wrong, sizes, every kind of picture; and batches against singles."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.generate.__main__ import main
from models.generate.jobs import Job, Options, job_pictures, orders_of_line
from models.generate.metadata import png_bytes, read_record
from models.generate.model import Generator, ModelSpec, checked
from models.generate.task_lines import Refused
from models.sizes import geometry
from models.understand.__main__ import main as understand


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def spec_of(kind: str, folder: Path, metaquery_folders: tuple[Path, Path]) -> ModelSpec:
    model, vlm = (folder, None) if kind == "kontext" else metaquery_folders
    return checked(ModelSpec(model=model, vlm=vlm, dtype="float32", device="cpu", threads=1))


def jobs_of(spec: ModelSpec, prompts: list[str], image: Path | None) -> list[Job]:
    jobs = []
    for seed, prompt in enumerate(prompts, 11):
        options = Options(steps=3, height=32, width=32, seed=seed)
        source = [] if image is None else [str(image)]
        (order,) = orders_of_line(
            prompt, source, Path("x.png"), options, model=geometry(spec.model), origin=""
        )
        jobs.append(order.job)
    return jobs


@pytest.mark.parametrize("edit", [False, True], ids=["t2i", "edit"])
@pytest.mark.parametrize("kind", ["kontext", "metaquery"])
def test_a_picture_is_the_same_alone_and_in_a_batch(
    tmp_path: Path, folder: Path, metaquery_folders: tuple[Path, Path], kind: str, edit: bool
) -> None:
    """Also after other pictures, and whatever the global generator did."""
    spec = spec_of(kind, folder, metaquery_folders)
    source = tmp_path / "source.png"
    picture(40, 32).save(source)
    jobs = jobs_of(
        spec, ["a red star", "a blue circle on the left of a cross", "a cross"], source if edit else None
    )
    pictures = [job_pictures(job) for job in jobs]
    assert [job.seed for job in jobs] == [11, 12, 13]
    generator = Generator(spec)
    together = generator.latents(jobs, pictures)
    torch.randn(3)
    alone = torch.cat([generator.latents([job], [data]) for job, data in zip(jobs, pictures, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    again = torch.cat([generator.latents([job], [data]) for job, data in zip(jobs, pictures, strict=True)])
    assert torch.equal(alone, again)
    assert (alone[0] - alone[1]).abs().max() > 0.1, "another seed and prompt draw something else"


def exif_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(64, 32).save(path, exif=exif)


KINDS = {
    "rgba.png": lambda path: picture().convert("RGBA").save(path),
    "palette.png": lambda path: picture().quantize(16).save(path),
    "grey.png": lambda path: picture().convert("L").save(path),
    "grey_alpha.png": lambda path: picture().convert("LA").save(path),
    "cmyk.jpg": lambda path: picture().convert("CMYK").save(path),
    "one_bit.png": lambda path: picture().convert("1").save(path),
    "turned.jpg": exif_turned,
    "dot.png": lambda path: picture(1, 1).save(path),
    "large.jpg": lambda path: picture(1500, 1000).save(path),
}


def test_every_kind_of_picture_is_edited(tmp_path: Path, folder: Path) -> None:
    for name, save in KINDS.items():
        save(tmp_path / name)
    lines = [{"prompt": "make it red", "image": name, "output": f"{name}.png"} for name in KINDS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*words, "--steps", "2", "--threads", "1"]) == 0
    sizes = {name: Image.open(tmp_path / "made" / f"{name}.png").size for name in KINDS}
    assert sizes.pop("turned.jpg") == (16, 32), "the picture stands upright before its size is chosen"
    assert sizes.pop("large.jpg") == (32, 16)
    assert set(sizes.values()) == {(32, 32)}


def test_transparency_lies_on_white_and_a_turned_picture_stands_upright(
    tmp_path: Path, folder: Path, metaquery_folders: tuple[Path, Path]
) -> None:
    """The same latents as from the plain picture that a viewer shows, for both models."""
    clear = picture().convert("RGBA")
    clear.putalpha(Image.fromarray(np.tri(32, dtype=np.uint8) * 255))
    flat = np.where(np.asarray(clear)[..., 3:] > 0, np.asarray(clear)[..., :3], 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pairs = {
        "clear": (clear, None, Image.fromarray(flat)),
        "turned": (picture(), exif, picture().rotate(-90)),
    }
    for kind in ("kontext", "metaquery"):
        spec = spec_of(kind, folder, metaquery_folders)
        generator = Generator(spec)
        for name, (given, tags, shown) in pairs.items():
            given.save(tmp_path / "given.png", **({"exif": tags} if tags else {}))
            shown.save(tmp_path / "shown.png")
            latents = []
            for path in (tmp_path / "given.png", tmp_path / "shown.png"):
                (job,) = jobs_of(spec, ["make it red"], path)
                latents.append(generator.latents([job], [job_pictures(job)]))
            assert torch.equal(*latents), (kind, name)


BAD = {
    "broken json": ('{"prompt": ', "not valid JSON"),
    "list": ("[1]", "expected a JSON object, found list"),
    "no prompt": ('{"image": "ok.png"}', "key 'prompt' is missing"),
    "empty": ('{"prompt": " "}', "the prompt is empty"),
    "unknown": ('{"prompt": "x", "guidence": 3}', "unknown key 'guidence': did you mean 'guidance'?"),
    "kind": ('{"prompt": "x", "seed": "one"}', "key 'seed' must be a whole number, found 'one'"),
    "flag": ('{"prompt": "x", "steps": true}', "key 'steps' must be a whole number, found True"),
    "seed": ('{"prompt": "x", "seed": -1}', "seed -1: must be 0 or more"),
    "steps": ('{"prompt": "x", "steps": 0}', "steps 0: must be 1 or more"),
    "guidance": ('{"prompt": "x", "guidance": -2}', "guidance -2: must be a number that is not negative"),
    "nan": ('{"prompt": "x", "guidance": NaN}', "guidance nan"),
    "size": ('{"prompt": "x", "height": 30, "width": 32}', "multiples of 8 and at most 128"),
    "one side": ('{"prompt": "x", "height": 32}', "height 32 and width None: give both"),
    "jpeg": ('{"prompt": "x", "output": "a.jpg"}', "pictures are PNG files"),
    "both": ('{"prompt": "x", "image": "ok.png", "references": ["ok.png"]}', "'image' and 'references' exclude"),
    "no list": ('{"prompt": "x", "references": "ok.png"}', "key 'references' must be a list, found 'ok.png'"),
    "numbers": ('{"prompt": "x", "references": ["ok.png", 3]}', "key 'references' must hold paths, found 3"),
    "no entry": ('{"prompt": "x", "references": []}', "key 'references' is empty"),
    "further": ('{"prompt": "x", "references": ["ok.png", "gone.png"]}', "gone.png is unreadable"),
    "pixels": (
        '{"prompt": "x", "references": ["ok.png", "ok.png"], "reference_pixels": 9}', "2 references in 9 pixels"
    ),
    "no pixels": ('{"prompt": "x", "reference_pixels": 0}', "reference_pixels 0: must be 1 or more"),
    "gone": ('{"prompt": "x", "image": "gone.png"}', "gone.png is unreadable"),
    "cut": ('{"prompt": "x", "image": "cut.png"}', "cut.png is unreadable (image file is truncated"),
    "deep": ('{"prompt": "x", "image": "deep.tif"}', "deep.tif is unreadable ("),
    "thin": ('{"prompt": "x", "image": "thin.png"}', "thin.png: proportions of 1 x 400 are beyond 8:1"),
    "huge": ('{"prompt": "x", "image": "huge.png"}', "huge.png is unreadable (10000 x 9000 px are more than the 89"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_bad_line_is_named_before_anything_starts(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture().save(tmp_path / "ok.png")
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    Image.new("F", (8, 8)).save(tmp_path / "deep.tif")
    picture(1, 400).save(tmp_path / "thin.png")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "huge.png")
    good = ['{"prompt": "x", "metadata": {"tag": "y"}}', '{"prompt": "x", "output": "00001.png"}']
    (tmp_path / "p.jsonl").write_text("\n".join([*good, "", *(line for line, _ in BAD.values())]))
    monkeypatch.setattr(Generator, "__init__", lambda *_: pytest.fail("nothing may start"))
    words = [
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main(words) == 2
    said = capsys.readouterr().err
    for number, (_, message) in enumerate(BAD.values(), 4):
        assert any(f"p.jsonl:{number}: " in line and message in line for line in said.splitlines()), message
    assert "p.jsonl:2: output" in said and "is that of" in said and "p.jsonl:1 too" in said
    assert not (tmp_path / "made").exists()


def test_a_thin_picture_is_edited_where_its_size_is_given(tmp_path: Path, folder: Path) -> None:
    picture(1, 400).save(tmp_path / "thin.png")
    words = ["--model", str(folder), "--prompt", "x", "--image", str(tmp_path / "thin.png"), "--steps", "2"]
    words += ["--output", str(tmp_path / "made.png"), "--height", "64", "--width", "16", "--threads", "1"]
    assert main(words) == 0
    assert Image.open(tmp_path / "made.png").size == (16, 64)


def test_a_picture_that_changes_after_it_was_checked_is_not_edited(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "source.png"
    picture().save(source)
    (order,) = orders_of_line(
        "x", [str(source)], tmp_path / "a.png", Options(), model=geometry(folder), origin="--prompt"
    )
    assert job_pictures(order.job) == [source.read_bytes()]
    picture(seed=1).save(source)
    with pytest.raises(ValueError, match="source.png has changed"):
        job_pictures(order.job)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "7"}, "key 'seed' must be a whole number"),
        ({"steps": None}, "key 'steps' is missing"),
        ({"sampler": "x"}, "unknown key 'sampler'"),
    ],
)
def test_metadata_that_was_changed_by_hand_is_checked(
    tmp_path: Path, folder: Path, change: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made, forged = tmp_path / "made.png", tmp_path / "forged.png"
    words = ["--model", str(folder), "--prompt", "x", "--steps", "1", "--threads", "1", "--output", str(made)]
    assert main(words) == 0
    record = read_record(made) | change
    forged.write_bytes(png_bytes(np.asarray(Image.open(made)), record))
    assert main(["--from-metadata", str(forged), "--output", str(tmp_path / "again.png")]) == 2
    assert f"{forged}: its 'unipic-rl' text cannot be used: {message}" in capsys.readouterr().err


def test_a_picture_from_before_there_were_further_references_is_read(tmp_path: Path, folder: Path) -> None:
    made, old = tmp_path / "made.png", tmp_path / "old.png"
    words = ["--model", str(folder), "--prompt", "x", "--steps", "1", "--threads", "1", "--output", str(made)]
    assert main(words) == 0
    record = read_record(made)
    fewer = {
        key: value for key, value in record.items() if "further" not in key and key != "reference_pixels"
    }
    old.write_bytes(png_bytes(np.asarray(Image.open(made)), fewer))
    assert len(fewer) == len(record) - 3 and read_record(old) == record


def test_a_line_that_gives_a_size_takes_nothing_of_it_from_the_command_line(
    folder: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": "a", "aspect_ratio": "2:1"}, {"prompt": "a", "longer_edge": 64}, {"prompt": "a"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--model",
        str(folder),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*words, "--height", "16", "--width", "48", "--steps", "1", "--threads", "1"]) == 0
    sizes = [Image.open(path).size for path in sorted((tmp_path / "made").iterdir())]
    assert sizes == [(32, 16), (64, 64), (48, 16)]


def test_words_that_contradict_each_other_are_refused_together(
    tmp_path: Path, folder: Path, metaquery_folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompts", "p.jsonl", "--prompt", "x", "--image", "a.png", "--num-images", "0"]) == 2
    said = capsys.readouterr().err
    for message in (
        "give one of --prompt",
        "give --output",
        "--image belongs to",
        "give --model",
        "--num-images 0",
    ):
        assert message in said
    model, vlm = metaquery_folders
    with pytest.raises(Refused, match="is a MetaQuery folder .* give its Qwen2.5-VL as --vlm"):
        checked(ModelSpec(model=model, dtype="float32", device="cpu", threads=1))
    with pytest.raises(Refused, match="--max-sequence-length 9: MetaQuery reads prompts whole"):
        checked(
            ModelSpec(model=model, vlm=vlm, dtype="float32", device="cpu", threads=1, max_sequence_length=9)
        )
    with pytest.raises(Refused, match="--vlm=.* is a Kontext folder"):
        checked(ModelSpec(model=folder, vlm=vlm, dtype="float32", device="cpu", threads=1))
    with pytest.raises(Refused, match="no such model folder"):
        checked(ModelSpec(model=tmp_path / "gone", dtype="float32", device="cpu", threads=1))
    words = ["--model", str(folder), "--prompt", "x", "--output", str(tmp_path / "a.png")]
    assert main([*words, "--adapter", str(tmp_path / "none")]) == 2
    assert "an adapter is a PEFT folder" in capsys.readouterr().err


def test_a_submitted_job_takes_absolute_paths_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    words = ["--model", "recipes/shapes/base", "--prompts", "p.jsonl", "--output", "made", "--workers", "-1"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--output made is relative" in said and "--prompts p.jsonl is relative" in said
    assert "--model" not in said and "--workers -1" in said
    assert understand(["--vlm", "vlm", "--question", "x", "--image", "a.png"]) == 2
    assert "--image a.png is relative" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_cannot_be_loaded_stop_with_the_folder(
    tmp_path: Path, folder: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["--model", str(model), "--prompt", "x", "--steps", "1", "--threads", "1"]
    assert main([*words, "--output", str(tmp_path / "a.png")]) == 3
    assert f"Stopped: {model} cannot be loaded: " in capsys.readouterr().err
