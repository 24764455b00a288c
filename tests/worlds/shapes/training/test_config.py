from pathlib import Path

import pytest

from core.recipe import ConfigError
from worlds.shapes.training.config import RECIPES, KontextRecipe, load_recipe

SHAPES = Path(__file__).parents[4] / "recipes" / "shapes"


@pytest.mark.parametrize("stage", sorted(RECIPES))
def test_the_shapes_recipes_load(stage):
    recipe = load_recipe(SHAPES / f"{stage}.yaml")
    assert type(recipe) is RECIPES[stage]
    assert recipe.stage == stage


def test_overrides_reach_nested_keys():
    recipe = load_recipe(
        SHAPES / "kontext.yaml", ["optimization.lr=0.5", "model.layers=2", "steps=7", "stop_step=0"]
    )
    assert isinstance(recipe, KontextRecipe)
    assert (recipe.optimization.lr, recipe.model.layers, recipe.steps) == (0.5, 2, 7)


def test_every_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError) as caught:
        load_recipe(SHAPES / "vae.yaml", ["stepz=3", "optimization.lrr=1", "model.latent_chanels=4"])
    message = str(caught.value)
    assert "did you mean 'steps'?" in message
    assert "did you mean 'optimization.lr'?" in message
    assert "did you mean 'model.latent_channels'?" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("steps=0", "steps=0 must be at least 1"),
        ("steps=many", "steps"),
        ("export_dtype='int8' is not one of", "export_dtype='int8' is not one of"),
        ("optimization.ema_decay=1", "optimization.ema_decay"),
        ("prompt_dropout=2", "prompt_dropout=2"),
        ("edit_share=-1", "edit_share=-1"),
        ("stop_step=9000000", "stop_step=9000000"),
        ("targets.t2i=2", "targets.t2i=2"),
        ("targets.edit=0", "targets.edit=0"),
        ("targets.every=0", "targets.every=0"),
        ("targets.insert=.5", "targets.insert=0.5: insert_share or the other targets are 0"),
        ("save_every=50", "save_every=50 must be a multiple of targets.every=100"),
        ("stop_step=250", "stop_step=250 must be a multiple"),
        ("stage=rl", "stage='rl' is not one of vae, text, kontext"),
    ],
)
def test_bad_values_are_refused_by_name(override, part):
    with pytest.raises(ConfigError) as caught:
        load_recipe(SHAPES / "kontext.yaml", [override])
    assert part in str(caught.value)


def test_a_required_key_without_value_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: vae\noutput_dir: out\n")
    with pytest.raises(ConfigError, match="key 'steps' has no value"):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.yaml does not exist"):
        load_recipe(tmp_path / "absent.yaml")
