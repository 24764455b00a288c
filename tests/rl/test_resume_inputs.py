"""A resume notices what changed under the recipe's names since the checkpoint, before Ray is asked for anything."""

import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from core.recipe import to_yaml
from rewards.base import ServiceSpec
from rewards.loading import RewardSource
from rewards.worker import RewardWorkerInfo
from rl.loop.checkpoint import find_checkpoint, read_state, save_checkpoint, take_served
from rl.loop.cluster import _served
from rl.loop.observer import Observer
from rl.recipe.inputs import evaluation_identity
from rl.recipe.preflight import preflight
from rl.recipe.schema import load_config
from rl.record.state import RunState
from rl.train import _begin, main
from tests.fakes.tiny_run import tiny_recipe


class Learner:
    def save(self, folder):
        (folder / "engine.pt").write_text("")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A run that has a checkpoint of step 1; its edits have a picture file, one reward is imported and reads a file."""
    path = tiny_recipe(tmp_path / "tiny")
    folder = path.parent
    Image.new("RGB", (32, 32)).save(folder / "reference.png")
    lines = (folder / "edit.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"prompt": "make it blue", "image": "reference.png"})
    (folder / "edit.jsonl").write_text("\n".join(lines) + "\n")
    package = folder / "own_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("SCALE = 1.0\n")
    (package / "scores.py").write_text(
        "def score(*, images, prompts, references, metadata, weights):\n"
        "    from own_rewards.helper import SCALE\n"
        "    return [SCALE * i for i in range(len(images))]\n"
    )
    (folder / "weights.bin").write_text("w")
    monkeypatch.syspath_prepend(str(folder))
    for module in [name for name in sys.modules if name.startswith("own_rewards")]:
        monkeypatch.delitem(sys.modules, module)  # another test's
    own = f"{{name: 'own_rewards.scores:score', params: {{weights: {folder / 'weights.bin'}}}}}"
    (folder / "override.txt").write_text(f"stages[1].rewards=[{own}]")
    begun = begin(path, resume=None)
    begun.step = 1
    save_checkpoint(
        folder / "runs" / "tiny", begun, to_yaml(config_of(path)), Learner(), Path.mkdir, border=False
    )
    return path


def config_of(recipe):
    return load_config(recipe, [(recipe.parent / "override.txt").read_text()])


def begin(recipe, *, resume="auto", accept=False):
    config = config_of(recipe)
    return _begin(config, preflight(config).reward_sets, resume, accept)[1]


def command(recipe, *flags):
    return main(
        [str(recipe), (recipe.parent / "override.txt").read_text(), "--dry-run", "--resume", "auto", *flags]
    )


def change_weight(folder):
    (path,) = (folder / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


CHANGES = {
    "a prompt": (
        lambda folder: (folder / "t2i.jsonl").write_text((folder / "t2i.jsonl").read_text().replace("red", "pink")),
        "t2i.jsonl",
    ),
    "a picture": (
        lambda folder: Image.new("RGB", (32, 32), "red").save(folder / "reference.png"),
        "reference images of ",
    ),
    "a reward's file": (
        lambda folder: (folder / "reward.py").write_text((folder / "reward.py").read_text() + "# other\n"),
        "reward.py:redness",
    ),
    "a module that a reward imports": (
        lambda folder: (folder / "own_rewards" / "helper.py").write_text("SCALE = 2.0\n"),
        "code of reward own_rewards.scores:score",
    ),
    "a file that a reward is given": (
        lambda folder: (folder / "weights.bin").write_text("v"),
        "weights.bin of reward own_rewards.scores:score",
    ),
    "a base weight": (change_weight, "model.path/transformer/diffusion_pytorch_model.safetensors"),
    "a tokenizer": (
        lambda folder: (folder / "model" / "tokenizer" / "tokenizer_config.json").open("a").write("\n"),
        "model.path/tokenizer/tokenizer_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changed_is_refused_by_name_or_accepted_aloud(recipe, capsys, kind):
    change, name = CHANGES[kind]
    change(recipe.parent)
    assert command(recipe) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "changed since step 1" in line]
    assert name in line and "--accept-changes" in line
    assert command(recipe, "--accept-changes") == 0
    (change,) = begin(recipe, accept=True).changes
    assert name in change and change.endswith("accepted by --accept-changes")


@pytest.mark.parametrize("kind", CHANGES)
def test_scores_on_held_out_prompts_are_of_the_prompts_weights_and_rewards_they_were_made_with(recipe, kind):
    config = config_of(recipe)
    before = evaluation_identity(config, begin(recipe).inputs.held)
    CHANGES[kind][0](recipe.parent)
    after = evaluation_identity(config, begin(recipe, accept=True).inputs.held)
    trained_alone = ("a module that a reward imports", "a file that a reward is given")
    assert (after == before) == (kind in trained_alone)


def test_nothing_changed_continues_with_the_very_state(recipe, capsys):
    assert command(recipe) == 0
    assert "continues after step 1" in capsys.readouterr().out
    saved = find_checkpoint(recipe.parent / "runs" / "tiny", "auto")
    assert begin(recipe) == read_state(saved) and not begin(recipe).changes


def test_another_library_is_told_and_goes_on(recipe, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.0")
    changes = begin(recipe).changes
    assert any(line.startswith("torch changed since step 1, from ") for line in changes)


def test_a_service_says_what_it_scores_with(recipe):
    reward_sets, state = preflight(config_of(recipe)).reward_sets, begin(recipe)
    (spec,) = reward_sets[0].rewards
    name = f"code of reward {spec.name}"
    assert name in state.inputs.held, "the same file, served or not"
    take_served(state, {name: state.inputs.held[name]}, accept=False)
    with pytest.raises(ValueError, match="changed since step 1"):
        take_served(state, {name: "0" * 64}, accept=False)
    source = RewardSource(spec.name, "http://x", "0" * 64)
    info = RewardWorkerInfo("w", {reward_sets[0].name: {"redness": source}})
    assert _served(reward_sets[:1], info) == {}, "it runs here"
    served = replace(reward_sets[0], rewards=[replace(spec, service=ServiceSpec(("http://x",)))])
    assert _served([served], info) == {name: "0" * 64}
    take_served(state, {name: "0" * 64}, accept=True)
    assert state.inputs.held[name] == "0" * 64 and "accepted" in state.changes[0]


def test_accepted_changes_are_alarms_which_the_report_shows(tmp_path):
    observer, lines = object.__new__(Observer), []
    observer.state, observer.resumed = RunState(changes=["prompts a changed"]), tmp_path
    observer.journal = SimpleNamespace(alarms=lines.extend)
    observer.config = SimpleNamespace(evaluation=SimpleNamespace(baseline_guidance=[]), stages=[])
    observer.evaluator, observer.results = (
        SimpleNamespace(read=lambda moment: {}, set_others_aside=lambda: None),
        SimpleNamespace(add=lambda *_: None),
    )
    observer.begin_run(None)
    assert lines == ["prompts a changed"]
