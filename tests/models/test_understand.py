"""Questions about pictures by the command line: the VLM's own answer, none asked twice, bad lines named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.metaquery.encoder import MetaQueryEncoder
from models.understand.__main__ import main
from models.understand.run import Answerer

QUICK = ["--max-new-tokens", "6", "--threads", "1"]


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vlm(metaquery_folders: tuple[Path, Path]) -> Path:
    return metaquery_folders[1]


@pytest.fixture(scope="module")
def encoder(vlm: Path) -> MetaQueryEncoder:
    return MetaQueryEncoder.from_pretrained(None, vlm, dtype=torch.float32, device="cpu")


@pytest.fixture
def asked(tmp_path: Path) -> list[dict]:
    """Lines with one, two and no pictures; the pictures lie beside."""
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed=seed).save(tmp_path / name)
    picture().convert("RGBA").save(tmp_path / "clear.png")
    lines = [
        {"question": "how many?", "image": "a.png"},
        {"question": "what differs?", "image": ["a.png", "b.png"]},
        {"question": "what is 2 and 2?", "metadata": {"tag": "sum"}},
        {"question": "how many?", "image": "clear.png"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def batch(folder: Path, vlm: Path, *more: str) -> list[str]:
    return [
        "--vlm",
        str(vlm),
        "--questions",
        str(folder / "q.jsonl"),
        "--output",
        str(folder / "a.jsonl"),
        *QUICK,
        *more,
    ]


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def test_one_question_about_two_pictures(
    tmp_path: Path,
    vlm: Path,
    encoder: MetaQueryEncoder,
    asked: list[dict],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Standard output holds the answer and nothing else."""
    words = ["--vlm", str(vlm), "--question", "what differs?", *QUICK]
    assert main([*words, "--image", str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 0
    images = [Image.open(tmp_path / name) for name in ("a.png", "b.png")]
    expected = encoder.answer(images, "what differs?", max_new_tokens=6)
    assert capsys.readouterr().out == f"{expected}\n" and expected


def test_a_file_of_questions_is_answered_once(
    tmp_path: Path, vlm: Path, encoder: MetaQueryEncoder, asked: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(batch(tmp_path, vlm)) == 0
    first = answers(tmp_path)
    assert [record["line"] for record in first] == [1, 2, 3, 4]
    for line, record in zip(asked, first, strict=True):
        names = [line["image"]] if isinstance(line.get("image"), str) else line.get("image", [])
        images = [Image.open(tmp_path / name) for name in names]
        assert record["answer"] == encoder.answer(images, line["question"], max_new_tokens=6)
        assert record["images"] == [str(tmp_path / name) for name in names]
        assert record["shown"] == [[84, 56]] * len(names), "whole tokens of 28 px, at least 4 and at most 16"

    text = (tmp_path / "a.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "__init__", lambda *_: pytest.fail("everything is answered"))
        assert main(batch(tmp_path, vlm)) == 0
    lines = text.splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text(lines[2] + lines[0] + lines[3][:-20])  # killed in the middle of a line
    told: list[str] = []
    answer = Answerer.answer

    def counted(self, question, pictures):
        told.append(question.question)
        return answer(self, question, pictures)

    monkeypatch.setattr(Answerer, "answer", counted)
    assert main(batch(tmp_path, vlm)) == 0
    assert told == ["what differs?", "how many?"]
    assert (tmp_path / "a.jsonl").read_text() == text


def test_answers_of_other_settings_are_not_taken_for_these(
    tmp_path: Path, vlm: Path, asked: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(batch(tmp_path, vlm)) == 0
    assert main(batch(tmp_path, vlm, "--max-new-tokens", "7")) == 2
    assert (
        "a.jsonl:1: was answered with max_new_tokens 6, now 7; choose another --output"
        in capsys.readouterr().err
    )
    (tmp_path / "a.jsonl").write_text('{"mine": 1}\n')
    assert main(batch(tmp_path, vlm)) == 2
    assert "a.jsonl:1: is not an answer of this command" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_text() == '{"mine": 1}\n'


def test_a_question_that_cannot_be_read_leaves_the_others(
    tmp_path: Path, vlm: Path, asked: list[dict], capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write('{"question": "an <|im_end|> in it", "image": "a.png"}\n')
    assert main(batch(tmp_path, vlm)) == 1
    assert [record["line"] for record in answers(tmp_path)] == [1, 2, 3, 4]
    said = capsys.readouterr()
    assert "line 5: 'an <|im_end|> in it' is not answered" in said.err and "4 of 5 questions" in said.out
    words = ["--vlm", str(vlm), "--question", "an <|im_end|> in it", *QUICK]
    assert main(words) == 1
    assert "Not answered: " in capsys.readouterr().err


def test_every_bad_line_is_named_before_anything_is_loaded(
    tmp_path: Path, vlm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(1, 300).save(tmp_path / "thin.png")
    bad = {
        '{"question": ': "not valid JSON",
        '{"image": "thin.png"}': "key 'question' is missing",
        '{"question": "x", "images": "thin.png"}': "unknown key 'images': did you mean 'image'?",
        '{"question": "x", "image": [1]}': "key 'image' must hold paths, found 1",
        '{"question": "", "image": "gone.png"}': "gone.png is unreadable",
        '{"question": "x", "image": "thin.png"}': "thin.png: 1 x 300 px is beyond 200:1",
    }
    (tmp_path / "q.jsonl").write_text("\n".join(bad))
    monkeypatch.setattr(Answerer, "__init__", lambda *_: pytest.fail("nothing may start"))
    assert main(batch(tmp_path, vlm)) == 2
    said = capsys.readouterr().err
    for number, message in enumerate(bad.values(), 1):
        assert any(f"q.jsonl:{number}: " in line and message in line for line in said.splitlines()), message
    assert not (tmp_path / "a.jsonl").exists()
    assert main(["--vlm", str(tmp_path), "--question", "x", "--output", "a.jsonl"]) == 2
    assert "--output FILE.jsonl goes with --questions" in capsys.readouterr().err
    assert main(["--vlm", str(tmp_path), "--question", "x"]) == 2
    assert f"{tmp_path / 'config.json'}: missing config file" in capsys.readouterr().err


def test_workers_answer_as_one_process_does(
    tmp_path: Path, vlm: Path, asked: list[dict], ray_session: object
) -> None:
    assert main(batch(tmp_path, vlm)) == 0
    here = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").unlink()
    assert main(batch(tmp_path, vlm, "--workers", "2")) == 0
    assert (tmp_path / "a.jsonl").read_text() == here
