"""Recipes of flow matching: every rule can be tripped; packaged recipes are dry-run and hold the paper's values."""

import json
import shutil
from pathlib import Path

import pytest

from core.recipe import ConfigError
from core.training.estimates import PEAK_TFLOPS
from pretrain.data.cache import fill_cache
from pretrain.flow.__main__ import main
from pretrain.flow.plan import describe, state_bytes
from pretrain.flow.preflight import preflight
from pretrain.flow.sizes import measure
from pretrain.flow.validate import load_recipe
from tests.pretrain.flow.flow_runs import flow_recipe

ROOT = Path(__file__).resolve().parents[3]
FULL_SIZE = ["pretrain_kontext_sd35m", "metaquery_align", "metaquery_unified"]

CACHED = (
    "stage=unified", "train.queries=false", "model.vlm=/vlm", "model.conditioner=/c", "data.cache.queries=true",
    "data.cache_dir=/cache", "data.cache.vlm=/vlm", "data.cache.conditioner=/c", "data.cache.text_dtype=float32",
)  # fmt: skip
"""A recipe whose VLM was read ahead."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=post"], "stage='post' is not one of kontext, align, unified"),
        (["model.dtype=int8"], "model.dtype='int8' is not one of"),
        (["resources.card=h1"], "resources.card='h1' is not one of a100, h100, h200, or null"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["optimization.lr=0"], "optimization.lr=0 must be above 0"),
        (["optimization.ema_decay=1"], "optimization.ema_decay=1 must be in [0, 1)"),
        (["train.transformer=false"], "train: nothing is trained"),
        (["train.queries=true"], "train.queries and train.connector need stage align or unified"),
        (["model.vlm=/vlm"], "model.vlm and model.conditioner have no meaning for stage kontext"),
        (["stage=align"], "model.vlm has no value, and stage align reads prompts with it"),
        (["stage=align", "model.vlm=/vlm", "train.connector=false"], "would keep a random connector"),
        (["model.connector.hidden_size=1537"], "is no multiple of num_attention_heads=24"),
        (["deepspeed.offload=parameters"], "deepspeed.offload=parameters needs deepspeed.zero_stage=3, not 2"),
        (["model.compile=true", "deepspeed.zero_stage=3"], "model.compile does not go with deepspeed.zero_stage=3"),
        (["references.transformer=false"], "nothing is shown the picture to edit"),
        (["data.reference_images=true"], "data.reference_images follows from stage and references.vlm"),
        (["stage=align", "model.vlm=/vlm", "data.cache.text=true"], "which stage align does not read"),
        (["data.cache.queries=true"], "data.cache.queries holds a VLM's states, which stage kontext does not read"),
        (["data.cache.queries=true"], "cache.vlm or cache.conditioner is empty"),
        (["data.cache.queries=true"], "name the folder of what cache.latents, .text and .queries encode ahead"),
        (["data.cache.position_mode=round"], "cache.position_mode='round' is not one of flat, mrope"),
        ([*CACHED, "train.queries=true"], "states at queries that stay as they are: set train.queries=false"),
        ([*CACHED, "data.cache.vlm=/b"], "data.cache.vlm=/b and model.vlm=/vlm must be the same"),
        ([*CACHED, "model.conditioner=/d"], "data.cache.conditioner=/c and model.conditioner=/d must be the same"),
        ([*CACHED, "model.position_mode=mrope"], "position_mode=flat and model.position_mode=mrope must be"),
        ([*CACHED, "model.dtype=bfloat16"], "data.cache.text_dtype=float32 and model.dtype=bfloat16 must be"),
        ([*CACHED, "references.vlm=false"], "data.cache.show_references=True and references.vlm=False must be"),
        (["batch_size=5"], "batch_size=5 is no multiple of micro_batch_size x resources.ranks = 2 x 1"),
        (["stop_step=6"], "stop_step=6 lies behind steps=4"),
        (["save_every=3"], "save_every=3 is no multiple of log_every=2"),
        (["stop_step=3"], "stop_step=3 is no multiple of log_every=2"),
        (["data.edit_share=2"], "data.edit_share=2 must be in [0, 1]"),
    ],
)  # fmt: skip
def test_every_rule_names_the_key_and_the_way_out(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        flow_recipe(tmp_path, Path("/model"), *overrides)
    assert message in str(caught.value)


def test_all_problems_come_at_once_with_the_nearest_key(tmp_path):
    flow_recipe(tmp_path, Path("/model"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            tmp_path / "recipe.yaml", ["stepz=3", "optimization.lrr=1", "data.sources=[{kindd: shapes}]"]
        )
    assert len(caught.value.problems) >= 3
    for hint in (
        "did you mean 'steps'?",
        "did you mean 'optimization.lr'?",
        "did you mean 'data.sources[0].kind'?",
    ):
        assert hint in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "recipe.yaml", ["steps=0", "batch_size=5"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("stage", "overrides", "trained"),
    [
        ("kontext", [], {"transformer"}),
        ("align", ["model.vlm=/vlm"], {"queries", "connector"}),
        ("unified", ["model.vlm=/vlm"], {"queries", "connector", "transformer"}),
        ("unified", ["model.vlm=/vlm", "train.transformer=false"], {"queries", "connector"}),
        ("unified", ["model.vlm=/vlm", "model.conditioner=/c", "train.queries=false", "train.connector=false"],
         {"transformer"}),
    ],
)  # fmt: skip
def test_a_stage_trains_its_parts_unless_a_switch_says_otherwise(tmp_path, stage, overrides, trained):
    recipe = flow_recipe(tmp_path, Path("/model"), f"stage={stage}", *overrides)
    assert {part for part in ("queries", "connector", "transformer") if recipe.trains(part)} == trained


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_recipes_print_the_plan_and_what_is_missing(name, capsys):
    assert main([f"recipes/{name}.yaml", "--dry-run"]) == 2
    out = capsys.readouterr().out
    for line in (
        "transformer: 2243.17 M parameters",
        "<- deepspeed.zero_stage",
        "memory of a rank, ZeRO-1:",
        "memory of a rank, ZeRO-3:",
        "images/s = ranks x peak x MFU / operations",
        "model.path: ",
        "no file matches '/data/t2i/*.tar'",
    ):
        assert line in out, line
    if name != "pretrain_kontext_sd35m":
        assert "connector: 902.59 M parameters" in out and "queries: 0.92 M parameters" in out
        assert "model.vlm: /models/Qwen2.5-VL-7B-Instruct: no such folder" in out
        absent = "note: model.conditioner is absent, so its numbers are those of model.connector"
        assert (absent in out) == (name == "metaquery_unified")


@pytest.mark.parametrize(
    ("name", "lr", "batch", "steps"),
    [
        ("pretrain_kontext_sd35m", 4e-5, 128, 200_000),
        ("metaquery_align", 1e-4, 1024, 500_000),
        ("metaquery_unified", 4e-5, 128, 200_000),
    ],
)
def test_full_size_recipes_hold_the_papers_values(name, lr, batch, steps):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    settings = recipe.optimization
    assert (settings.lr, recipe.batch_size, recipe.steps) == (lr, batch, steps)
    assert (*settings.betas, settings.eps, settings.weight_decay) == (0.9, 0.95, 1e-8, 0.05)
    assert (recipe.timestep_shift, recipe.data.prompt_dropout, settings.gradient_clip) == (3.0, 0.1, 1.0)
    assert recipe.data.edit_share == (0 if name == "metaquery_align" else 0.5)
    assert recipe.data.aspect_buckets and settings.warmup_fraction == 0.01


@pytest.mark.parametrize("name", ["metaquery_align", "metaquery_unified"])
def test_shapes_recipes_load_and_fit_two_cores(name):
    recipe = load_recipe(ROOT / "recipes" / "shapes" / f"{name}.yaml")
    assert recipe.resources.ranks * recipe.resources.rank_cpus <= 2 and recipe.resources.device == "cpu"


def test_a_dry_run_is_ready_where_everything_is_there(tmp_path, tiny_model, tiny_vlm, capsys):
    flow_recipe(tmp_path, tiny_model, vlm=tiny_vlm)
    assert main([str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 steps x 4 = 16 samples; 4 / 1 ranks = 4 a rank, in 2 micro-batches of 2" in out
    assert "the reference goes to transformer and VLM" in out and "Ready to run." in out
    assert not (tmp_path / "run").exists()


def test_preflight_lists_what_does_not_fit(tmp_path, tiny_model, tiny_vlm):
    recipe = flow_recipe(tmp_path, tiny_model, "data.multiple=6", vlm=tiny_vlm)
    assert any("data.multiple=6 is no multiple of 8" in problem for problem in preflight(recipe))
    recipe = flow_recipe(tmp_path, tiny_model, "data.resolution=[{side: 256}]", vlm=tiny_vlm)
    assert any("position table ends at 128" in problem for problem in preflight(recipe))
    other = shutil.copytree(tiny_vlm, tmp_path / "vlm")
    conditioner = tmp_path / "aligned" / "conditioner"
    conditioner.mkdir(parents=True)
    recipe = flow_recipe(tmp_path, tiny_model, f"model.conditioner={tmp_path}/aligned", vlm=other)
    assert any("model.conditioner: " in problem for problem in preflight(recipe))


def test_a_place_that_cannot_be_written_is_found_before_ranks_start(tmp_path, tiny_model):
    (tmp_path / "file").touch()
    places = f"output_dir={tmp_path / 'file'}", f"data.cache_dir={tmp_path / 'file'}"
    problems = preflight(flow_recipe(tmp_path / "recipe", tiny_model, *places))
    assert [problem.partition("=")[0] for problem in problems] == ["output_dir", "data.cache_dir"]


def test_a_shard_that_was_not_encoded_is_found_before_ranks_start(tmp_path, tiny_model):
    recipe = flow_recipe(
        tmp_path, tiny_model, "data.cache.latents=true", f"data.cache.vae={tiny_model}",
        f"data.cache_dir={tmp_path / 'cache'}", "data.cache.samples_per_shard=64",
    )  # fmt: skip
    (problem,) = preflight(recipe)
    assert "2 of 2 shards are not encoded yet" in problem and "python -m pretrain.data.cache" in problem
    fill_cache(recipe.data, workers=1)
    assert preflight(recipe) == []


def test_memory_follows_the_printed_formula(tmp_path, tiny_model, tiny_vlm):
    recipe = flow_recipe(
        tmp_path,
        tiny_model,
        "resources.ranks=2",
        "train.transformer=false",
        "resources.card=h100",
        vlm=tiny_vlm,
    )
    sizes = measure(recipe)
    counts, table = sizes.parameters, 16 * 16 * 32
    p, q, v = sum(counts.values()), counts["queries"] + counts["connector"], sizes.vlm.parameters
    assert sizes.position_values == table and counts["queries"] == 6 * 64
    assert state_bytes(recipe, sizes, 1) == (4 * (p + v + table) + 4 * q + 16 * q / 2, 0)
    assert state_bytes(recipe, sizes, 2) == (4 * (p + v + table) + 4 * q / 2 + 16 * q / 2, 0)
    assert state_bytes(recipe, sizes, 3) == (4 * (p / 2 + v + table) + 4 * q / 2 + 16 * q / 2, 0)
    recipe.deepspeed.offload = "optimizer"
    assert state_bytes(recipe, sizes, 2)[1] == 16 * q / 2
    assert any(f"{PEAK_TFLOPS['h100']:g} TFLOP/s (h100)" in line for line in describe(recipe))


def test_a_conditioner_of_other_widths_is_refused(tmp_path, tiny_model, tiny_vlm):
    from tests.fakes.tiny_metaquery import make_tiny_conditioner

    make_tiny_conditioner(joint_attention_dim=56).save_pretrained(tmp_path / "aligned" / "conditioner")
    recipe = flow_recipe(tmp_path, tiny_model, f"model.conditioner={tmp_path}/aligned", vlm=tiny_vlm)
    wanted = json.loads((tiny_model / "transformer" / "config.json").read_text())["joint_attention_dim"]
    assert preflight(recipe) == [
        f"model.conditioner: its joint_attention_dim is 56, model.path has {wanted}; take a conditioner made for them"
    ]
