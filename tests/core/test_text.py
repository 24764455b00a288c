"""Text is read in any UTF-8 form, and what no worker could carry is named where it enters."""

import pytest

from core.prompts import load_prompts
from core.recipe import ConfigError
from core.text import DEEPEST, broken_texts, parse_json, read_text
from rl.recipe.schema import load_config


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert read_text(tmp_path / "a.jsonl").startswith("{")
    assert parse_json((tmp_path / "a.jsonl").read_bytes()) == {"prompt": "a"}
    (prompt,) = load_prompts(tmp_path / "a.jsonl", "t2i")
    assert prompt.prompt == "a" and prompt.name == f"{tmp_path}/a.jsonl:1"


@pytest.mark.parametrize("levels", [DEEPEST + 1, 500, 100_000])
def test_deep_json_is_an_error_of_its_own(levels):
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} levels deep"):
        parse_json(nested(levels))


def test_wide_json_is_not_deep():
    assert len(parse_json("[" + ",".join([nested(DEEPEST - 1)] * 100) + "]")) == 100


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (r'{"a": {"b": ["x", "y \udc00"]}}', r"key 'a\.b\[1\]' holds '\\udc00' as character 3"),
        (r'{"\ud83d": 1}', r"key '\\ud83d' holds '\\ud83d' as character 1"),
        (r'"\ud83d"', r"^holds '\\ud83d'"),
    ],
)
def test_half_of_a_surrogate_pair_is_named(text, where):
    with pytest.raises(ValueError, match=where):
        parse_json(text)


def test_whole_pairs_and_control_characters_stay_as_they_are():
    assert parse_json(r'["\ud83d\ude00", "\u0000", "\u200b"]') == ["\U0001f600", "\0", "\u200b"]
    assert list(broken_texts({"a": ["\U0001f600", 3, None]})) == []


@pytest.mark.parametrize(
    ("value", "cause"),
    [('"\\ud83d"', "invalid Unicode character escape"), ("\udcff", "surrogates not allowed")],
)
def test_recipes_hold_no_half_pairs(value, cause):
    with pytest.raises(ConfigError, match=f"override 'rollout.negative_prompt=.*{cause}"):
        load_config("recipes/shapes/pdtr.yaml", [f"rollout.negative_prompt={value}"])
