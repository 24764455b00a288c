"""Recipes into dataclasses: bases, overrides, and every problem at once."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from core.recipe import ConfigError, flat, read_recipe, to_yaml


@dataclass
class Part:
    size: int = 3
    names: list[str] = field(default_factory=list)


@dataclass
class Whole:
    name: str = MISSING
    seed: int = 0
    part: Part = field(default_factory=Part)
    parts: list[Part] = field(default_factory=list)


def write(path, text):
    path.write_text(text)
    return path


def test_a_recipe_comes_over_its_base_and_overrides_over_both(tmp_path):
    write(tmp_path / "base.yaml", "name: one\nseed: 7\npart: {size: 5, names: [a, b]}\n")
    path = write(tmp_path / "recipe.yaml", "base: base.yaml\nname: two\npart: {names: [c]}\n")
    recipe = read_recipe(path, ["part.size=6"], Whole)
    assert recipe == Whole("two", 7, Part(6, ["c"]))
    again = read_recipe(write(tmp_path / "again.yaml", to_yaml(recipe)), [], Whole)
    assert again == recipe and flat(recipe)["part.size"] == 6


def test_all_problems_come_at_once(tmp_path):
    path = write(tmp_path / "recipe.yaml", "sed: 1\npart: {size: many}\nparts: [{sise: 1}]\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, [], Whole)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in (
        "unknown key 'sed': did you mean 'seed'?",
        "key 'name' has no value",
        "key 'part.size'",
        "unknown key 'parts[0].sise': did you mean 'parts[0].size'?",
    ):
        assert part in problems


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\nbase: recipe.yaml\n", [], "a recipe cannot stand on itself"),
        ("name: a\nbase: absent.yaml\n", [], "absent.yaml does not exist"),
        ("- a\n- b\n", [], "a recipe is a mapping of keys, found a ListConfig"),
        ("name: ${oc.env:HOME}\n", [], "must not read the environment"),
        ("name: a\n", ["seed"], "override 'seed': write it as key=value"),
        ("name: a\npart: 3\n", [], "key 'part' must be a mapping with keys size, names"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match="(?s)" + message.replace("(", r"\(")):
        read_recipe(write(tmp_path / "recipe.yaml", text), overrides, Whole)


def test_sections_of_other_readers_are_left_alone(tmp_path):
    path = write(tmp_path / "recipe.yaml", "name: a\nserve: {port: 1}\n")
    with pytest.raises(ConfigError, match="unknown key 'serve'"):
        read_recipe(path, [], Whole)
    assert read_recipe(path, [], Whole, others=["serve"]).name == "a"
