"""Values that no run can use are refused by the name of their key, with what it may be."""

import pytest

from core.recipe import ConfigError
from pretrain.flow.validate import load_recipe as load_flow
from rewards.editreward.validate import load_recipe as load_editreward
from rl.recipe.schema import load_config
from rl.recipe.validate import broken_rules
from rl.train import main

RUN = """
    rollout.noise_level=5               | rollout.noise_level=5 must be in [0, 2]
    rollout.noise_level=.nan            | rollout.noise_level=nan must be finite and in [0, 2]
    rollout.noise_level=.inf            | rollout.noise_level=inf must be finite
    rollout.noise_level=abc             | key 'rollout.noise_level': Value 'abc' of type 'str' must be a number
    rollout.max_failed_prompts=-1       | rollout.max_failed_prompts=-1 must be at least 0
    rollout.group_size=1                | group-relative advantages need at least 2 samples
    rollout.chunk_size=5                | make the chunk a divisor of the group
    rollout.workers=0                   | rollout.workers=0 must be at least 1
    rollout.num_steps=0                 | rollout.num_steps=0 must be at least 1
    rollout.guidance_scale=.inf         | rollout.guidance_scale=inf must be finite
    rollout.variant=dde                 | rollout.variant='dde' is not one of sde, cps, ode
    rollout.window_last=11              | rollout.window_last=11 lies beyond rollout.num_steps=10
    learner.max_grad_norm=-1            | learner.max_grad_norm=-1 must be above 0
    learner.max_grad_norm=0             | learner.max_grad_norm=0 must be above 0
    learner.max_grad_norm=.nan          | learner.max_grad_norm=nan must be finite
    learner.advantage_eps=.inf          | learner.advantage_eps=inf must be finite
    learner.log_prob_tolerance=-1       | learner.log_prob_tolerance=-1 must be above 0
    learner.log_prob_tolerance=.nan     | learner.log_prob_tolerance=nan must be finite
    learner.learning_rate=0             | learner.learning_rate=0 must be above 0
    learner.learning_rate=1e999         | learner.learning_rate=inf must be finite
    learner.final_learning_rate=1       | at most learner.learning_rate=0.002
    learner.adam_beta1=1                | learner.adam_beta1=1 must be in [0, 1)
    learner.kl_form=exakt               | learner.kl_form='exakt' is not one of without_dt, exact
    learner.zero_stage=true             | key 'learner.zero_stage'
    learner.updates_per_rollout=5       | does not divide into learner.updates_per_rollout=5
    learner.drop_last_steps=10          | learner.drop_last_steps=10 leaves none of rollout.num_steps=10
    learner.train_steps=99              | learner.train_steps=99: there are 6 stochastic steps
    learner.ema.every=1000              | lower learner.ema.every or set
    evaluation.every=-5                 | evaluation.every=-5 must be at least 0
    evaluation.cross_task_margin=.nan   | evaluation.cross_task_margin=nan must be finite
    evaluation.tasks[0].num_prompts=1   | evaluation.tasks[0].num_prompts=1 must be at least 2
    evaluation.guidance_scale=.nan      | evaluation.guidance_scale=nan must be finite
    gallery.prompts=-1                  | gallery.prompts=-1 must be at least 0
    checkpoint.every=0                  | checkpoint.every=0 must be at least 1
    resources.call_timeout_s=0          | resources.call_timeout_s=0 must be above 0
    resources.placement=anywhere        | is not one of shared, separate, inprocess
    model.dtype=float16                 | model.dtype='float16' is not one of float32, bfloat16
    model.lora.rank=0                   | model.lora.rank=0 must be at least 1
    name=../../escape                   | name='../../escape'
    name=.                              | name='.'
    name=null                           | key 'name': null is not allowed
    name=${nowhere}                     | key 'name': Interpolation key 'nowhere' not found
    name=${oc.env:HOME}                 | a recipe must not read the environment
    stages[0].name=a/b                  | stages[0].name='a/b'
    stages[0].name=../x                 | stages[0].name='../x'
    stages[0].steps=0                   | stages[0].steps=0 must be at least 1
    stages[0].task=video                | stages[0].task='video' is not one of edit, t2i, joint
    stages[0].rewards=[]                | stage 'edit': rewards is empty; name at least one
    stages[0].rewards[0].weight=.nan    | stages[0].rewards[0].weight=nan must be finite
    stages[0].rewards[0].timeout_s=-1   | stages[0].rewards[0].timeout_s=-1 must be above 0
    stages[0].rewards[0].on_missing=0.0 | stages[0].rewards[0].on_missing=0.0 is not one of mask, drop_group, stop
    stages=[]                           | stages: name at least one
    stages[9].name=x                    | override 'stages[9].name=x': list index out of range
    seed=-1                             | seed=-1 must be in [0,
    seed=1.5                            | key 'seed': Value '1.5' of type 'float' must be a whole number
    learnr.kl_beta=0                    | unknown key 'learnr': did you mean 'learner'?
    learner.kl_betta=0                  | unknown key 'learner.kl_betta': did you mean 'learner.kl_beta'?
    learner=7                           | key 'learner' must be a mapping with keys
    rollout.group_size                  | write it as key=value
"""
FLOW = """
    optimization.lr=.nan                | optimization.lr=nan must be finite
    optimization.lr=.inf                | optimization.lr=inf must be finite
    optimization.betas=[1.5,0.9]        | optimization.betas[0]=1.5 must be in [0, 1)
    optimization.weight_decay=.nan      | optimization.weight_decay=nan must be finite
    optimization.gradient_clip=.nan     | optimization.gradient_clip=nan must be finite
    timestep_shift=.nan                 | timestep_shift=nan must be finite
    samples.guidance_scale=.nan         | samples.guidance_scale=nan must be finite
    steps=0                             | steps=0 must be at least 1
    name=a/b                            | name='a/b'
"""
EDITREWARD = """
    train.optimization.lr=.nan          | train.optimization.lr=nan must be finite
    train.optimization.betas=[1.5,0.9]  | train.optimization.betas[0]=1.5 must be in [0, 1)
    name=../x                           | name='../x'
"""
READERS = {
    "recipes/shapes/pdtr.yaml": (RUN, lambda path, given: load_config(path, given, rules=broken_rules)),
    "recipes/pretrain_kontext_sd35m.yaml": (FLOW, load_flow),
    "recipes/shapes/editreward.yaml": (EDITREWARD, load_editreward),
}
ROWS = [
    (recipe, *map(str.strip, row.split("|", 1)))
    for recipe, (table, _) in READERS.items()
    for row in table.strip().splitlines()
]


