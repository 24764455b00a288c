"""Prompt files are read whole or refused line by line; which prompts a step samples needs the step alone."""

import base64
import hashlib
import io
import json

import pytest
from PIL import Image

from core.prompts import Prompt, PromptFileError, load_prompts, load_references
from core.seeds import derive_seed
from rollout.prompts import GroupSampler


def png(colour=(200, 30, 40), size=(4, 3), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.fixture
def jsonl(tmp_path):
    """Writes records (or raw lines) to a prompt file."""

    def write(*lines, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write


def test_text_to_image_lines(jsonl):
    path = jsonl({"prompt": "a red circle", "metadata": {"tag": "colors"}}, "", {"prompt": "a blue star"})
    assert load_prompts(path, "t2i") == [
        Prompt(0, "t2i", "a red circle", (), {"tag": "colors"}),
        Prompt(1, "t2i", "a blue star", (), {}),
    ]


def test_official_geneval_lines_load_unchanged(jsonl):
    line = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    }
    (prompt,) = load_prompts(jsonl(line), "t2i")
    assert prompt.prompt == "a photo of two clocks"
    assert prompt.metadata == {key: line[key] for key in ("tag", "include", "exclude")}


def test_editing_lines_hold_a_path_or_a_data_uri(jsonl, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.png").write_bytes(png())
    lines = [
        {"prompt": "make it blue", "image": "images/cat.png", "metadata": {"kind": "recolour"}},
        {"prompt": "make it green", "image": data_uri(png((1, 2, 3)))},
    ]
    from_file, from_uri = load_prompts(jsonl(*lines), "edit")
    assert from_file.references == (str(tmp_path / "images" / "cat.png"),)
    assert from_file.metadata == {"kind": "recolour"}
    assert load_references(from_file)[0].getpixel((0, 0)) == (200, 30, 40)
    assert load_references(from_uri)[0].getpixel((0, 0)) == (1, 2, 3)


def test_a_relative_prompt_file_gives_absolute_references(jsonl, tmp_path, monkeypatch):
    """Workers run elsewhere, so a reference must not depend on the working directory."""
    (tmp_path / "cat.png").write_bytes(png())
    jsonl({"prompt": "make it blue", "image": "cat.png"})
    monkeypatch.chdir(tmp_path)
    (prompt,) = load_prompts("prompts.jsonl", "edit")
    assert prompt.references == (str(tmp_path / "cat.png"),)


@pytest.mark.parametrize(
    ("task", "line", "expected"),
    [
        ("t2i", "{not json", "not valid JSON"),
        ("t2i", "[1, 2]", "expected a JSON object, found list"),
        ("t2i", {"metadata": {}}, "key 'prompt' must be a non-empty string"),
        ("t2i", {"prompt": "  "}, "key 'prompt' must be a non-empty string"),
        ("t2i", {"prompt": 5}, "key 'prompt' must be a non-empty string"),
        ("t2i", {"prompt": "a", "metadata": [1]}, "key 'metadata' must be an object, found list"),
        ("t2i", {"prompt": "a", "image": "cat.png"}, "key 'image' belongs to editing prompts"),
        ("edit", {"prompt": "a"}, "key 'image' must name the reference image"),
        ("edit", {"prompt": "a", "image": 7}, "key 'image' must name the reference image"),
        ("edit", {"prompt": "a", "image": "absent.png"}, "absent.png does not exist"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(jsonl, task, line, expected):
    good = {"prompt": "good"} if task == "t2i" else {"prompt": "good", "image": data_uri(png())}
    path = jsonl(good, line)
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path, task)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2: ")
    assert expected in problem


def test_every_bad_line_is_told_at_once(jsonl):
    path = jsonl("{", {"prompt": "fine"}, "", {"prompt": ""}, "[]")
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path, "t2i")
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:{n}" for n in (1, 4, 5)]


def test_only_newlines_end_a_line(jsonl):
    """JSON may hold U+2028 unescaped, which str.splitlines would cut at."""
    path = jsonl('{"prompt": "a\u2028b"}', "{")
    with pytest.raises(PromptFileError) as caught:
        load_prompts(path, "t2i")
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [f"{path}:2"]
    assert [p.prompt for p in load_prompts(jsonl('{"prompt": "a\u2028b"}\r', name="crlf.jsonl"), "t2i")] == [
        "a\u2028b"
    ]


def test_files_without_prompts_are_refused(jsonl, tmp_path):
    with pytest.raises(PromptFileError, match="holds no prompts"):
        load_prompts(jsonl("", " "), "t2i")
    with pytest.raises(PromptFileError, match="absent.jsonl: cannot be read"):
        load_prompts(tmp_path / "absent.jsonl", "t2i")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(PromptFileError, match="latin.jsonl: cannot be read"):
        load_prompts(tmp_path / "latin.jsonl", "t2i")


@pytest.mark.parametrize(
    "reference",
    [
        "data:image/png;base64,####",
        "data:image/png;base64,é",
        "data:image/png",
        data_uri(b"no image"),
        data_uri(png()[:-25]),
        data_uri(png(size=(64, 64))[:60] + b"\0" * 40),
    ],
)
def test_an_unreadable_reference_is_named(reference):
    with pytest.raises(ValueError, match="reference image .* of prompt 3 is unreadable"):
        load_references(Prompt(3, "edit", "make it blue", (reference,)))


def test_a_reference_file_that_vanished_or_is_no_image(tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    for name in ("notes.png", "gone.png"):
        with pytest.raises(ValueError, match=f"{name} of prompt 0 is unreadable"):
            load_references(Prompt(0, "edit", "make it blue", (str(tmp_path / name),)))
    assert load_references(Prompt(0, "t2i", "a cat")) == []


def test_a_line_names_several_references_in_order_and_its_size(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), color).save(tmp_path / name)
    line = {"prompt": "put the cat of b into a", "references": ["b.png", "a.png"], "size": [48, 64], "k": 1}
    path = tmp_path / "edit.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (prompt,) = load_prompts(path, "edit")
    assert [image.getpixel((0, 0)) for image in load_references(prompt)] == [(0, 0, 255), (255, 0, 0)]
    assert prompt.size == (48, 64) and prompt.metadata == {"k": 1}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"references": []}, "'references' must be a list of one or more"),
        ({"references": ["a.png", 3]}, r"references\[1\] must name"),
        ({"references": ["a.png", "gone.png"]}, "gone.png does not exist"),
        ({"references": ["a.png"], "image": "a.png"}, "exclude each other"),
        ({"image": "a.png", "size": [64]}, r"'size' is \[64\]"),
        ({"image": "a.png", "size": [64, 0]}, r"write \[height, width\]"),
        ({"image": "a.png", "size": "64x64"}, "'size' is '64x64'"),
    ],
)
def test_references_and_sizes_that_say_nothing(tmp_path, line, problem):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = tmp_path / "edit.jsonl"
    path.write_text(json.dumps({"prompt": "x", **line}) + "\n")
    with pytest.raises(PromptFileError, match=problem):
        load_prompts(path, "edit")


