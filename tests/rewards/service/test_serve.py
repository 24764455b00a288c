"""The command line: what it refuses, what it needs to be installed, and how it ends."""

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest
from PIL import Image

from core.recipe import ConfigError
from rewards import serve
from rewards.base import RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.loading import load_reward
from rewards.serve import load_served, select_rewards
from rewards.service.hosting import HostedReward
from tests.fakes.service_process import ROOT, Service, served, write_recipe

WITHOUT = """
    import importlib.abc, runpy, sys

    class Absent(importlib.abc.MetaPathFinder):
        names = {"torch", "ray", "deepspeed", "transformers", "diffusers", "peft", "openai", "torchvision"}

        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] in self.names:
                raise ImportError(f"{name} is not installed here")

    sys.meta_path.insert(0, Absent())
    sys.path.insert(0, "")
    del sys.argv[0]
    runpy.run_module("rewards.serve", run_name="__main__", alter_sys=True)
"""
WAITING = """
    import asyncio, pathlib

    async def waiting(*, images, prompts, references, metadata, flag="none"):
        if prompts[0] == "wait":
            pathlib.Path(flag).touch()
            await asyncio.sleep(1.0)
        elif prompts[0] == "wait for ever":
            pathlib.Path(flag).touch()
            await asyncio.sleep(60)
        return [0.25] * len(images)
"""


def test_a_service_needs_neither_torch_nor_ray(tmp_path):
    script = tmp_path / "without.py"
    script.write_text(textwrap.dedent(WITHOUT))
    recipe = write_recipe(tmp_path, {"t2i": [{"name": "geneval_shapes"}], "edit": [{"name": "edit_shapes"}]})
    service = Service(recipe, command=(str(script), "rewards.serve")).ready()
    try:
        assert sorted(httpx.get(f"{service.url}/v1/rewards", trust_env=False).json()["rewards"]) == [
            "edit_shapes",
            "geneval_shapes",
        ]
    finally:
        service.stop()


def waiting_service(folder, *options):
    (folder / "waiting.py").write_text(textwrap.dedent(WAITING))
    reward = {"name": f"{folder}/waiting.py:waiting", "params": {"flag": str(folder / "flag")}}
    service = Service(write_recipe(folder, {"t2i": [reward]}), *options).ready()
    spec = RewardSpec(reward["name"], params=reward["params"])
    return service, spec


def batch(prompt):
    return RewardBatch([Image.new("RGB", (8, 8))] * 2, [prompt] * 2, [[]] * 2, [{}] * 2)


def call_and_end(service, spec, folder, prompt, **settings):
    """Score; once the request is inside the reward, SIGTERM. The answer, or what was raised."""
    results = []
    loaded = load_reward(served(spec, service.url, **settings))

    def call():
        try:
            results.append(asyncio.run(call_reward(loaded, batch(prompt))))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(2000):
        if (folder / "flag").exists():
            break
        thread.join(timeout=0.01)
    service.send(signal.SIGTERM)
    thread.join(timeout=30)
    return results[0]


def test_sigterm_lets_requests_in_work_finish(tmp_path):
    service, spec = waiting_service(tmp_path)
    try:
        assert call_and_end(service, spec, tmp_path, "wait").scores == [0.25, 0.25]
        assert service.process.wait(timeout=30) == 0
    finally:
        service.stop()


def test_requests_that_outlast_the_grace_period_are_told_so(tmp_path):
    service, spec = waiting_service(tmp_path, "--grace-s", "1")
    try:
        error = call_and_end(service, spec, tmp_path, "wait for ever", unavailable_s=0.5)
        assert service.url in str(error) and "no service answered" in str(error)
        assert service.process.wait(timeout=30) == 0
    finally:
        service.stop()


def refusal(capsys, *words):
    assert serve.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, {"t2i": [{"name": "geneval_shapes"}], "edit": [{"name": "edit_shapes"}]})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--host", "::"], "--token-env NAME, or say --insecure"),
        (
            ["--token-env", "NO_SUCH_TOKEN"],
            "variable NO_SUCH_TOKEN, which holds the bearer token, is not set",
        ),
        (["--reward", "clip"], "no reward is called 'clip'; there are ['edit_shapes', 'geneval_shapes']"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid port 8100"),
        (["--port", "99999"], "cannot listen on 127.0.0.1 port 99999"),
        (["stages[0].rewards[0].name=geneval_shapez"], "did you mean 'geneval_shapes'"),
        (["stages[0].rewards[0].params.credit=half"], "credit: 'half'"),
        (["stages[0].rewords=1"], "unknown key 'stages[0].rewords'"),
    ],
)
def test_what_cannot_be_served_is_told(recipe, capsys, monkeypatch, options, expected):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert expected in refusal(capsys, recipe, *options)


