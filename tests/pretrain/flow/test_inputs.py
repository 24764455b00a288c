"""A resume of pre-training notices another model or other shards before it loads either."""

import json
import os

import pytest

from core.recipe import ConfigError
from core.training.run import INPUTS, check_reading
from pretrain.flow.preflight import held_inputs, model_folders
from tests.fakes.tiny_models import make_tiny_folder
from tests.pretrain.flow.flow_runs import flow_recipe


def test_models_are_held_by_their_bytes_and_sources_by_their_files(tmp_path):
    model = make_tiny_folder(tmp_path / "model") or tmp_path / "model"
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"shard")
    recipe = flow_recipe(tmp_path, model)
    recipe.data.sources[0].kind, recipe.data.sources[0].paths = "webdataset", [str(shard)]
    assert model_folders(recipe) == {"model.path": str(model)}
    checkpoint, held = tmp_path / "step_1", held_inputs(recipe)
    checkpoint.mkdir()
    reading = check_reading(None, 0, held, accept=False)
    (checkpoint / INPUTS).write_text(json.dumps({"inputs": {"held": held, "told": reading.inputs.told}}))
    assert check_reading(checkpoint, 1, held_inputs(recipe), accept=False) == reading
    os.utime(shard, (1, 1))
    config = model / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ConfigError) as caught:
        check_reading(checkpoint, 1, held_inputs(recipe), accept=False)
    assert [line.partition(" ")[0] for line in caught.value.problems] == [
        "data.sources[0]", "model.path/vae/config.json",
    ]  # fmt: skip
    assert len(check_reading(checkpoint, 1, held_inputs(recipe), accept=True).changes) == 2
