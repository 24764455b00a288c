"""Secrets of the environment reach those that need them, and nothing that a run writes, logs or tells Ray."""

import json
import logging
from pathlib import Path

import pytest
import ray
import yaml

from core.failures import ClusterError
from rl.recipe.schema import load_config
from rl.report.__main__ import main as report
from rl.train import main, train
from tests.fakes.canaries import CANARIES, MARK, secrets_in_environment
from tests.fakes.judge_server import JudgeServer
from tests.fakes.service_process import Service, write_recipe
from tests.fakes.tiny_run import tiny_recipe


def secret_recipe(folder: Path, judge_url: str, service: str, service_url: str, **changes) -> Path:
    """One step of editing by a judge that wants a key and a service that wants a token."""
    judge = {"protocol": "expected_score", "model": "pixels", "base_url": judge_url, "attempts": 1}
    served = {"urls": [service_url], "token_env": "REWARD_SERVICE_TOKEN"}
    rewards = [{"name": "judge", "params": judge}, {"name": service, "service": served}]
    recipe = tiny_recipe(folder, rollout__num_steps=2, gallery__prompts=1, **changes)
    document = yaml.safe_load(recipe.read_text())
    document["stages"] = [document["stages"][0] | {"steps": 1, "rewards": rewards}]
    document["evaluation"]["tasks"] = [
        document["evaluation"]["tasks"][0] | {"num_prompts": 2, "rewards": rewards}
    ]
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    return recipe


def marked(folder: Path) -> list[str]:
    """The files that hold a canary."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


def told_ray() -> str:
    """What Ray keeps of jobs, their environments, actors and nodes."""
    from ray._private.state import actors, state

    kept = [actors(), state.job_table(), ray.nodes(), ray.get_runtime_context().runtime_env]
    return json.dumps(kept, default=str)


def test_no_secret_leaves_the_environment(tmp_path, ray_session, caplog, capfd, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    tiny_recipe(tmp_path)
    service = f"{tmp_path / 'reward.py'}:redness"
    rewards = {"edit": [{"name": service, "timeout_s": 10}]}
    options = ("--token-env", "REWARD_SERVICE_TOKEN")
    serving = Service(write_recipe(tmp_path, rewards, "service.yaml"), *options)
    try:
        serving.ready()
        with JudgeServer(token=CANARIES["OPENAI_API_KEY"]) as judge, caplog.at_level(logging.INFO):
            recipe = secret_recipe(tmp_path, judge.base_url, service, serving.url)
            assert train(load_config(recipe)) == 0
            assert judge.records and {r.token_sha256 for r in judge.records} != {None}
            judge.token = "another"  # it echoes the key that it refuses, as OpenAI does
            with pytest.raises(ClusterError, match="Incorrect API key") as refused:
                train(load_config(recipe, ["name=refused"]))
        assert report([str(tmp_path / "runs" / "tiny")]) == 0
    finally:
        serving.stop()
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # Ray's logs among it
    out = tmp_path / "runs" / "tiny"
    written = {path.name for path in out.iterdir()}
    assert {"report.html", "status.json", "checkpoints", "tensorboard", "adapter"} <= written
    assert marked(tmp_path) == []
    assert marked(session) == []
    shown = capfd.readouterr()
    assert MARK not in caplog.text + str(refused.value) + shown.out + shown.err + told_ray()


@pytest.mark.parametrize(
    ("reward", "key", "value", "told"),
    [
        (0, "params.base_url", f"http://user:{MARK}@127.0.0.1:9/v1", "base_url number 1 is not an endpoint"),
        (0, "params.api_key_env", MARK, "api_key_env is no name of an environment variable"),
        (1, "service.urls", [f"http://user:{MARK}@127.0.0.1:9"] * 2, "a URL holds a user or password"),
        (1, "service.token_env", MARK, "service.token_env: no name of an environment variable"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_shown(tmp_path, capfd, reward, key, value, told):
    recipe = secret_recipe(
        tmp_path, "http://127.0.0.1:9/v1", f"{tmp_path / 'reward.py'}:redness", "http://127.0.0.1:9"
    )
    document = yaml.safe_load(recipe.read_text())
    section, _, name = key.partition(".")
    document["stages"][0]["rewards"][reward][section][name] = value
    recipe.write_text(yaml.safe_dump(document))
    with secrets_in_environment():
        assert main([str(recipe)]) == 2
    shown = capfd.readouterr()
    assert told in shown.err and MARK not in shown.out + shown.err
    assert not (tmp_path / "runs").exists()
