"""The run in numbers: SD3.5-Medium's counts without its weights, and the batch equations."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from models.lora.targets import DEFAULT_TARGETS
from models.sd35_medium import sd35_medium_config
from rl.recipe.plan import describe_run, disk_needs, measure_model
from rl.recipe.schema import (
    EvaluationTaskConfig,
    KeepBestConfig,
    ModelConfig,
    RehearsalConfig,
    RewardConfig,
    RunConfig,
    SizeConfig,
    StageConfig,
)


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> RunConfig:
    """The schema's defaults, which are the paper's values, and no model folder."""
    config = RunConfig(name="paper", model=ModelConfig(path=str(tmp_path_factory.mktemp("x") / "absent")))
    config.stages = [StageConfig(t, t, f"{t}.jsonl", 100, [RewardConfig("r")]) for t in ("edit", "t2i")]
    config.evaluation.tasks = [EvaluationTaskConfig(t, f"{t}.jsonl") for t in ("edit", "t2i")]
    return config


@pytest.fixture(scope="module")
def lines(paper) -> str:
    return "\n".join(describe_run(paper))


def test_sd35_medium_without_weights(paper):
    size = measure_model(paper)
    assert size.parameters == 2_243_171_520
    assert size.position_values == 384 * 384 * 1536
    assert (size.num_layers, size.hidden_size) == (24, 1536)
    assert (size.image_tokens, size.text_tokens, size.latent_values) == (1024, 333, 16 * 64 * 64)
    assert size.source.startswith("SD3.5-Medium")


def test_the_best_checkpoints_take_room_too(paper):
    size = measure_model(paper)
    best = replace(paper.checkpoint, keep_best=KeepBestConfig("edit", count=3))
    more = disk_needs(replace(paper, checkpoint=best), size)["8 checkpoints"]
    assert more == pytest.approx(disk_needs(paper, size)["5 checkpoints"] / 5 * 8)


def test_lora_counts_with_and_without_the_second_attention(paper):
    """Each adapted linear is 1536 -> 1536: rank x (1536 + 1536) parameters."""
    size = measure_model(paper)
    assert (size.lora_linears, size.lora_parameters) == (243, 243 * 32 * 3072)
    narrow = RunConfig(name="x", model=ModelConfig(path=paper.model.path))
    narrow.model.lora.targets = [t for t in DEFAULT_TARGETS if not t.startswith("attn2.")]
    size = measure_model(narrow)
    assert (size.lora_linears, size.lora_parameters) == (191, 191 * 32 * 3072)


@pytest.mark.parametrize(
    "expected",
    [
        "run paper: edit (edit, 100 steps) -> t2i (t2i, 100 steps)",
        "32 prompts x G=16 = 512 samples in chunks of 8, T=10, 2.88 MB of latents a sample",
        "512 / 2 = 256 samples; per rank 32 in 4 micro-batches of 8 x 9 trained steps",
        "LoRA: 243 linears, 23.89 M parameters (47.8 MB a publish), scaling 2",
        "transformer: 2243.17 M parameters, position table 226.5 M values",
        "placement shared on cuda: 11 bundles",
        "  total    54 CPU, 8 GPU",
    ],
)
def test_the_plan_says(lines, expected):
    assert expected in lines


def test_memory_per_role_by_hand(lines):
    """bf16: 2 bytes x (2243.17 + 226.49 + 23.89) M = 4.64 GiB; ZeRO-2 shards 12 bytes of optimizer over 8."""
    rollout = 2 * (2_243_171_520 + 226_492_416 + 23_887_872) / 2**30
    adapters = 23_887_872 * (2 * 2 + 4 + 12 / 8) / 2**30
    learner = 2 * (2_243_171_520 + 226_492_416) / 2**30 + adapters
    assert f"memory, rollout worker: {rollout:.2f} GiB" in lines
    assert f"memory, learner rank: {learner:.2f} GiB" in lines


def test_sizes_are_listed_and_memory_is_of_the_largest(tmp_path):
    """Of three prompts two draw theirs, one in four times the wide one, and the third brings its own."""
    (tmp_path / "t.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c", "size": [1024, 256]}\n'
    )
    config = RunConfig(name="sizes", model=ModelConfig(path=str(tmp_path / "absent")))
    config.model.sizes = [SizeConfig(512, 512, 3.0), SizeConfig(384, 768)]
    config.stages = [StageConfig("t2i", "t2i", str(tmp_path / "t.jsonl"), 100, [RewardConfig("r")])]
    config.model.compile = True
    text = "\n".join(describe_run(config))
    assert (
        "sizes of stage t2i, 3 prompts (height x width): 512 x 512 50%, 1024 x 256 33.3%, 384 x 768 16.7%"
        in text
    )
    assert "compiled for each of 3 shapes as it comes, into at most 192 graphs" in text
    assert "8 rows at once of 384 x 768 px)" in text
    assert "per rank 32 in at least 4 micro-batches of 8" in text, "rare shapes leave some half empty"
    size = measure_model(config)
    assert (size.image_tokens, size.reference_tokens, size.latent_values) == (24 * 48, 0, 16 * 48 * 96)


def test_every_reference_counts(tmp_path):
    """SD3.5-Medium's configs; the first reference is shown at the size that is drawn."""
    for part, content in (("transformer", sd35_medium_config()), ("vae", {"block_out_channels": [1] * 4})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    for name, size in (("a", (300, 200)), ("b", (100, 100))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    line = {"prompt": "put it in", "references": ["a.png", "b.png"]}
    (tmp_path / "e.jsonl").write_text(json.dumps(line) + "\n")
    model = ModelConfig(path=str(tmp_path), longer_edge=512, reference_pixels=512 * 352 + 256**2)
    stage = StageConfig("edit", "edit", str(tmp_path / "e.jsonl"), 100, [RewardConfig("r")])
    config = RunConfig(name="two", model=model, stages=[stage])
    size = measure_model(config)
    assert (size.image_tokens, size.reference_tokens) == (32 * 22, 32 * 22 + 16 * 16)
    text = "\n".join(describe_run(config))
    assert "1 prompts (height x width): 352 x 512 (further references 256 x 256) 100%" in text


def test_a_window_and_drawn_steps_change_the_equations(paper):
    windowed = RunConfig(name="w", model=ModelConfig(path=paper.model.path), stages=paper.stages)
    windowed.rollout.window_size, windowed.rollout.window_last = 3, 9
    text = "\n".join(describe_run(windowed))
    assert "x 3 trained steps" in text
    assert "1.05 MB of latents a sample" in text
    assert "one trajectory a group" not in text
    windowed.rollout.branch = True
    assert "a sample, one trajectory a group until its first stochastic step" in "\n".join(
        describe_run(windowed)
    )
    assert "8 rows at once" in text, "steps after the branch are replayed apart"
    windowed.rollout.window_size, windowed.learner.micro_batch_size = 1, 32
    assert "3 rows at once" in "\n".join(describe_run(windowed)), "two groups of 16 and a begun one"
    windowed.rollout.window_size, windowed.learner.micro_batch_size = 3, 8
    windowed.learner.train_steps = 2
    assert "x 2 trained steps" in "\n".join(describe_run(windowed))


def test_a_rehearsing_stage_says_what_it_keeps(paper):
    stages = [*paper.stages[:1], replace(paper.stages[1], rehearsal=RehearsalConfig(0.1, samples=16))]
    text = "\n".join(describe_run(replace(paper, stages=stages)))
    assert "rehearsal in t2i: 256 pictures of edit drawn at its start, 16 noised ones of them in each" in text
    assert "(beta 0.1)" in text and "rehearsal" not in "\n".join(describe_run(paper))
