"""What the dry run tells of a recipe that may run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rl.recipe.notes import notes
from rl.recipe.schema import RunConfig, load_config
from tests.fakes.tiny_models import make_tiny_folder

TRAINED = ["a red circle", "a green square", "a blue star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; its CLIPs read 16 tokens or more, so a long prompt is cut."""
    path = tmp_path_factory.mktemp("notes")
    make_tiny_folder(path / "model")
    return path


def config_of(folder: Path, trained: list[str], held_out: list[str], *overrides: str) -> RunConfig:
    for name, prompts in (("train", trained), ("heldout", held_out)):
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / f"{name}.jsonl").write_text(lines)
    recipe = {
        "name": "x",
        "model": {"path": str(folder / "model"), "dtype": "float32", "height": 32, "width": 32},
        "stages": [
            {
                "name": "t2i", "task": "t2i", "prompts": str(folder / "train.jsonl"), "steps": 2,
                "rewards": [{"name": "a"}],
            }
        ],
        "evaluation": {
            "tasks": [
                {
                    "task": "t2i", "prompts": str(folder / "heldout.jsonl"), "num_prompts": 2,
                    "rewards": [{"name": "a"}, {"name": "b", "weight": 0}],
                }
            ],
        },
        "resources": {"device": "cpu"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return load_config(folder / "recipe.yaml", overrides)


def test_a_recipe_without_surprises_has_no_notes(folder: Path) -> None:
    assert notes(config_of(folder, TRAINED, ["a white cross", "a red star", *TRAINED])) == [], (
        "of the held-out file only the first two are evaluated"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["evaluation.guidance_scale=3"],
            "rollout.guidance_scale=4.5 and evaluation.guidance_scale=3 differ",
        ),
        (["learner.updates_per_rollout=1"], "every ratio is 1, so learner.clip_range never acts"),
        (["rollout.window_first=2"], "rollout.window_first=2 has no effect: rollout.window_size is 0"),
        (["rollout.window_last=6"], "rollout.window_last=6 has no effect: rollout.window_size is 0"),
        (
            ["resources.placement=inprocess", "resources.min_rollout_workers=2"],
            "resources.min_rollout_workers=2 has no effect: with resources.placement=inprocess the learner's ranks",
        ),
    ],
)
def test_settings_that_surprise_are_told(folder: Path, overrides: list[str], line: str) -> None:
    (note,) = notes(config_of(folder, TRAINED, ["a white cross", "a red star"], *overrides))
    assert line in note


@pytest.mark.parametrize("guidance", ["rollout.guidance_scale=0", "rollout.guidance_scale=1"])
def test_guidance_up_to_1_is_none_in_both(folder: Path, guidance: str) -> None:
    assert notes(config_of(folder, TRAINED, ["x", "y"], guidance, "evaluation.guidance_scale=1")) == []


def test_evaluation_prompts_that_are_trained_on_are_counted(folder: Path) -> None:
    (note,) = notes(config_of(folder, TRAINED, ["a white cross", "a red circle"]))
    assert note.startswith("evaluation of t2i: 1 of 2 prompts are training prompts")


def test_prompts_that_are_cut_are_counted_by_encoder(folder: Path) -> None:
    long = "a red circle beside a green square " * 8
    config = config_of(folder, [*TRAINED, long, long], ["a white cross", "a red star"])
    (clip,) = notes(config)
    assert clip.startswith("1 of 6 prompts are longer than the ") and "tokens that CLIP reads" in clip
    config.model.max_sequence_length = 20
    assert "1 of 6 prompts are longer than the 20 tokens that T5 reads" in notes(config)[1]


def test_a_large_encoder_on_the_cpu_of_a_gpu_machine_is_told(folder: Path) -> None:
    config = config_of(folder, TRAINED, ["a white cross", "a red star"], "resources.device=cuda")
    assert notes(config) == [], "the tiny T5 is quick"
    path = folder / "model" / "text_encoder_3" / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"d_model": 4096}))
    try:
        (note,) = notes(config)
        assert note.startswith("resources.encode_gpus=0: T5-XXL reads every prompt on the CPU")
        config.resources = replace(config.resources, encode_gpus=0.5)
        assert notes(config) == []
    finally:
        path.write_text(whole)
    config.model.vlm, config.resources.encode_gpus, config.model.max_sequence_length = "vlm", 0.0, 12
    assert [line.split(":")[0] for line in notes(config)] == [
        "resources.encode_gpus=0", "model.max_sequence_length=12 has no effect",
    ]  # fmt: skip