@pytest.mark.parametrize(("recipe", "override", "expected"), ROWS, ids=[row[1] for row in ROWS])
def test_a_value_is_refused_by_its_key(recipe, override, expected):
    with pytest.raises(ConfigError) as caught:
        READERS[recipe][1](recipe, [override])
    assert expected in str(caught.value)


FILES = {
    "list.yaml": (b"- a\n", "a recipe is a mapping of keys, found a ListConfig"),
    "latin.yaml": (b"name: caf\xe9\n", "latin.yaml: 'utf-8' codec can't decode"),
    "tab.yaml": (b"name:\n\t- a\n", "tab.yaml: while scanning"),
    "deep.yaml": (b"name: " + b"[" * 2000 + b"]" * 2000, "deep.yaml: maximum recursion depth"),
    "half.yaml": (b'name: "\\ud83d"\n', "half.yaml: while"),
    "loop.yaml": (b"base: loop.yaml\n", "a recipe cannot stand on itself"),
    "bom.yaml": (b"\xef\xbb\xbfname: a\n", "key 'model.path' has no value"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_file_is_refused_by_its_name(tmp_path, capsys, name):
    content, expected = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name)]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/nope", "/dev/null/runs"])
def test_a_place_that_cannot_be_written(capsys, place):
    assert main(["recipes/shapes/pdtr.yaml", f"output_dir={place}"]) == 2
    assert f"output_dir='{place}' cannot be written" in capsys.readouterr().err