def test_params_that_the_hash_cannot_hold_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "own.py").write_text("def own(*, images, prompts, references, metadata, scale): return []\n")
    reward = {"name": f"{tmp_path}/own.py:own", "params": {"scale": float("nan")}}
    text = refusal(capsys, write_recipe(tmp_path, {"t2i": [reward]}), "--port", 0)
    assert "reward 'own': params of a served reward must be plain JSON: Out of range float" in text


def test_a_port_in_use_is_told(recipe, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: " in refusal(capsys, recipe, "--port", port)


@pytest.mark.parametrize("option", ["--max-request-mb", "--concurrency", "--grace-s"])
def test_a_limit_must_be_at_least_one(recipe, capsys, option):
    with pytest.raises(SystemExit):
        serve.main([str(recipe), option, "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_the_rewards_of_all_stages_and_evaluations_are_served_once_and_here(tmp_path):
    service = {"urls": ["http://elsewhere:1"]}
    rules = {"name": "geneval_shapes", "params": {"credit": "strict"}, "label": "rules", "service": service}
    dense = {"name": "geneval_shapes", "weight": 0.0}
    config = load_served(write_recipe(tmp_path, {"t2i": [rules, dense], "edit": [{"name": "edit_shapes"}]}))
    config.evaluation.tasks = load_served(ROOT / "recipes/shapes/pdtr.yaml").evaluation.tasks
    trials = select_rewards(config, [])
    found = {trial.rewards[0].label or trial.rewards[0].name: trial for trial in trials}
    templates = {"geneval_shapes_template", "edit_shapes_template"}
    assert set(found) == {"rules", "geneval_shapes", "edit_shapes"} | templates and len(trials) == 5
    assert found["rules"].rewards[0].service is None and found["rules"].rewards[0].params == {
        "credit": "strict"
    }
    assert found["rules"].example_metadata and found["edit_shapes"].task == "edit"
    assert [trial.rewards[0].label for trial in select_rewards(config, ["rules"])] == ["rules"]


def test_a_label_that_means_two_rewards_is_refused_where_it_is_served(tmp_path):
    strict = {"name": "geneval_shapes", "params": {"credit": "strict"}}
    recipe = write_recipe(
        tmp_path, {"t2i": [{"name": "geneval_shapes"}], "edit": [strict, {"name": "edit_shapes"}]}
    )
    config = load_served(recipe)
    with pytest.raises(
        ConfigError, match="'geneval_shapes' means geneval_shapes {} and geneval_shapes {'credit'"
    ):
        select_rewards(config, [])
    assert len(select_rewards(config, ["edit_shapes"])) == 1


def test_a_reward_of_both_tasks_is_ready_once_each_has_been_tried(tmp_path):
    path = tmp_path / "fussy.py"
    path.write_text(
        "class Fussy:\n"
        "    def readiness(self, task): return [] if task == 't2i' else ['it reads one picture of two']\n"
        "    def score(self, **_): return []\n"
    )
    entry = {"name": f"{path}:Fussy", "label": "fussy"}
    (trial,) = select_rewards(load_served(write_recipe(tmp_path, {"t2i": [entry], "edit": [entry]})), [])
    hosted = HostedReward(trial, 4)
    asyncio.run(hosted.try_out())
    assert hosted.problems == ["reward 'fussy': it reads one picture of two"]


def test_a_machine_without_the_prompts_still_serves(tmp_path, caplog):
    config = load_served(write_recipe(tmp_path, {"t2i": [{"name": "geneval_shapes"}]}))
    config.stages[0].prompts = "/absent/prompts.jsonl"
    (trial,) = select_rewards(config, [])
    assert trial.example_metadata == {} and "made-up prompt: /absent/prompts.jsonl" in caplog.text


def test_importing_the_command_line_loads_nothing_heavy():
    code = "import sys, rewards.serve; print([n for n in ('torch', 'ray', 'deepspeed', 'fastapi') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
