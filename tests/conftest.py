"""Shared by all tests: deterministic single-threaded CPU, no hub access, one Ray cluster for the session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with 16 logical CPUs (and no GPU), shut down at the end of the session."""
    import ray

    ray.init(address="local", num_cpus=16, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
