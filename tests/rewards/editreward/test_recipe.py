"""The recipe's keys and rules, and the plan of the 7B."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.recipe import ConfigError, to_yaml
from rewards.editreward.__main__ import COMMANDS, main
from rewards.editreward.train.plan import activation_bytes, measure, qwen25_vl_7b, sample_flops, state_bytes
from rewards.editreward.validate import load_recipe
from tests.rewards.editreward.editreward_data import make_base, make_recipe, make_samples, write_shards

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ["recipes/editreward.yaml"]
SEVEN = "recipes/editreward.yaml"


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_load_and_say_everything_that_a_run_needs(path, tmp_path):
    recipe = load_recipe(path)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(to_yaml(recipe))
    assert load_recipe(saved) == recipe


def test_unknown_keys_are_refused_with_the_nearest_name_and_all_at_once(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "x", "modle": {}, "model": {"dtyp": "float32"}, "train": {"steps": "many", "ranking": [1]},
                "generate": {"anything": 1}, "evaluate": {"pair_sets": [{"name": "a", "pathh": "b"}]},
            }
        )
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    text = str(caught.value)
    for message in (
        "unknown key 'modle': did you mean 'model'?",
        "unknown key 'model.dtyp': did you mean 'model.dtype'?",
        "key 'model.path' has no value",
        "key 'train.steps': Value 'many'",
        "key 'train.ranking' must be a mapping with keys weight, group_size, min_gap",
        "unknown key 'evaluate.pair_sets[0].pathh': did you mean 'evaluate.pair_sets[0].path'?",
        "key 'evaluate.pair_sets[0].path' has no value",
    ):
        assert message in text
    assert "generate" not in text
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    path.write_text("name: ${oc.env:HOME}")
    with pytest.raises(ConfigError, match="must not read the environment"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dtype=int8", "model.dtype='int8' is not one of float32, bfloat16"),
        ("model.trainable=half", "model.trainable='half' is not one of full, language, lora, head"),
        ("train.loss=l1", "train.loss='l1' is not one of mse, huber"),
        ("train.zero_stage=0", "train.zero_stage=0 is not one of 1, 2, 3"),
        ("train.best_by=loss", "not one of spearman, group_spearman"),
        ("evaluate.split=all", "not one of test, validation, train"),
        ("resources.device=tpu", "not one of cuda, cpu"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        (
            "train.batch_size=12",
            "train.batch_size=12 is no multiple of micro_batch_size x ranks = 4 x 8 = 32",
        ),
        ("train.ranking.group_size=3", "train.ranking.group_size=3 must be at least 2 and divide"),
        ("train.stop_step=6000", "train.stop_step=6000 lies behind train.steps=5000"),
        ("data.test_share=0", r"data.test_share=0 must be in \(0, 1\)"),
        ("data.validation_share=0.99", "leave something to train on"),
        ("data.combine=median", "combine='median' is not one of"),
        ("data.score_low=10", "score range \\[10.0, 10.0\\] is empty"),
        ("data.dimensions=[]", "dimensions is empty"),
        ("input.rubric=Judge", "rubric must hold {instruction} once"),
        ("input.min_pixels=1000000", "is no range"),
        ("train.optimization.lr=0", "train.optimization.lr=0 must be above 0"),
        ("train.optimization.warmup_fraction=1", "warmup_fraction=1 must be in"),
        ("evaluate.probes.samples=1", "evaluate.probes.samples=1 must be at least 2"),
        ("resources.call_timeout_s=0", "resources.call_timeout_s=0 must be above 0"),
    ],
)
def test_every_rule_trips(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(SEVEN, [override])


def test_the_dry_run_of_the_7b_prints_memory_by_zero_stage_and_a_rate(capsys):
    assert main(["train", SEVEN, "--dry-run"]) == 2
    out = capsys.readouterr().out
    # 8 292 166 656 published parameters, less the output matrix, plus a head of three outputs.
    assert f"model: {(8292166656 - 152064 * 3584 + 3 * 3585) / 1e6:.1f} M parameters" in out
    for stage in (1, 2, 3):
        assert f"memory of a rank, ZeRO-{stage}:" in out
    assert "samples/s = ranks x peak x MFU / operations = 8 x 989 TFLOP/s x 0.4" in out
    assert "model.path=/models/Qwen2.5-VL-7B-Instruct: /models/Qwen2.5-VL-7B-Instruct: no such folder" in out
    assert "data.shards: no file matches" in out


def test_memory_follows_the_formula():
    recipe = load_recipe(SEVEN)
    size = measure(recipe)
    p = size.parameters
    assert state_bytes(recipe, size, 1) == pytest.approx(2 * p + 4 * p + 12 * p / 8)
    assert state_bytes(recipe, size, 2) == pytest.approx(2 * p + 4 * p / 8 + 12 * p / 8)
    assert state_bytes(recipe, size, 3) == pytest.approx(18 * p / 8)
    lora = load_recipe(SEVEN, ["model.trainable=lora"])
    adapters = measure(lora)
    shape = qwen25_vl_7b()
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    sides = [(hidden, hidden), (hidden, 512), (hidden, 512), (hidden, hidden)] + 3 * [(hidden, inner)]
    assert adapters.trained == layers * 32 * sum(a + b for a, b in sides) + 3 * (hidden + 1)
    assert activation_bytes(lora, adapters) < activation_bytes(recipe, size)
    plain = load_recipe(SEVEN, ["model.gradient_checkpointing=false"])
    assert activation_bytes(plain, size) > 5 * activation_bytes(recipe, size)


def test_operations_follow_the_formula():
    recipe = load_recipe(SEVEN, ["model.gradient_checkpointing=false"])
    size = measure(recipe)
    tokens, patches = 2 * (512 * 512 // 784) + 128, 8 * (512 * 512 // 784)
    text = 28 * (3584 * (3584 + 512) * 2 + 2 * 3584 + 2 * 512 - 3584 + 3584 + 3 * 3584 * 18944 + 2 * 3584)
    assert size.text == pytest.approx(text, rel=1e-4)
    seen = 4 * patches / 2 + 28 * 64
    forward = (
        2 * size.text * tokens
        + 2 * tokens**2 * 3584 * 28
        + 2 * size.vision * patches
        + 4 * patches * seen * 1280
    )
    assert sample_flops(recipe, size) == pytest.approx(3 * forward)
    again = load_recipe(SEVEN)
    assert sample_flops(again, size) == pytest.approx(4 * forward)
    head = load_recipe(SEVEN, ["model.trainable=head"])
    assert sample_flops(head, size) == pytest.approx(forward)
    language = load_recipe(SEVEN, ["model.trainable=language", "model.gradient_checkpointing=false"])
    vision = 2 * size.vision * patches + 4 * patches * seen * 1280
    assert sample_flops(language, size) == pytest.approx(3 * forward - 2 * vision)


def test_a_recipe_that_is_ready_says_so_and_starts_nothing(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    make_recipe(tmp_path / "runs", base, write_shards(tmp_path / "data", make_samples(2)))
    path = str(tmp_path / "runs" / "recipe.yaml")
    assert main(["train", path, "--dry-run", "train.steps=9"]) == 0
    assert "Ready to run." in capsys.readouterr().out and not (tmp_path / "runs" / "run").exists()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("chat_template.jinja", "chat_template.json"):
        (base / name).unlink()
    with pytest.raises(ConfigError, match="model_type is 'llama'.*\n.*no chat template"):
        from rewards.editreward.train.command import train

        train(load_recipe(path))


def test_commands_load_only_what_they_are_and_no_torch_before_they_run():
    code = (
        "import sys\nfrom rewards.editreward.__main__ import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr
    assert {"train", "evaluate", "export"} < COMMANDS.keys()
