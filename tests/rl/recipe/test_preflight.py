"""What is wrong is found before Ray is asked for anything, and told in one list."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core.inputs import Inputs
from core.logs import submitted_job
from models.components import load_transformer
from models.lora.attach import adapter_parameters, attach_lora, hash_state
from models.lora.files import save_adapter
from models.sizes import geometry
from rewards.base import ServiceSpec
from rl.recipe.inputs import run_inputs
from rl.recipe.preflight import preflight
from rl.recipe.schema import load_config
from tests.cases.conftest import CASES
from tests.fakes.tiny_metaquery import make_tiny_conditioner, make_tiny_metaquery
from tests.fakes.tiny_run import tiny_recipe

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("preflight") / "tiny")


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)


def problems_of(recipe: Path, *overrides: str) -> list[str]:
    return preflight(load_config(recipe, list(overrides), defer_values=True)).problems


def test_a_sound_recipe_passes_with_its_rewards(recipe):
    checked = preflight(load_config(recipe))
    assert checked.problems == []
    assert [(s.name, s.task) for s in checked.reward_sets] == [
        ("stage:edit", "edit"), ("stage:t2i", "t2i"), ("evaluation:edit", "edit"), ("evaluation:t2i", "t2i"),
    ]  # fmt: skip
    first = checked.reward_sets[1]
    assert (first.example_prompt, first.example_metadata) == ("a red circle", {"index": 0})


def test_reward_workers_know_at_which_size_references_are_shown(recipe):
    config = load_config(recipe, ["model.reference_pixels=4096"])
    found = {(s.reference_multiple, s.reference_pixels) for s in preflight(config).reward_sets}
    assert found == {(geometry(config.model.path).multiple, 4096)}
    assert not any(s.references_as_given for s in preflight(config).reward_sets)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.group_size=3", "rollout.group_size=3 does not divide"),
        ("output_dir=/proc/nope", "output_dir='/proc/nope' cannot be written"),
        ("checkpoint.keep_last=1000000000", "free, and the run keeps about "),
        ("model.path=/absent/model", "model.path: /absent/model: no such model folder"),
        (
            "model.lora.targets=[attn.to_q, attn.nowhere]",
            "match no linear layer of this transformer: attn.nowhere",
        ),
        (
            "model.height=30",
            "model.height, model.width: pictures of 30 x 32 px (height x width): this model makes",
        ),
        (
            "model.height=36",
            "model.height, model.width: pictures of 36 x 32 px (height x width): this model makes",
        ),
        ("model.width=256", "sides that are multiples of 8 and at most 128"),
        ("model.sizes=[{height: 32, width: 30}]", "model.sizes[0]: pictures of 32 x 30 px"),
        (
            "model.sizes=[{height: 32, width: 32, weight: -1}, {height: 32, width: 64}]",
            "model.sizes[0].weight=-1",
        ),
        (
            "model.sizes=[{height: 32, width: 32, weight: .nan}, {height: 32, width: 64}]",
            "model.sizes[0].weight",
        ),
        ("model.longer_edge=24", "model.longer_edge: longer edge of 24 px: must be a multiple of 16"),
        ("model.longer_edge=256", "model.longer_edge: pictures of 256 x 256 px"),
        ("stages[0].prompts=/absent/edit.jsonl", "/absent/edit.jsonl: cannot be read"),
        ("evaluation.tasks[0].num_prompts=7", "edit.jsonl holds 6 prompts, num_prompts=7 asks for more"),
        ("stages[1].rewards[0].name=geneval_shapez", "reward 'geneval_shapez' is not built in: did you mean"),
        ("stages[1].rewards[0].timeout_s=0", "stages[1].rewards[0].timeout_s=0 must be above 0"),
        (
            "stages[1].rewards[0].service.urls=[localhost:8100]",
            "service.urls: localhost:8100: write it as http://",
        ),
        ("stages[1].rewards[0].service={codec: png}", "service.urls is empty"),
    ],
)
def test_one_thing_wrong_is_one_problem(recipe, override, expected):
    (problem,) = problems_of(recipe, override)
    assert expected in problem


def test_lines_without_a_size_that_can_be_drawn_are_named(recipe, tmp_path):
    lines = [json.loads(line) for line in (CASES / "references" / "edit.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = str(CASES / "references" / line["image"])
    file, overrides = (
        tmp_path / "edit.jsonl",
        ("evaluation.tasks=[]", "gallery.prompts=0", "model.longer_edge=64"),
    )

    def found(*more):
        file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
        return problems_of(recipe, f"stages[0].prompts={file}", *overrides)

    (problem,) = found()
    assert problem.startswith(f"{file}:6: proportions of 4000 x 40 are beyond 8:1") and problem.endswith(
        'or give height and width, as "size": [height, width] of the line'
    )
    lines[5]["size"] = [8, 64]
    assert found() == [], "squashed as asked"
    (problem,) = found(lines[0] | {"size": [100, 64]})
    assert problem.startswith(f"{file}:7: pictures of 100 x 64 px (height x width): this model makes")
    both = {"prompt": "add it", "references": [lines[0]["image"], lines[1]["image"]]}
    overrides += ("model.reference_pixels=2058",)
    (problem,) = found(both)
    assert problem.startswith(f"{file}:7: 2 references in 2058 pixels")


def test_references_of_other_proportions_name_the_remedy(recipe):
    file = CASES / "references" / "edit.jsonl"
    problems = problems_of(recipe, f"stages[0].prompts={file}", "evaluation.tasks=[]", "gallery.prompts=0")
    assert len(problems) == 5 and all("or set model.longer_edge" in problem for problem in problems)


def test_metaquery_needs_its_vlm_and_kontext_has_none(recipe, tmp_path):
    folder, vlm = make_tiny_metaquery(tmp_path)
    assert problems_of(recipe, f"model.path={folder}", f"model.vlm={vlm}") == []
    (problem,) = problems_of(recipe, f"model.path={folder}")
    assert problem.startswith("model.vlm is not set, and model.path=")
    (problem,) = problems_of(recipe, f"model.vlm={vlm}")
    assert problem.startswith(f"model.vlm={vlm}: model.path=") and "has no conditioner/" in problem
    (problem,) = problems_of(recipe, f"model.path={folder}", "model.vlm=/absent")
    assert problem.startswith("model.vlm: /absent: no such folder")
    make_tiny_conditioner(llm_hidden_size=32, joint_attention_dim=20).save_pretrained(folder / "conditioner")
    problems = problems_of(recipe, f"model.path={folder}", f"model.vlm={vlm}", "model.position_mode=rope")
    for part in ("model.position_mode='rope' is not one of", "its llm_hidden_size is 32, model.vlm has",
                 "its joint_attention_dim is 20, model.path has"):  # fmt: skip
        assert sum(part in problem for problem in problems) == 1, problems
    assert len(problems) == 3


def test_a_reward_file_without_the_function(recipe):
    path = recipe.parent / "reward.py"
    (problem,) = problems_of(recipe, f"stages[0].rewards[0].name={path}:rednes")
    assert problem == f"reward '{path}:rednes': {path} has no 'rednes'; it has redness"


def test_a_served_reward_needs_to_exist_in_its_service_only(recipe):
    reward = "stages[1].rewards[0]"
    service = f"{reward}.service={{urls: [http://host:8100], token_env: HOME, codec: raw, unavailable_s: 60}}"
    checked = preflight(load_config(recipe, [f"{reward}.name=elsewhere.rewards:judge", service]))
    assert checked.problems == []
    assert checked.reward_sets[1].rewards[0].service == ServiceSpec(
        ("http://host:8100",), "HOME", "raw", 60.0
    )


def test_a_reward_that_returns_a_wrong_count(recipe, tmp_path):
    (tmp_path / "short.py").write_text("def short(*, images, prompts, references, metadata): return [1.0]\n")
    (problem,) = problems_of(recipe, f"stages[0].rewards[0].name={tmp_path}/short.py:short")
    assert "returned 1 scores for 2 images" in problem


def test_metadata_of_every_prompt_are_tried(recipe, tmp_path):
    records = [{"tag": "counting", "include": [{"class": "circle", "count": n}]} for n in (2, 0, 3)]
    lines = [json.dumps({"prompt": "circles", **record}) for record in records]
    (tmp_path / "t2i.jsonl").write_text("\n\n".join(lines))
    reward = "stages[1].rewards[0].name=geneval_shapes"
    (problem,) = problems_of(recipe, f"stages[1].prompts={tmp_path}/t2i.jsonl", reward)
    assert problem.startswith(
        f"{tmp_path}/t2i.jsonl:3: reward 'geneval_shapes': metadata.include[0].count: 0"
    )


def test_a_model_folder_with_holes(recipe, tmp_path):
    (tmp_path / "transformer").mkdir()
    problems = problems_of(recipe, f"model.path={tmp_path}")
    assert any(p == f"model.path: {tmp_path}/transformer/config.json: missing config file" for p in problems)
    assert any(p == f"model.path: {tmp_path}/vae: missing subfolder of the model" for p in problems)


def test_an_adapter_to_start_from_is_that_of_this_model(recipe, tmp_path):
    targets = ["attn.to_q", "attn.to_k"]
    own = ["model.adapter=" + str(tmp_path), f"model.lora.targets=[{','.join(targets)}]"]
    (missing,) = problems_of(recipe, *own)
    assert missing.startswith(f"model.adapter: {tmp_path}/adapter_config.json: missing")
    transformer = load_transformer(recipe.parent / "model", dtype=torch.float32)
    attach_lora(transformer, rank=4, alpha=8.0, targets=targets)
    state = {name: torch.ones(p.shape) for name, p in adapter_parameters(transformer).items()}
    save_adapter(state, tmp_path, rank=4, alpha=8.0, targets=targets)
    checked = preflight(config := load_config(recipe, own))
    assert checked.problems == []
    assert run_inputs(config, checked.reward_sets, Inputs()).held["model.adapter"] == hash_state(state)
    (rank,) = problems_of(recipe, *own, "model.lora.rank=8")
    assert rank.startswith(f"model.adapter: {tmp_path} has rank 4") and "set model.lora.rank=4" in rank


def test_everything_wrong_is_told_at_once(recipe, tmp_path):
    """The list that the user reads once: prompts, reference image, reward, keys, model, LoRA targets."""
    (tmp_path / "broken.png").write_text("no image")
    lines = [
        json.dumps({"prompt": "make it red", "image": "broken.png"}),
        json.dumps({"prompt": "make it green", "image": "data:image/png;base64,AAAA"}),
    ]
    (tmp_path / "edit.jsonl").write_text("\n".join(lines))
    (tmp_path / "t2i.jsonl").write_text('{"prompt": "fine"}\n{"prompt": 5}\nnonsense\n')
    problems = problems_of(
        recipe,
        f"stages[0].prompts={tmp_path}/edit.jsonl",
        f"stages[1].prompts={tmp_path}/t2i.jsonl",
        f"stages[0].rewards[0].name={recipe.parent}/reward.py:absent",
        "evaluation.tasks[0].prompts=/absent.jsonl",
        "model.lora.targets=[nowhere]",
        "rollout.variant=ode",
        "stages[1].steps=0",
    )
    expected = [
        "stages[1].steps=0 must be at least 1",
        "ODE steps, which have no log-probability and cannot be trained",
        "LoRA targets match no linear layer of this transformer: nowhere",
        f"reference image {tmp_path}/broken.png of {tmp_path}/edit.jsonl:1 is unreadable",
        f"reference image data:image/png;base64,AAAA of {tmp_path}/edit.jsonl:2 is unreadable",
        "has no 'absent'",
        f"{tmp_path}/t2i.jsonl:2: key 'prompt' must be a non-empty string",
        f"{tmp_path}/t2i.jsonl:3: not valid JSON",
        "/absent.jsonl: cannot be read",
    ]
    assert len(problems) == len(expected), problems
    for part, problem in zip(expected, problems, strict=True):
        assert part in problem


def test_an_unknown_task_is_told_once(recipe):
    (problem, gap) = problems_of(recipe, "stages[0].task=video")
    assert problem.startswith("stages[0].task='video' is not one of edit, t2i, joint")
    assert gap.startswith("stage 'edit' trains video, of which evaluation.tasks holds no prompts")


# ---- paths under `ray job submit` ----------------------------------------------------------------------------


def test_a_submitted_job_needs_absolute_paths(recipe, monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert problems_of(recipe) == []
    (problem,) = problems_of(recipe, "output_dir=runs")
    assert problem.startswith("output_dir='runs' is relative, and a submitted job runs in a temporary copy")


def test_packaged_data_travels_with_the_job_but_results_do_not(recipe, monkeypatch):
    overrides = ["output_dir=recipes/runs", "stages[1].prompts=recipes/shapes/prompts/t2i_train.jsonl"]
    assert problems_of(recipe, *overrides) == []
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    (problem,) = problems_of(recipe, *overrides)
    assert problem.startswith("output_dir='recipes/runs' is relative")


def test_relative_paths_are_fine_without_a_job(recipe, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    overrides = ["output_dir=runs", "model.path=model", "stages[0].prompts=edit.jsonl"]
    assert problems_of(recipe, *overrides) == []
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    assert [p.split(" is relative")[0] for p in problems_of(recipe, *overrides)] == [
        "output_dir='runs'", "model.path='model'", "prompts of stage 'edit'='edit.jsonl'",
    ]  # fmt: skip


def test_the_variable_is_what_ray_gives_an_entry_point(monkeypatch):
    """Ray's own supervisor builds the entry point's environment; only its cluster look-up is stood in for."""
    import ray
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    node = SimpleNamespace(_ray_params=SimpleNamespace(temp_dir=None))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray._private.services, "canonicalize_bootstrap_address_or_die", lambda *_: "here:1")
    supervisor = SimpleNamespace(_metadata={}, _get_driver_runtime_env=lambda _: {})
    environment = JobSupervisor._get_driver_env_vars(supervisor, False)
    assert not submitted_job()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert submitted_job()
