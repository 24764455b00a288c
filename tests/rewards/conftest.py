import textwrap

import pytest
from PIL import Image

from rewards.base import RewardSpec
from rewards.calling import RewardBatch
from rewards.loading import load_reward
from tests.fakes.forked_workers import WorkerServer
from tests.fakes.vllm_server import PRELOADED


@pytest.fixture(scope="session")
def vllm_forks(tmp_path_factory):
    """What processes of vLLM are forked from."""
    forks = WorkerServer(tmp_path_factory.mktemp("vllm"), PRELOADED)
    forks.start()
    yield forks
    forks.close()


@pytest.fixture
def reward_file(tmp_path):
    """Writes a reward file and returns its path; the protocol's errors are already imported in it."""

    def write(code, name="own_reward.py"):
        path = tmp_path / name
        header = "import asyncio, threading, time\nfrom rewards.base import *\n"
        path.write_text(header + textwrap.dedent(code))
        return path

    return write


@pytest.fixture
def load(reward_file):
    """Loads `reward` from code given as text, with the settings of a RewardSpec."""

    def load_code(code, attribute="reward", **settings):
        settings.setdefault("label", "own")
        return load_reward(RewardSpec(f"{reward_file(code)}:{attribute}", **settings))

    return load_code


@pytest.fixture
def batch():
    """Four samples of a text-to-image group; image k is grey k."""
    return RewardBatch(
        images=[Image.new("RGB", (8, 8), (k, k, k)) for k in range(4)],
        prompts=["a red circle"] * 4,
        references=[[]] * 4,
        metadata=[{"tag": "single_object"} for _ in range(4)],
    )
