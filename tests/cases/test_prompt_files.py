"""Prompt files and batch files of `models.generate`: every line is read as it is, or named."""

import json
from pathlib import Path

import pytest

from core.prompts import PromptFileError, load_prompts
from models.generate.jobs import Options, orders_of_file
from models.generate.task_lines import Refused
from models.sizes import geometry
from tests.cases.conftest import CASES

HALF = "holds '\\ud83d' as character 7: half of a surrogate pair"
BAD = {
    "blank.jsonl": ["blank.jsonl: holds no prompts"],
    "deep.jsonl": ["deep.jsonl:1: not readable JSON (lists and objects are nested more than 64 levels deep)"],
    "latin1.jsonl": ["latin1.jsonl: cannot be read ('utf-8' codec can't decode"],
    "lone_surrogate.jsonl": [f"lone_surrogate.jsonl:1: key 'prompt' {HALF}"],
    "truncated.jsonl": ["truncated.jsonl:2: not valid JSON"],
    "utf16.jsonl": ["utf16.jsonl: cannot be read ('utf-8' codec can't decode"],
}
TWO = ["a red circle", "a blue square"]
GOOD = {
    "bom.jsonl": TWO,
    "crlf.jsonl": TWO,
    "dup.jsonl": ["a red circle"] * 3,
    "dupkey.jsonl": ["a blue square"],
    "nul.jsonl": ["a red\0circle", "a blue square"],
    "zerowidth.jsonl": ["\u200b\u200b"],
}
LINES = {
    '{"prompt": "a", "metadata": {"x": ["\\udc00"]}}': "key 'metadata.x[0]' holds '\\udc00'",
    '{"prompt": "a", "\\ud83d": 1}': "key '\\ud83d' holds",
    '{"prompt": "a", "metadata": []}': "key 'metadata' must be an object, found list",
    '{"prompt": "a", "image": "x.png"}': "key 'image' belongs to editing prompts",
    '{"prompt": ["a"]}': "key 'prompt' must be a non-empty string",
    '{"prompt": null}': "key 'prompt' must be a non-empty string",
    "[" * 100_000: "nested more than 64 levels deep",
    "null": "expected a JSON object, found NoneType",
    "9" * 5000: "not valid JSON",
}


def test_no_case_is_forgotten():
    assert {path.name for path in (CASES / "prompts").iterdir()} == BAD.keys() | GOOD.keys()
    assert {path.name for path in (CASES / "texts").iterdir()} == BATCHES.keys() | {"gen_bom.jsonl"}


@pytest.mark.parametrize("name", BAD)
def test_a_prompt_file_is_refused_by_file_and_line(name):
    with pytest.raises(PromptFileError) as caught:
        load_prompts(CASES / "prompts" / name, "t2i")
    assert len(caught.value.problems) == len(BAD[name])
    for problem, expected in zip(caught.value.problems, BAD[name], strict=True):
        assert problem.startswith(f"{CASES}/prompts/{expected}")


@pytest.mark.parametrize("name", GOOD)
def test_a_prompt_file_is_read(name):
    prompts = load_prompts(CASES / "prompts" / name, "t2i")
    assert [prompt.prompt for prompt in prompts] == GOOD[name]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_is_refused_by_its_key(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(PromptFileError) as caught:
        load_prompts(tmp_path / "p.jsonl", "t2i")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/p.jsonl:2: ") and LINES[line] in problem


BATCHES = {
    "gen_idcase.jsonl": ["1: unknown key 'id'", "2: unknown key 'id'"],
    "gen_idpath.jsonl": ["1: unknown key 'id'"],
    "gen_nanseed.jsonl": [
        "1: key 'seed' must be a whole number, found nan",
        "2: guidance inf: must be a number that is not negative",
        "3: key 'steps' must be a whole number, found 2.0",
    ],
    "gen_sameid.jsonl": ["1: unknown key 'id'", "2: unknown key 'id'"],
    "gen_surrogate.jsonl": [f"2: key 'prompt' {HALF}"],
}
OUTPUTS = {
    '{"prompt": "a", "output": "x.png"}\n{"prompt": "b", "output": "x.png"}': "x.png is that of",
    '{"prompt": "a", "output": "x"}': "pictures are PNG files, so give a name in .png",
    '{"prompt": "a", "seed": 9223372036854775807}': "seed 9223372036854775807: must be 0 or more and below 2^63",
    '{"prompt": "a", "aspect_ratio": "0:1"}': "0:1",
    '{"prompt": "a", "longer_edge": -8}': "-8",
    '{"prompt": "a", "image": "data:image/png;base64,AAAA"}': "is unreadable",
    '{"prompt": "a", "image": 7}': "key 'image' must be a string, found 7",
}


def orders(path: Path) -> list:
    return orders_of_file(path, Path("made"), Options(), model=geometry(Path("recipes/shapes/base")))


@pytest.fixture
def base(monkeypatch):
    """The committed model, whose sizes a batch file is checked against."""
    monkeypatch.chdir(CASES.parents[1])


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_file_is_refused_by_file_and_line(base, name):
    with pytest.raises(Refused) as caught:
        orders(CASES / "texts" / name)
    assert len(caught.value.problems) == len(BATCHES[name])
    for problem, expected in zip(caught.value.problems, BATCHES[name], strict=True):
        assert problem.startswith(f"{CASES}/texts/{name}:{expected}")


def test_a_batch_file_with_a_byte_order_mark_is_read(base):
    (order,) = orders(CASES / "texts" / "gen_bom.jsonl")
    assert order.job.prompt == "a red circle" and order.output == Path("made/00001.png")


@pytest.mark.parametrize("lines", OUTPUTS, ids=range(len(OUTPUTS)))
def test_a_line_of_a_batch_file_is_refused(base, tmp_path, lines):
    (tmp_path / "b.jsonl").write_text(lines)
    with pytest.raises(Refused) as caught:
        orders(tmp_path / "b.jsonl")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/b.jsonl:") and OUTPUTS[lines] in problem


def test_a_prompt_of_the_command_line_holds_no_half_pair(base):
    from models.generate.jobs import orders_of_line

    model = geometry(Path("recipes/shapes/base"))
    with pytest.raises(Refused, match="prompt holds .* half of a surrogate pair"):
        orders_of_line("caf\udce9", (), Path("x.png"), Options(), model=model, origin="--prompt")


def test_metadata_are_kept_whole(tmp_path):
    record = {"prompt": "a", "metadata": {"k": [1, {"x": "\U0001f600\0\u200b"}]}}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    assert load_prompts(tmp_path / "p.jsonl", "t2i")[0].metadata == record["metadata"]
