"""Reward services over real HTTP: processes as the user starts them, or threads where no process has to die."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import yaml

from rewards.base import RewardSet, RewardSpec, ServiceSpec
from rewards.service.app import ServiceSettings, build_app
from rewards.service.hosting import HostedReward
from rewards.service.listening import listening_server

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
        wait_until_ready(self.url)
        return self

    def send(self, signal):
        self.process.send_signal(signal)

    def stop(self):
        """SIGKILL, and the exit is waited for."""
        self.process.kill()
        self.process.wait(timeout=30)
        self.process.stdout.close()


class ServiceThread:
    """The same application on a thread: up at once, and its rewards are called in this process."""

    def __init__(self, *trials: RewardSet, max_request_mb=128, token_env=None):
        settings = ServiceSettings(max_request_mb * 2**20, token_env)
        app = build_app([HostedReward(trial, 4) for trial in trials], settings)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16
        )  # what nobody reads is noticed at once
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = listening_server(app)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()

    def ready(self):
        wait_until_ready(self.url)
        return self

    def stop(self):
        """Close every connection without waiting for requests in work."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=30)


def wait_until_ready(url):
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", trust_env=False).status_code != 200:
        assert time.monotonic() < deadline, f"{url} is not ready"
        time.sleep(0.02)


def served(spec: RewardSpec, *urls, **settings) -> RewardSpec:
    """The same reward behind HTTP."""
    return RewardSpec(**{**vars(spec), "service": ServiceSpec(urls, **{"unavailable_s": 20.0, **settings})})
