"""What every schema promises: a domain for each number, a meaning for each key, and a page that says so."""

import copy
import importlib.util
import io
import math
import typing
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.keys import allowed, split_annotated, split_optional
from core.recipe import ConfigError, to_yaml, value_problems
from core.recipe_help import keys_of
from core.training.estimates import PEAK_TFLOPS
from pretrain.flow.config import ResourcesSection
from pretrain.flow.validate import load_recipe
from rewards.recipe import REST, ServedRecipe
from rl.recipe.schema import RunConfig, load_config
from rl.recipe.validate import broken_rules

ROOT = Path(__file__).resolve().parents[2]


def reference_module():
    spec = importlib.util.spec_from_file_location(
        "config_reference", ROOT / "scripts" / "config_reference.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = reference_module()
KEYS = [(command, key) for command, schema in REFERENCE.COMMANDS.items() for key in keys_of(schema)]


def undeclared(hint: object) -> bool:
    """Whether a number, here or inside a list, tuple or mapping, may be any."""
    base, bounds = split_annotated(split_optional(hint)[0])
    if base in (int, float):
        return not bounds or not allowed(hint)
    return any(
        undeclared(item) for item in typing.get_args(base) if typing.get_origin(base) in (list, tuple, dict)
    )


def test_every_number_has_a_domain_and_every_key_a_meaning():
    assert len(KEYS) > 400
    assert [(command, key.name) for command, key in KEYS if undeclared(key.hint)] == []
    assert [(command, key.name) for command, key in KEYS if not key.meaning.endswith((".", ")"))] == []


def test_the_page_of_keys_is_current():
    page = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    assert page == REFERENCE.reference(), "run: python scripts/config_reference.py > docs/reference/config.md"


def test_serving_knows_the_rest_of_a_run():
    assert {*REST, *ServedRecipe.__dataclass_fields__} == set(RunConfig.__dataclass_fields__)


def test_a_card_is_one_whose_peak_is_known():
    hint = typing.get_type_hints(ResourcesSection, include_extras=True)["card"]
    assert allowed(hint).split(", ") == list(PEAK_TFLOPS)


# ---- values that make no sense -------------------------------------------------------------------------------

RUN = """
name: run
model: {path: model}
stages: [{name: t2i, task: t2i, prompts: p.jsonl, steps: 20, rewards: [{name: clip}]}]
evaluation: {tasks: [{task: t2i, prompts: p.jsonl, rewards: [{name: clip}]}]}
"""
FLOW = """
name: run
stage: kontext
model: {path: model}
steps: 100
batch_size: 32
data: {edit_share: 0, sources: [{kind: shapes, task: t2i}]}
"""
SENSELESS = [
    "rollout.noise_level=5", "rollout.noise_level=.nan", "rollout.noise_level=.inf",
    "learner.max_grad_norm=-1", "learner.max_grad_norm=0", "learner.max_grad_norm=.nan",
    "learner.advantage_eps=.inf", "learner.log_prob_tolerance=-1", "learner.log_prob_tolerance=.nan",
    "rollout.max_failed_prompts=-1", "evaluation.every=-5", "evaluation.cross_task_margin=.nan",
    "gallery.prompts=-1", "name=../../escape", "name=.", "name=..", "name=", "stages[0].name=a/b",
    "stages[0].name=../x", "learner.learning_rate=.nan", "learner.kl_beta=.inf", "learner.clip_range=.nan",
    "learner.adam_beta1=1", "learner.ema.decay=.nan", "model.lora.alpha=.inf", "rollout.workers=true",
    "stages[0].steps=true", "stages[0].rewards[0].weight=.nan", "stages[0].rewards[0].timeout_s=.inf",
    "rollout.guidance_scale=.nan", "evaluation.baseline_guidance[0]=.nan", "resources.reward_gpus=-1",
    "seed=-1", "name=" + 201 * "x", "stages[0].name=" + 67 * "\u20ac",
]  # fmt: skip
SENSELESS_FLOW = [
    "optimization.lr=.nan", "optimization.lr=.inf", "optimization.betas=[1.5,0.9]",
    "optimization.weight_decay=.nan", "optimization.gradient_clip=.nan", "timestep_shift=.nan",
    "samples.guidance_scale=.nan", "steps=true", "name=a/b",
]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "load", "override"),
    [(RUN, load_config, item) for item in SENSELESS] + [(FLOW, load_recipe, item) for item in SENSELESS_FLOW],
)
def test_a_senseless_value_is_refused_by_name(written, text, load, override):
    path = written(text.replace("evaluation: {", "evaluation: {baseline_guidance: [2.0], "))
    path = path if load is load_config else written(text)
    load(path, [])
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    key, _, value = override.partition("=")
    (problem,) = [line for line in caught.value.problems if key in line]
    shown = {".nan": "nan", ".inf": "inf", "true": "True", "": "null", "[1.5,0.9]": "[0]=1.5"}.get(
        value, value
    )
    assert shown in problem and any(word in problem for word in ("must be", "a folder is called so"))


