"""Every recipe of the repository is dry-run: the small ones must be ready, the full-size ones say what is missing."""

from pathlib import Path

import pytest

from rl.recipe.placement import make_plan
from rl.recipe.schema import load_config
from rl.train import main

ROOT = Path(__file__).resolve().parents[3]
READY = ["recipes/shapes/pdtr.yaml", "recipes/shapes/pdtr_long.yaml", "recipes/examples/custom_reward.yaml"]
DRIVEN_BY_EDITREWARD = ["recipes/shapes/edit_editreward.yaml", "recipes/shapes/reward_hacking.yaml"]
ON_METAQUERY = ["recipes/shapes/pdtr_metaquery.yaml"]
ON_ITS_BASE = ["recipes/shapes/two_references.yaml"]
SMOKE = ["recipes/smoke_sd35m_kontext.yaml"]
FULL_SIZE = [
    "recipes/pdtr_sd35m_kontext.yaml",
    "recipes/pdtr_sd35m_kontext_fast.yaml",
    "recipes/edit_sd35m_kontext.yaml",
    "recipes/t2i_sd35m_kontext.yaml",
    "recipes/t2i_no_clip_sd35m_kontext.yaml",
    "recipes/edit_judge_sd35m_kontext.yaml",
    "recipes/edit_inprocess_sd35m_kontext.yaml",
    "recipes/pdtr_judge_sd35m_kontext.yaml",
    "recipes/pdtr_sd35m_metaquery.yaml",
]


def rl_recipes():
    """All packaged recipes of `rl.train`: those with stages, and those that stand on one of them."""
    return sorted(
        str(p.relative_to(ROOT))
        for p in (ROOT / "recipes").rglob("*.yaml")
        if any(key in p.read_text() for key in ("\nstages:", "\nbase:"))
    )


def test_no_recipe_is_left_out():
    assert rl_recipes() == sorted(
        READY + DRIVEN_BY_EDITREWARD + ON_METAQUERY + ON_ITS_BASE + SMOKE + FULL_SIZE
    )


@pytest.mark.parametrize("recipe", READY)
def test_small_recipes_are_ready(recipe, capsys):
    assert main([recipe, "--dry-run"]) == 0
    assert "Ready to run." in capsys.readouterr().out


@pytest.mark.parametrize("recipe", READY)
def test_small_recipes_fit_two_cores(recipe):
    plan = make_plan(load_config(ROOT / recipe))
    assert plan.cpus <= 2 and plan.gpus == 0 and len(plan.of("rollout")) >= 2 and len(plan.of("reward")) >= 1


@pytest.mark.parametrize("recipe", DRIVEN_BY_EDITREWARD)
def test_a_recipe_of_the_trained_reward_lacks_nothing_but_its_folder(recipe, capsys, tmp_path):
    folder = str(tmp_path / "model")
    rewards = ("stages[0].rewards[0]", "evaluation.tasks[0].rewards[2]")
    assert main([recipe, *(f"{reward}.params.model={folder}" for reward in rewards), "--dry-run"]) == 2
    problems = capsys.readouterr().out.partition("Not ready:\n")[2].splitlines()
    assert len(problems) == 1 and f"{folder}: no such folder" in problems[0]


@pytest.mark.parametrize("recipe", SMOKE)
def test_the_smoke_recipe_takes_one_gpu(recipe):
    assert make_plan(load_config(ROOT / recipe)).gpus == 1


@pytest.mark.parametrize("recipe", SMOKE + ON_METAQUERY + ON_ITS_BASE)
def test_a_recipe_on_a_model_that_is_made_first_lacks_nothing_else(recipe, capsys, tmp_path):
    folder = str(tmp_path / "model")
    assert main([recipe, f"model.path={folder}", "--dry-run"]) == 2
    problems = capsys.readouterr().out.partition("Not ready:\n")[2].splitlines()
    assert len(problems) == 1 and f"{folder}: no such model folder" in problems[0]


@pytest.mark.parametrize("recipe", FULL_SIZE)
def test_full_size_recipes_print_the_plan_and_what_is_missing(recipe, capsys):
    assert main([recipe, "--dry-run"]) == 2
    out = capsys.readouterr().out
    branching = recipe.endswith("_fast.yaml")
    for line in (
        "32 prompts x G=16 = 512 samples",
        "512 / 2 = 256 samples; per rank 32 in "
        + (
            "1 micro-batches of 32 x 1 trained steps"
            if branching
            else "4 micro-batches of 8 x 9 trained steps"
        ),
        "3 rows at once" if branching else "8 rows at once",
        "LoRA: 243 linears, 23.89 M parameters (47.8 MB a publish), scaling 2",
        "transformer: 2243.17 M parameters, position table 226.5 M",
        "memory, rollout worker:",
        "memory, learner rank:",
        "8 GPU",
        "no such model folder",
        "/data/prompts/",
    ):
        assert line in out, line


@pytest.mark.parametrize("recipe", FULL_SIZE)
def test_full_size_recipes_hold_the_papers_values(recipe):
    c = load_config(ROOT / recipe)
    assert (c.rollout.num_steps, c.rollout.group_size, c.rollout.noise_level) == (10, 16, 0.7)
    assert (c.learner.kl_beta, c.learner.kl_form, c.learner.learning_rate) == (0.04, "without_dt", 3e-4)
    assert (c.learner.adam_beta1, c.learner.adam_beta2, c.learner.adam_eps) == (0.9, 0.999, 1e-8)
    assert (c.model.lora.rank, c.model.lora.alpha, c.model.height, c.model.width) == (32, 64, 512, 512)
    assert c.rollout.prompts_per_rollout * c.rollout.group_size // c.learner.updates_per_rollout == 256
