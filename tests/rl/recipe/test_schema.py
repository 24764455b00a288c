"""A recipe is read over the schema's defaults, and everything wrong with it is told in one message."""

import pytest
import yaml

from core.recipe import ConfigError, to_yaml
from rl.recipe.schema import RunConfig, load_config

RECIPE = {
    "name": "small",
    "model": {"path": "somewhere"},
    "stages": [
        {
            "name": "edit",
            "task": "edit",
            "prompts": "e.jsonl",
            "steps": 3,
            "rewards": [{"name": "edit_shapes"}],
        },
        {
            "name": "t2i",
            "task": "t2i",
            "prompts": "t.jsonl",
            "steps": 4,
            "rewards": [{"name": "geneval_shapes"}],
        },
    ],
}


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe: a mapping, or text as it is."""

    def write(content=RECIPE):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def problems_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert str(caught.value) == "\n".join(f"- {problem}" for problem in caught.value.problems)
    return caught.value.problems


def test_what_a_recipe_leaves_out_is_the_papers(recipe):
    config = load_config(recipe())
    r, learner, lora = config.rollout, config.learner, config.model.lora
    assert (r.num_steps, r.group_size, r.noise_level) == (10, 16, 0.7)
    assert (learner.kl_beta, learner.kl_form, learner.learning_rate) == (0.04, "without_dt", 3e-4)
    assert (learner.adam_beta1, learner.adam_beta2, learner.adam_eps) == (0.9, 0.999, 1e-8)
    assert (lora.rank, lora.alpha, config.model.height, config.model.width) == (32, 64.0, 512, 512)
    assert r.prompts_per_rollout * r.group_size / learner.updates_per_rollout == 256
    assert [stage.steps for stage in config.stages] == [3, 4]


def test_defaults_are_not_shared_between_configs(recipe):
    load_config(recipe()).model.lora.targets.append("x")
    assert "x" not in load_config(recipe()).model.lora.targets


def test_overrides_reach_into_lists_and_new_sections(recipe):
    config = load_config(
        recipe(),
        [
            "stages[0].steps=5", "stages.1.steps=6", "rollout.group_size=8", "stages[1].rewards[0].weight=0.5",
            "model.lora.targets=[attn.to_q, attn.to_k]", "learner.log_prob_tolerance=null", "name=other=name",
        ],
    )  # fmt: skip
    assert [stage.steps for stage in config.stages] == [5, 6]
    assert config.rollout.group_size == 8
    assert config.stages[1].rewards[0].weight == 0.5
    assert config.model.lora.targets == ["attn.to_q", "attn.to_k"]
    assert config.learner.log_prob_tolerance is None
    assert config.name == "other=name"


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4"])
def test_exponents_are_numbers_everywhere(recipe, text):
    """YAML 1.1 takes 3e-4 for a string; reward parameters have no schema that would mend it."""
    overrides = [f"learner.learning_rate={text}", f"stages[0].rewards[0].params.threshold={text}"]
    config = load_config(recipe(), overrides)
    assert config.learner.learning_rate == 3e-4
    assert config.stages[0].rewards[0].params == {"threshold": 3e-4}
    text_recipe = yaml.safe_dump(RECIPE) + f"learner: {{learning_rate: {text}}}\n"
    assert load_config(recipe(text_recipe)).learner.learning_rate == 3e-4


def test_interpolations_see_defaults_and_overrides(recipe):
    path = recipe(RECIPE | {"model": {"path": "${output_dir}/base"}})
    assert load_config(path).model.path == "runs/base"
    assert load_config(path, ["output_dir=/data"]).model.path == "/data/base"
    (problem,) = problems_of(recipe(RECIPE | {"model": {"path": "${absent}/base"}}))
    assert problem == "key 'model.path': Interpolation key 'absent' not found"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("naem", "unknown key 'naem': did you mean 'name'?"),
        ("alarms.cross_tasks", "unknown key 'alarms.cross_tasks': did you mean 'alarms.cross_task'?"),
        ("learner.kl_bta", "unknown key 'learner.kl_bta': did you mean 'learner.kl_beta'?"),
        ("stages[1].step", "unknown key 'stages[1].step': did you mean 'stages[1].steps'?"),
        (
            "stages[0].rewards[0].wieght",
            "'stages[0].rewards[0].wieght': did you mean 'stages[0].rewards[0].weight'?",
        ),
        (
            "stages[0].rewards[0].service.url",
            "'stages[0].rewards[0].service.url': did you mean 'stages[0].rewards[0].service.urls'?",
        ),
        ("learner.ema.zzz", "unknown key 'learner.ema.zzz': known here: enabled, decay, every"),
    ],
)
def test_an_unknown_key_offers_the_nearest_name(recipe, key, expected):
    (problem,) = problems_of(recipe(), f"{key}=1")
    assert problem.endswith(expected)


def test_a_part_that_may_be_absent_is_checked_where_it_is_given(recipe):
    assert [stage.rehearsal for stage in load_config(recipe()).stages] == [None, None]
    unknown, missing = problems_of(recipe(), "stages[1].rehearsal.betta=1")
    assert unknown.endswith("'stages[1].rehearsal.betta': did you mean 'stages[1].rehearsal.beta'?")
    assert missing.startswith("key 'stages[1].rehearsal.beta' has no value")
    given = load_config(recipe(), ["stages[1].rehearsal.beta=0.5"]).stages[1].rehearsal
    assert (given.beta, given.num_prompts, given.samples) == (0.5, 256, 32)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.num_steps=ten", "key 'rollout.num_steps': Value 'ten' of type 'str'"),
        ("rollout.num_steps=2.5", "key 'rollout.num_steps': Value '2.5' of type 'float'"),
        ("learner.learning_rate=fast", "key 'learner.learning_rate': Value 'fast'"),
        ("learner.kl_beta=null", "key 'learner.kl_beta'"),
        ("learner.ema=null", "key 'learner.ema'"),
        ("stages[0].task=null", "key 'stages[0].task'"),
        ("rollout=5", "key 'rollout' must be a mapping with keys workers, num_steps"),
        ("stages=5", "key 'stages' must be a list of mappings"),
        (
            "stages[0].rewards[0].service=5",
            "key 'stages[0].rewards[0].service' must be a mapping with keys urls",
        ),
        ("stages[0].rewards[0].service.urls=5", "key 'stages[0].rewards[0].service.urls': "),
        (
            "stages[0].rewards[0].service.unavailable_s=long",
            "key 'stages[0].rewards[0].service.unavailable_s'",
        ),
        ("stages[0]=5", "key 'stages[0]' must be a mapping with keys name, task"),
        ("evaluation.tasks=edit", "key 'evaluation.tasks' must be a list of mappings"),
        ("learner.kl_beta=[1", "override 'learner.kl_beta=[1': "),
        ("stages[4].steps=5", "override 'stages[4].steps=5': list index out of range"),
        ("learner.kl_beta", "override 'learner.kl_beta': write it as key=value"),
        ("=3", "override '=3': write it as key=value"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(recipe, override, expected):
    (problem,) = problems_of(recipe(), override)
    assert problem.startswith(expected)


def test_missing_values_are_named_with_the_way_to_give_them(recipe):
    stages = [{"name": "edit", "prompts": "e.jsonl", "rewards": [{}]}]
    assert problems_of(recipe({"stages": stages})) == [
        f"key '{key}' has no value; set it in the recipe or as {key}=..."
        for key in ("name", "model.path", "stages[0].task", "stages[0].steps", "stages[0].rewards[0].name")
    ]


def test_the_parts_of_a_joint_stage_are_checked_key_by_key(recipe):
    stages = [
        {"name": "joint", "task": "joint", "steps": 4, "parts": [{"task": "edit", "promts": "e.jsonl"}]}
    ]
    problems = problems_of(recipe({"model": {"path": "m"}, "name": "x", "stages": stages}))
    assert problems == [
        "unknown key 'stages[0].parts[0].promts': did you mean 'stages[0].parts[0].prompts'?",
        "key 'stages[0].parts[0].prompts' has no value; set it in the recipe or as stages[0].parts[0].prompts=...",
    ]


def test_all_errors_come_in_one_message(recipe):
    broken = RECIPE | {"model": {}, "learner": {"kl_bta": 1, "ranks": "many"}, "rollout": {"group_size": [4]}}
    text = "\n".join(problems_of(recipe(broken)))
    for expected in (
        "'model.path' has no value",
        "'learner.kl_bta'",
        "'learner.ranks'",
        "'rollout.group_size'",
    ):
        assert expected in text
    assert len(problems_of(recipe(), "foo", "=1", "stages[9].steps=1")) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [("- a\n- b\n", "a recipe is a mapping of keys, found a ListConfig"), ("a: [b\n", "recipe.yaml: ")],
)
def test_files_that_are_no_recipe(recipe, content, expected):
    (problem,) = problems_of(recipe(content))
    assert expected in problem


def test_an_absent_recipe_is_named_with_the_place_looked_at(tmp_path):
    (problem,) = problems_of(tmp_path / "absent.yaml")
    assert problem == f"recipe {tmp_path}/absent.yaml does not exist (looked for {tmp_path}/absent.yaml)"


def test_the_written_config_reads_back_the_same(recipe, tmp_path):
    overrides = ["learner.learning_rate=6e-4", "stages[0].rewards[0].params.a=[1, x]"]
    config = load_config(recipe(), [*overrides, "stages[1].rewards[0].service.urls=[http://host:8100]"])
    assert config.stages[0].rewards[0].service is None and config.stages[1].rewards[0].service is not None
    assert isinstance(config, RunConfig)
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config


def test_a_recipe_does_not_read_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-value")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: {path: m}\nrollout: {negative_prompt: '${oc.env:JUDGE_KEY}'}\n")
    with pytest.raises(ConfigError, match="must not read the environment") as found:
        load_config(recipe)
    assert "secret-value" not in str(found.value)


def test_a_recipe_over_another_one_changes_keys_and_replaces_lists(recipe, tmp_path):
    recipe(RECIPE | {"learner": {"kl_beta": 0.5, "ranks": 3}})
    (tmp_path / "more").mkdir()
    middle = tmp_path / "more" / "middle.yaml"
    middle.write_text("base: ../recipe.yaml\nlearner: {kl_beta: 0.25}\n")
    top = tmp_path / "more" / "top.yaml"
    top.write_text("base: middle.yaml\nname: top\nstages:\n" + yaml.safe_dump(RECIPE["stages"][1:]))
    config = load_config(top, ["learner.ranks=5"])
    assert (config.name, config.learner.kl_beta, config.learner.ranks) == ("top", 0.25, 5)
    assert [stage.name for stage in config.stages] == ["t2i"]
    assert "base" not in yaml.safe_load(to_yaml(config))


@pytest.mark.parametrize(
    ("base", "expected"), [("absent.yaml", "absent.yaml does not exist"), ("recipe.yaml", "leads back")]
)
def test_a_base_that_cannot_be_is_named(recipe, base, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(recipe(RECIPE | {"base": base}))
