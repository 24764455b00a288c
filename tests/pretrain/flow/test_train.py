"""Whole runs at tiny size, one rank in this process: what is trained, resumed, averaged, exported and drawn."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.cluster.ranks import LocalRank
from core.recipe import ConfigError
from core.run_lock import RunTaken, hold_run
from models.metaquery.pipeline import MetaQueryPipeline
from models.pipeline import KontextPipeline
from pretrain.flow.__main__ import main, train
from pretrain.flow.model import load_model, part_of
from pretrain.flow.rank import FlowRank
from pretrain.flow.validate import load_recipe
from tests.pretrain.flow.flow_runs import exported, flow_recipe, last_checkpoint, records


def make_rank(recipe):
    return LocalRank(partial(FlowRank, recipe)).rank


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model, tiny_vlm):
    """A run of 4 steps of stage unified, with grids and export."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = flow_recipe(folder, tiny_model, "samples.every=4", "export_dtype=float32", vlm=tiny_vlm)
    assert main([str(folder / "recipe.yaml"), "samples.every=4", "export_dtype=float32"]) == 0
    return recipe


def test_a_run_that_another_process_writes_is_left_alone(tmp_path, tiny_model):
    recipe = flow_recipe(tmp_path, tiny_model)
    with hold_run(recipe.run_dir), pytest.raises(RunTaken, match="another run writes there now"):
        train(recipe, resume="auto")


