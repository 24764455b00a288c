"""PDTR on the shapes world with the judge as its editing reward, over real HTTP: an outage, a dead endpoint, a spent
budget, and the whole run again from the cache.
"""

import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from models.lora.attach import hash_state
from models.lora.files import read_adapter
from rewards.base import FatalRewardError
from rl.recipe.schema import load_config
from rl.train import train
from tests.fakes.judge_server import JudgeServer

SHAPES = Path(__file__).resolve().parents[3] / "recipes" / "shapes"
STEPS = 3
OUTAGE_S = 4.0
CACHED = "reward/judge/component/cached"


def judged_recipe(folder: Path, base_url: str, **params) -> Path:
    """PDTR on the shapes base, small: stage 1 and the evaluation of editing by the judge, stage 2 by GenEval."""
    settings = {"protocol": "expected_score", "model": "pixels", "base_url": base_url, "api_key_env": None}
    judge = [{"name": "judge", "timeout_s": 120, "params": settings | {"concurrency": 4} | params}]
    geneval = [{"name": "geneval_shapes"}]
    prompts = {task: f"{SHAPES}/prompts/{task}" for task in ("edit", "t2i")}
    recipe = {
        "base": f"{SHAPES}/pdtr.yaml",
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"path": f"{SHAPES}/base"},
        "rollout": {"workers": 1, "num_steps": 4, "group_size": 4, "prompts_per_rollout": 2, "chunk_size": 4}
        | {"window_size": 0, "window_last": 0},
        "learner": {"ranks": 1, "micro_batch_size": 4},
        "stages": [
            {"name": "edit", "task": "edit", "prompts": f"{prompts['edit']}_train.jsonl", "steps": STEPS}
            | {"rewards": judge},
            {"name": "t2i", "task": "t2i", "prompts": f"{prompts['t2i']}_train.jsonl", "steps": 1}
            | {"rewards": geneval},
        ],
        "evaluation": {
            "tasks": [
                {"task": "edit", "prompts": f"{prompts['edit']}_heldout.jsonl", "num_prompts": 4}
                | {"rewards": judge},
                {"task": "t2i", "prompts": f"{prompts['t2i']}_heldout.jsonl", "num_prompts": 4}
                | {"rewards": geneval},
            ],
            "num_steps": 2,
            "baseline_guidance": [],
        },
        "checkpoint": {"every": 1},
        "gallery": {"prompts": 0},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def records(folder: Path) -> list[dict]:
    lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def adapter_hash(folder: Path) -> str:
    return hash_state(read_adapter(folder / "runs" / "tiny" / "adapter")[0])


def rewards_of(folder: Path) -> list[float]:
    return [record["reward/mean"] for record in records(folder) if "reward/mean" in record]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, ray_session):
    """The reference, with a cache that holds every answer."""
    folder = tmp_path_factory.mktemp("straight")
    with JudgeServer() as server:
        recipe = judged_recipe(folder, server.base_url, cache=str(folder / "answers.sqlite"))
        assert train(load_config(recipe)) == 0
        asked = len(server.records)
    assert asked > 0 and server.high_water <= 4
    return folder, server.base_url


def test_the_judge_trains_and_every_part_is_logged(straight):
    folder, _ = straight
    steps = [r for r in records(folder) if r.get("stage") == "edit" and "reward/mean" in r]
    assert len(steps) == STEPS
    for step in steps:
        assert 0.0 < step["reward/mean"] < 1.0 and step["reward/missing_share"] == 0.0
        assert {
            f"reward/judge/component/{part}" for part in ("expected", "digit_mass", "refused", "cached")
        } <= set(step)


def test_an_outage_changes_no_sample(straight, tmp_path):
    """Longer than one call of the judge tries (2 s here), so that the reward itself is called again."""
    folder, _ = straight
    with JudgeServer() as server:
        recipe = judged_recipe(tmp_path, server.base_url, attempts=2, longest_wait_s=2.0)
        outage = threading.Thread(target=_lose, args=(server, tmp_path), daemon=True)
        outage.start()
        assert train(load_config(recipe)) == 0
        outage.join(timeout=240)
        assert not outage.is_alive()
    assert rewards_of(tmp_path) == rewards_of(folder)
    assert adapter_hash(tmp_path) == adapter_hash(folder)
    assert max(r.get("time/step", 0.0) for r in records(tmp_path)) > OUTAGE_S / 2, "nothing waited"


def _lose(server: JudgeServer, folder: Path) -> None:
    """Take the server away in the middle of the first stage, and bring it back on the same port."""
    _wait_for_a_step(folder)
    server.stop()
    time.sleep(OUTAGE_S)
    server.start()


def _wait_for_a_step(folder: Path) -> None:
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and "loss/total" in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_the_whole_run_again_from_the_cache_without_a_server(straight, tmp_path):
    folder, url = straight
    recipe = judged_recipe(tmp_path, url, mode="replay", cache=str(folder / "answers.sqlite"))
    assert train(load_config(recipe)) == 0
    assert adapter_hash(tmp_path) == adapter_hash(folder)
    cached = [r[CACHED] for r in records(tmp_path) if CACHED in r]
    assert cached and set(cached) == {1.0}


def test_a_server_dead_for_good_stops_the_run_and_is_named(straight, tmp_path):
    with JudgeServer() as server:
        recipe = judged_recipe(
            tmp_path, server.base_url, give_up_after_s=2.0, attempts=2, longest_wait_s=0.5, timeout_s=20.0
        )
        gone = threading.Thread(target=_stop_after_a_step, args=(server, tmp_path), daemon=True)
        gone.start()
        with pytest.raises(FatalRewardError) as stopped:
            train(load_config(recipe))
        gone.join(timeout=240)
    assert f"pixels at {server.base_url}" in str(stopped.value)
    assert "give_up_after_s 2" in str(stopped.value)


def _stop_after_a_step(server: JudgeServer, folder: Path) -> None:
    _wait_for_a_step(folder)
    server.stop()


def test_a_spent_budget_stops_the_run_and_a_higher_one_resumes_it(straight, tmp_path):
    """The answers paid for before the stop are not asked again: both parts together ask what the straight run did."""
    folder, _ = straight
    with JudgeServer() as server:
        # The server bills 120 tokens an answer; a question in flight is counted with its upper bound, some 2,000.
        paths = {"cache": str(tmp_path / "answers.sqlite"), "max_total_tokens": 4_000, "concurrency": 1}
        recipe = judged_recipe(tmp_path, server.base_url, **paths)
        with pytest.raises(FatalRewardError, match="max_total_tokens"):
            train(load_config(recipe))
        assert 12 < len(server.records) < 36, "the budget should end in the middle of the run"
        assert any("loss/total" in record for record in records(tmp_path)), (
            "a step should stand before the stop"
        )
        recipe = judged_recipe(tmp_path, server.base_url, **paths | {"max_total_tokens": 10_000_000})
        assert train(load_config(recipe), resume="auto") == 0
        questions = {(record.text, record.images) for record in server.records}
        assert len(questions) == len(server.records), "a question was paid for twice"
    assert adapter_hash(tmp_path) == adapter_hash(folder)
