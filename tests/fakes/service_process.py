"""Reward services as the user starts them: processes of their own, over real HTTP."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import yaml

from rewards.base import RewardSpec, ServiceSpec

ROOT = Path(__file__).parents[2]


def write_recipe(folder, rewards, name="recipe.yaml"):
    """A recipe on the shapes world; `rewards` maps a task to its rewards. Only what serving reads is filled in."""
    prompts = "recipes/shapes/prompts/{}_heldout.jsonl"
    stages = [
        {"name": task, "task": task, "prompts": prompts.format(task), "steps": 1, "rewards": found}
        for task, found in rewards.items()
    ]
    recipe = {"name": "served", "model": {"path": "none", "height": 32, "width": 32}, "stages": stages}
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


class Service:
    """One `python -m rewards.serve` process."""

    def __init__(self, recipe, *options, port=0, command=("-m", "rewards.serve"), **environment):
        self.log = Path(f"{recipe}.{time.monotonic_ns()}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, str(recipe), "--port", str(port), *options],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log.read_text()
        self.url = line.split()[2].rstrip(":")
        self.port = int(self.url.rpartition(":")[2])

    def ready(self):
        """Wait until every reward has passed its trial."""
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/readyz", trust_env=False).status_code != 200:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return self

    def send(self, signal):
        self.process.send_signal(signal)

    def stop(self):
        """SIGKILL, and the exit is waited for."""
        self.process.kill()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def served(spec: RewardSpec, *urls, **settings) -> RewardSpec:
    """The same reward behind HTTP."""
    return RewardSpec(**{**vars(spec), "service": ServiceSpec(urls, **{"unavailable_s": 20.0, **settings})})