def test_a_reference_is_upright_rgb(tmp_path):
    image = Image.new("L", (6, 2), 9)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    (loaded,) = load_references(Prompt(0, "edit", "x", (str(tmp_path / "turned.jpg"),)))
    assert loaded.mode == "RGB"
    assert loaded.size == (2, 6)


def test_a_transparent_reference_lies_on_white_as_it_does_for_the_pipeline(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 30, 40, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    image.save(tmp_path / "logo.png")
    (loaded,) = load_references(Prompt(0, "edit", "x", (str(tmp_path / "logo.png"),)))
    assert list(loaded.tobytes()) == [200, 30, 40, 255, 255, 255]


# ---- the group sampler ----------------------------------------------------------------------------------------

PROMPTS = [Prompt(i, "t2i", f"prompt {i}") for i in range(7)]
SAMPLER = GroupSampler(num_prompts=7, prompts_per_rollout=3, group_size=4, seed=5, stage="edit")


def test_groups_are_a_pure_function_of_the_step():
    forwards = [SAMPLER.groups(PROMPTS, step) for step in range(12)]
    backwards = [GroupSampler(7, 3, 4, 5, "edit").groups(PROMPTS, step) for step in reversed(range(12))]
    assert forwards == backwards[::-1]


def test_another_seed_or_stage_draws_otherwise():
    base = SAMPLER.groups(PROMPTS, 0)
    for other in (GroupSampler(7, 3, 4, 6, "edit"), GroupSampler(7, 3, 4, 5, "t2i")):
        assert {g.seeds for g in base}.isdisjoint(g.seeds for g in other.groups(PROMPTS, 0))


def test_each_prompt_is_seen_once_per_epoch():
    order = [group.prompt.index for step in range(28) for group in SAMPLER.groups(PROMPTS, step)]
    epochs = [order[start : start + 7] for start in range(0, 84, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ids_and_seeds_never_repeat():
    groups = [group for step in range(40) for group in SAMPLER.groups(PROMPTS, step)]
    assert [group.id for group in groups] == list(range(120))
    seeds = [seed for group in groups for seed in group.seeds]
    assert len(seeds) == len(set(seeds)) == 480
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_rollout_larger_than_the_set_repeats_prompts_under_other_ids():
    groups = GroupSampler(2, 5, 2, 0, "s").groups(PROMPTS[:2], 0)
    assert len(groups) == 5
    assert len({group.id for group in groups}) == 5
    assert len({group.seeds for group in groups}) == 5


def test_derived_seeds_are_stable_and_tell_types_apart():
    """A change of these figures would change every run."""
    assert derive_seed("a", 1) == 2125957440892058690
    assert derive_seed("a", 1) == int(hashlib.sha256(b"str:a\x1fint:1").hexdigest()[:16], 16) // 2
    assert derive_seed("a", 1) != derive_seed("a", "1")
    assert derive_seed(12, 3) != derive_seed(1, 23)
