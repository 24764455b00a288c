"""An exported adapter is the run's, readable by PEFT and diffusers, and its card says what is known of it alone."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from core.files import new_folder
from core.recipe import to_yaml
from models.components import load_transformer
from models.lora.attach import adapter_parameters, attach_lora, hash_state
from models.lora.files import merge_adapter, read_adapter, save_adapter
from rl.export.__main__ import main
from rl.export.card import base_licence
from rl.recipe.schema import load_config
from rl.record.evaluation import TaskScores
from tests.fakes.tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder and a checkpoint's, as rl.train leaves what is exported, and the adapter's state."""
    folder = tmp_path_factory.mktemp("export")
    config = load_config(tiny_recipe(folder))
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    lora, run = config.model.lora, folder / "runs" / "tiny"
    transformer = load_transformer(folder / "model", dtype=torch.float32)
    attach_lora(transformer, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    generator = torch.Generator().manual_seed(1)
    state = {n: torch.randn(p.shape, generator=generator) for n, p in adapter_parameters(transformer).items()}

    def fill(place: Path) -> None:
        save_adapter(state, place / "adapter", rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        (place / "config.yaml").write_text(to_yaml(config))

    run.mkdir(parents=True)
    fill(run)
    with new_folder(run / "checkpoints" / "step_000002") as checkpoint:
        fill(checkpoint)
    for moment, sha256, rewards in (
        ("before", "base", [0.1, 0.2, None, 0.3]),
        ("after_t2i", hash_state(state), [0.3, 0.4, 0.5, 0.7]),
        ("after_edit", "another", [0.9] * 4),
    ):
        place = run / "evaluations" / moment
        place.mkdir(parents=True)
        for task in ("edit", "t2i") if moment != "after_t2i" else ("t2i",):
            scores = TaskScores(moment, task, sha256, 1.0, 2, rewards, {})
            (place / f"{task}.json").write_text(json.dumps(asdict(scores)))
    return run, state


@pytest.mark.parametrize("source", [".", "checkpoints/step_000002"])
def test_what_is_exported_is_the_adapter_with_what_it_scores(finished, tmp_path, capsys, source):
    run, state = finished
    out = tmp_path / "out"
    assert main([str(run / source), str(out), "--merged"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/{name}" for name in ("COMPLETE", "README.md", "adapter_config.json", "adapter_model.safetensors",
                                     "diffusers", "recipe.yaml", "transformer")
    ]  # fmt: skip
    read, settings = read_adapter(out)
    assert hash_state(read) == hash_state(state)
    base = load_transformer(run.parent.parent / "model", dtype=torch.float32)
    merged = merge_adapter(base, state, rank=settings.rank, alpha=settings.alpha)
    assert hash_state(load_transformer(out, dtype=torch.float32).state_dict()) == hash_state(merged)
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["base_model"]) == ("apache-2.0", "model")
    assert "| t2i | t2i | 2 | redness (1) |" in card
    row = next(line for line in card.splitlines() if line.startswith("| t2i | 0."))
    assert row.startswith("| t2i | 0.4750 [") and "| +0.2667 [" in row and row.endswith("| 4 |")
    assert "| edit | 0." not in card, "the editing score is another adapter's"
    assert load_config(out / "recipe.yaml").name == "tiny"


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(finished, tmp_path, capsys):
    run, _ = finished
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "checkpoints" / "step_000001"
    cut.mkdir(parents=True)
    for source, out, reason in (
        (run, "there", "is there already"),
        (tmp_path / "empty", "out", "has no config.yaml"),
        (cut, "out", "its writing never finished"),
    ):
        assert main([str(source), str(tmp_path / out)]) == 2
        assert reason in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "empty", "there"]


def test_a_base_without_a_licence_is_told(tmp_path):
    assert base_licence(tmp_path) == (
        None, "The base model's licence holds. Its folder names none: look it up where the model came from.",
    )  # fmt: skip
    (tmp_path / "LICENSE.md").write_text("x")
    assert base_licence(tmp_path)[1] == "The base model's licence holds, which is in its LICENSE.md."
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert base_licence(tmp_path)[0] is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: https://x.example/l\n---\n")
    assert base_licence(tmp_path) == ("other", "The base model's licence holds: other (https://x.example/l).")
