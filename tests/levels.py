"""What a test may ask of the machine: its level, found by file, and the heavy things it uses, found by fixture.

`unit` is what no other line names: no process, no network, no training, below half a second. A test of another level
is named here by its file, or by the start of its own name after `::`; the longest match counts. A mark in the file
(`pytestmark`, `@pytest.mark.chaos`) goes before this table.
"""

from collections.abc import Collection
from typing import Any

LEVELS = ("unit", "component", "e2e", "chaos", "docs")
ORDER = ("unit", "chaos", "e2e", "component", "docs")
"""In which they run: what fails at once first, then the longest files, so that both workers end together."""
BUDGET_S = {"unit": 120, "component": 240, "e2e": 180, "chaos": 120, "docs": 60}
"""Of `make test` on two quiet cores."""
USES = {
    "ray": {"ray_session"},
    "vllm": {"vllm_forks"},
    "browser": {"browser", "opened"},
    "gpu": {"card"},
}
"""Marks that follow from fixtures, to choose or leave out: `-m "not ray and not vllm"`."""

_FILES = {
    "component": """
        bench/test_engine.py
        cases/test_adapters.py
        cases/test_recipes.py::test_a_place
        bench/test_learning_pictures.py
        bench/test_metaquery_proof.py::test_a_variant
        bench/test_service_bench.py
        bench/test_signal.py
        bench/test_table4.py
        core/test_logs.py
        core/test_ranks.py
        core/test_recipe_schemas.py
        core/test_run_lock.py
        core/test_run_status.py
        core/test_servers.py
        models/generate/test_inputs.py
        models/lora/test_attach.py::test_compiles
        models/metaquery/test_pipeline.py
        models/test_compiling.py
        models/test_components.py
        models/test_kontext.py::test_compiles
        models/test_pipeline.py
        packaging/test_house_rules.py::test_importing
        packaging/test_house_rules.py::test_what_runs_before
        pretrain/data/test_cache.py
        pretrain/data/test_sources.py::test_several_processes
        pretrain/flow/test_config.py::test_a_dry_run
        pretrain/flow/test_config.py::test_full_size_recipes
        pretrain/flow/test_flow_loss.py
        pretrain/flow/test_query_cache.py
        pretrain/flow/test_ranks.py
        rewards/benchmarks/test_dpg.py
        rewards/benchmarks/test_judged.py
        rewards/editreward/test_client.py
        rewards/editreward/test_data.py
        rewards/editreward/test_evaluate.py
        rewards/editreward/test_export.py
        rewards/editreward/test_label.py
        rewards/editreward/test_model.py
        rewards/editreward/test_recipe.py
        rewards/editreward/test_serve.py
        rewards/geneval/test_check.py
        rewards/geneval/test_hub.py
        rewards/geneval/test_mmdet.py
        rewards/geneval/test_rewards.py
        rewards/geneval/test_train_prompts.py
        rewards/judge/test_budget.py
        rewards/judge/test_cache.py
        rewards/judge/test_client.py
        rewards/judge/test_end_to_end.py
        rewards/judge/test_load.py
        rewards/judge/test_vllm.py
        rewards/judge/test_wire.py
        rewards/service
        rewards/test_reward_loading.py::test_loading_and_scoring
        rewards/test_reward_worker.py
        rl/evaluate/test_command.py
        rl/learner/test_group.py
        rl/learner/test_learner.py
        rl/learner/test_ranks.py
        rl/learner/test_rehearsal.py
        rl/recipe/test_plan.py
        rl/recipe/test_preflight.py
        rl/recipe/test_recipes.py
        rl/report/test_report.py
        rl/sweep/test_sweep.py
        rl/test_resume_inputs.py
        rl/test_secrets.py::test_a_secret_in_a_recipe
        rl/test_train_cli.py
        rollout/test_worker.py
        worlds/shapes/scenes/test_inserts.py
        worlds/shapes/scenes/test_prompts.py
        worlds/shapes/scoring/test_judge_endpoint.py
        worlds/shapes/training/test_evaluate.py
        worlds/shapes/training/test_resume.py
        worlds/shapes/training/test_vlm_stage.py
    """,
    "e2e": """
        gpu
        models/generate/test_command.py
        models/test_understand.py
        packaging/test_wheel.py
        pretrain/flow/test_train.py
        rewards/editreward/test_generate.py
        rewards/editreward/test_train.py
        rl/evaluate/test_folders.py
        rl/evaluate/test_run.py
        rl/learner/test_rehearsal.py::test_a_run_rehearses
        rl/loop/test_joint_stage.py::test_both_tasks
        rl/loop/test_joint_stage.py::test_resume
        rl/loop/test_joint_stage.py::test_the_report
        rl/loop/test_judge_run.py
        rl/loop/test_metaquery_run.py
        rl/loop/test_run.py
        rl/loop/test_shapes_run.py
        rl/report/test_browser.py
        rl/test_secrets.py
        rl/sweep/test_sweep.py::test_a_grid_runs
        rl/sweep/test_sweep.py::test_a_run_that_fails
        rl/sweep/test_sweep.py::test_runs_side_by_side
        worlds/shapes/training/test_base.py
        worlds/shapes/training/test_vlm_folder.py
    """,
    "chaos": """
        chaos
        core/test_dispatch.py
        core/test_nodes.py
        core/test_ranks.py::test_a_dead_rank
        core/test_ranks.py::test_answers_come
        core/test_servers.py::test_a_server_that_dies
        core/test_servers.py::test_restarts
        core/test_servers.py::test_when_the_starter
        models/generate/test_command.py::test_a_killed_run
        pretrain/data/test_cache.py::test_a_killed_run
        rewards/editreward/test_client.py::test_vllm_killed
        rewards/editreward/test_generate.py::test_killed
        rewards/editreward/test_label.py::test_killed
        rewards/judge/test_client.py::test_a_server_that_is_killed
        rewards/service/test_client.py::test_a_restart
        rewards/service/test_client.py::test_a_service_gone
        rewards/service/test_client.py::test_a_service_that_hangs
        rewards/service/test_client.py::test_two_services
        rl/evaluate/test_run.py::test_an_evaluation_killed
        rl/learner/test_group.py
        rl/loop/test_judge_run.py::test_a_server_dead
        rl/loop/test_judge_run.py::test_an_outage
        rl/loop/test_run.py::test_a_lost_learner
        rl/loop/test_run.py::test_a_run_that_is_stopped
    """,
    "docs": """
        models/test_flops.py::test_sd35_medium_at_512_pixels
        rewards/geneval/test_official.py
        rl/record/test_metric_table.py
    """,
}
TABLE = {entry: level for level, entries in _FILES.items() for entry in entries.split()}


def level_of(nodeid: str, fixtures: Collection[str] = ()) -> str:
    """The level of a test by the table; with Ray or vLLM at least `component`."""
    name = nodeid.removeprefix("tests/")
    for length in range(len(name), 0, -1):
        if name[:length] in TABLE:
            return TABLE[name[:length]]
    heavy = set().union(*USES.values())
    return "component" if heavy & set(fixtures) else "unit"


def levels_of(item: Any) -> list[str]:
    """The levels that a collected test is marked with."""
    return [level for level in LEVELS if item.get_closest_marker(level)]


def group_of(item: Any) -> str:
    """Tests of one group run on one worker, one after the other."""
    if item.get_closest_marker("vllm"):
        return "vllm"
    file = item.nodeid.partition("::")[0]
    (level,) = levels_of(item)
    return f"{level}:{file}" if level in ("unit", "docs") else file