def test_stopping_and_resuming_changes_no_bit(straight, tmp_path, tiny_model, tiny_vlm):
    options = ["samples.every=4", "export_dtype=float32"]
    recipe = flow_recipe(tmp_path, tiny_model, *options, vlm=tiny_vlm)
    assert train(load_recipe(tmp_path / "recipe.yaml", [*options, "stop_step=2", "samples.every=0"])) == 0
    with pytest.raises(ConfigError, match="holds an earlier run; add --resume auto"):
        train(recipe)
    with pytest.raises(ConfigError, match="optimization.lr was 0.001 .* and is 0.1 now"):
        train(load_recipe(tmp_path / "recipe.yaml", ["optimization.lr=0.1"]), resume="auto")
    torch.manual_seed(99)  # whatever the global generator holds must not matter
    assert train(recipe, resume="auto") == 0
    assert records(recipe) == records(straight) and len(records(straight)) == 2
    mine, theirs = last_checkpoint(recipe), last_checkpoint(straight)
    for name in ("average_rank_000.safetensors", "average.json", "state.json", "inputs.json"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    left, right = (
        torch.load(folder / "engine" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
        for folder in (mine, theirs)
    )
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    for part in ("transformer", "conditioner"):
        first, second = exported(recipe, part), exported(straight, part)
        assert all(torch.equal(first[n], second[n]) for n in first)
    for file in (straight.run_dir / "samples").iterdir():
        assert file.read_bytes() == (recipe.run_dir / "samples" / file.name).read_bytes()


def test_a_run_leaves_what_it_says(straight, tiny_vlm):
    folder = straight.run_dir
    assert "sources[0] shapes t2i: 64 samples" in (folder / "data.txt").read_text()
    t2i = np.asarray(Image.open(folder / "samples" / "step_0000004_t2i.png"))
    edit = np.asarray(Image.open(folder / "samples" / "step_0000004_edit.png"))
    assert t2i.shape[0] == 2 * (3 * 32 + 2) and edit.shape[0] == 3 * (3 * 32 + 2) and t2i.std() > 1
    assert json.loads((last_checkpoint(straight) / "state.json").read_text()) == {"step": 4}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step_0000002",
        "step_0000004",
    ]
    assert sorted(p.name for p in (folder / "model").iterdir()) == [
        "COMPLETE", "conditioner", "scheduler", "transformer", "vae",
    ]  # fmt: skip
    pipeline = MetaQueryPipeline.from_pretrained(folder / "model", tiny_vlm)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        "a red circle", height=32, width=32, num_inference_steps=2, generator=torch.manual_seed(0)
    )
    assert drawn.images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("stage", "overrides", "moved"),
    [
        ("align", ["data.edit_share=0"], {"queries", "connector"}),
        ("unified", [], {"queries", "connector", "transformer"}),
        ("unified", ["train.transformer=false"], {"queries", "connector"}),
        ("unified", ["train.queries=false"], {"connector", "transformer"}),
        ("unified", ["train.queries=false", "train.connector=false"], {"transformer"}),
    ],
)
def test_what_a_switch_freezes_does_not_move(
    tmp_path, tiny_model, tiny_vlm, straight, stage, overrides, moved
):
    overrides = [f"stage={stage}", f"model.conditioner={straight.run_dir / 'model'}", *overrides]
    recipe = flow_recipe(tmp_path, tiny_model, *overrides, vlm=tiny_vlm)
    before = load_model(recipe).state_dict()
    rank = make_rank(recipe)
    vlm = {name: tensor.clone() for name, tensor in rank.encoders.reader.vlm.state_dict().items()}
    figures = rank.advance(2)
    after = rank.model.state_dict()
    changed = {part_of(name) for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed == moved and figures[0].gradient_norm > 0
    read = rank.encoders.reader.vlm.state_dict()
    assert all(torch.equal(vlm[name], tensor) for name, tensor in read.items())
    assert rank.average.whole(rank.model, keep=True).keys() == {
        name for name, _ in rank.model.named_parameters() if part_of(name) in moved
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_learn_the_same_and_average_what_they_learn(
    tmp_path, tiny_model, tiny_vlm, straight, stage
):
    """Also with gradient checkpointing, another micro-batch, and offload to the host."""
    offload = {1: "none", 2: "optimizer", 3: "parameters"}[stage]
    rank = make_rank(
        flow_recipe(
            tmp_path, tiny_model, f"deepspeed.zero_stage={stage}", f"deepspeed.offload={offload}",
            "micro_batch_size=4", "model.gradient_checkpointing=true", vlm=tiny_vlm,
        )
    )  # fmt: skip
    expected = {name: tensor.clone() for name, tensor in whole_weights(rank).items()}
    for n in range(4):
        rank.advance(n + 1)
        decay = min(0.9999, (1 + n) / (10 + n))
        for name, tensor in whole_weights(rank).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    live = whole_weights(rank)
    average = rank.average.whole(rank.model, keep=True)
    assert average.keys() == expected.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    again = whole_weights(rank)
    assert all(torch.equal(live[name], again[name]) for name in live)
    for part in ("transformer", "conditioner"):
        for name, tensor in exported(straight, part).items():
            if f"{part}.{name}" in average:
                torch.testing.assert_close(average[f"{part}.{name}"], tensor, rtol=1e-3, atol=1e-5)


def whole_weights(rank):
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in rank.model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 3])
def test_kontext_in_bfloat16_is_exported_whole(tmp_path, tiny_model, stage):
    recipe = flow_recipe(
        tmp_path, tiny_model, "model.dtype=bfloat16", f"deepspeed.zero_stage={stage}", "steps=2"
    )
    assert train(recipe) == 0
    written = exported(recipe, "transformer")
    base = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == base.keys() and all(t.dtype == torch.bfloat16 for t in written.values())
    assert any(not torch.equal(written[n], base[n].bfloat16()) for n in base)
    pipeline = KontextPipeline.from_pretrained(recipe.run_dir / "model")
    pipeline.set_progress_bar_config(disable=True)
    source = Image.new("RGB", (32, 32), "red")
    drawn = pipeline(
        "make it blue", image=source, height=32, width=32, num_inference_steps=2, max_sequence_length=16
    )
    assert drawn.images[0].size == (32, 32)


def test_the_learning_rate_warms_up_and_falls(tmp_path, tiny_model):
    rank = make_rank(
        flow_recipe(tmp_path, tiny_model, "steps=8", "optimization.warmup_fraction=0.25", "data.edit_share=0")
    )
    rates = [one.learning_rate for one in rank.advance(8)]
    assert (
        rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
        and rates == sorted(rates[:2]) + sorted(rates[2:])[::-1]
    )
    groups = rank.engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, tiny_model):
    rank = make_rank(flow_recipe(tmp_path, tiny_model))
    with torch.no_grad():
        rank.model.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 0 \(.*32 x 32 px\): lower optimization.lr"
    ):
        rank.advance(1)


def test_compiled_blocks_compute_the_same(tmp_path, tiny_model, monkeypatch):
    """Blocks are traced, gradient checkpointing included; the code that a compiler would make of them is not tested."""
    options = ["model.gradient_checkpointing=true", "batch_size=2", "data.edit_share=0"]
    (eager,) = make_rank(flow_recipe(tmp_path / "a", tiny_model, *options)).advance(1)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    (compiled,) = make_rank(flow_recipe(tmp_path / "b", tiny_model, *options, "model.compile=true")).advance(
        1
    )
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert compiled.gradient_norm == pytest.approx(eager.gradient_norm, rel=1e-4)