def test_values_rules_and_unknown_keys_come_in_one_list(written):
    with pytest.raises(ConfigError) as caught:
        load_config(
            written(RUN), ["rolout.x=1", "rollout.noise_level=5", "rollout.group_size=12"], rules=broken_rules
        )
    text = str(caught.value)
    for part in (
        "did you mean 'rollout'?",
        "rollout.noise_level=5 must be in [0, 2]",
        "group_size=12 does not divide",
    ):
        assert part in text


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """What `RUN` says; not to be changed."""
    path = tmp_path_factory.mktemp("run") / "recipe.yaml"
    path.write_text(RUN)
    return load_config(path, [])


# ---- whatever it is given --------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["???", "${name}", "${absent}", "${", "${oc.env:HOME}", "\\${a}", "edit", "t2i", ".."]),
)  # fmt: skip
NAMES = st.sampled_from(
    [
        *RunConfig.__dataclass_fields__,
        "path",
        "steps",
        "task",
        "rewards",
        "num_steps",
        "lora",
        "ema",
        "x",
        "base",
    ]
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)  # fmt: skip
FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip


@FAST
@given(tree=st.dictionaries(NAMES, TREES, max_size=5) | TREES)
def test_whatever_the_tree_nothing_but_a_config_error_is_raised(written, tree):
    path = written(yaml.safe_dump(tree))
    try:
        found = load_config(path, [], rules=broken_rules)
    except ConfigError as error:
        assert error.problems and all(error.problems)
    else:
        assert value_problems(found) == []


@FAST
@given(text=st.text(st.sampled_from(list("ab:{}[]-\n &*!'\"$.?|>#,0")), max_size=40))
def test_whatever_the_text_nothing_but_a_config_error_is_raised(written, text):
    with pytest.raises(ConfigError):
        load_config(written(text), [text[:5]])


@settings(FAST, max_examples=50)
@given(
    seed=st.integers(0, 2**63 - 1), rate=st.floats(1e-12, 1e3), level=st.floats(0, 2),
    negative=st.text(st.characters(exclude_categories=("Cs", "Cc"))) | st.sampled_from(["${a}", "\\${", "3e-4"]),
    params=st.dictionaries(st.text("abc", min_size=1), st.floats(allow_nan=False) | st.text("a${}\\:1", max_size=6)),
)  # fmt: skip
def test_a_valid_recipe_reads_back_from_its_yaml(written, run_config, seed, rate, level, negative, params):
    config = copy.deepcopy(run_config)
    config.seed, config.learner.learning_rate, config.rollout.noise_level = seed, rate, level
    config.rollout.negative_prompt, config.stages[0].rewards[0].params = negative, params
    assert value_problems(config) == []
    assert load_config(written(to_yaml(config)), []) == config


@FAST
@given(
    values=st.dictionaries(
        st.sampled_from([n.name for n in keys_of(RunConfig) if n.type.startswith(("int", "float"))]),
        st.sampled_from([0, -1, 1, 10**9, math.nan, math.inf]), max_size=4,
    )
)  # fmt: skip
def test_rules_bear_values_out_of_range(run_config, values):
    config = copy.deepcopy(run_config)
    for name, value in values.items():
        node, *path = config, *name.replace("[]", ".0").split(".")
        for part in path[:-1]:
            node = (node[0] if node else None) if part == "0" else getattr(node, part, None)
        if node is not None:
            setattr(node, path[-1], value)
    assert all(isinstance(problem, str) for problem in broken_rules(config))


# ---- --help-config -----------------------------------------------------------------------------------------------


def printed(main, *arguments):
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main([*arguments, "--help-config"])
    assert ended.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("step", ["generate", "label", "train", "evaluate", "export"])
def test_every_step_of_editreward_prints_its_keys(step):
    from rewards.editreward.__main__ import main

    section = step if step in ("generate", "label") else "train"
    assert f"{section}." in printed(main, step)


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("rl.train", [], "rollout.noise_level  (float; in [0, 2])  = 0.7"),
        ("rl.sweep.__main__", [], "parallel  (int; at least 1)  = 1"),
        ("pretrain.flow.__main__", [], "stage  (str; kontext, align, unified)  required"),
        ("pretrain.data.cache", [], "data.edit_share  (float; in [0, 1])  = 0.5"),
        ("rewards.serve", [], "stages[].rewards[].attempts  (int; at least 1)  = 3"),
        ("rewards.geneval.__main__", ["prompts"], "unseen_count  (int; at least 0)  = 0"),
        ("worlds.shapes.training.train", [], "stage kontext:"),
    ],
)
def test_help_config_names_keys_without_a_recipe(module, arguments, line):
    assert line in printed(importlib.import_module(module).main, *arguments)
