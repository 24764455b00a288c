"""Shared by all tests: deterministic single-threaded CPU, no hub access, one Ray for each worker of the session, and
how much of a machine a test may ask for (tests/levels.py)."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import hypothesis
import pytest

from tests.fakes.canaries import secrets_in_environment
from tests.fakes.forked_workers import WorkerServer
from tests.levels import BUDGET_S, LEVELS, ORDER, USES, group_of, level_of, levels_of

# The same examples in every run, on a machine of any speed.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

RAY_STARTS = 3
"""On a machine so busy that Ray does not get up in the 30 s it gives itself."""


@pytest.fixture(scope="session")
def worker_server(tmp_path_factory):
    """What Ray's workers are forked from, with the heavy imports done."""
    workers = WorkerServer(tmp_path_factory.mktemp("ray"))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def ray_session(worker_server):
    """A local Ray with 16 logical CPUs (and no GPU), shut down at the end of the session.

    Its workers are forked; a command that joins this Ray by RAY_ADDRESS gets ordinary ones, unless it is started with
    `worker_server.environment()`.
    """
    import ray

    for attempt in range(RAY_STARTS):
        try:
            with worker_server.shortened(), secrets_in_environment():
                ray.init(
                    address="local",
                    num_cpus=16,
                    num_gpus=0,
                    include_dashboard=False,
                    log_to_driver=False,
                    runtime_env={"py_executable": worker_server.python},
                    _system_config={"kill_worker_timeout_milliseconds": 500},  # of one that was stopped
                )
            break
        except Exception as error:  # Ray has no class of its own for this
            if "timed out during startup" not in str(error) or attempt == RAY_STARTS - 1:
                raise
            ray.shutdown()
    worker_server.start()
    yield ray
    ray.shutdown()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Every test gets its level, which orders them, and a group that stays on one worker: fixtures of a file are made
    once, and there is one vLLM at a time."""
    for item in items:
        if not levels_of(item):
            item.add_marker(level_of(item.nodeid, item.fixturenames))
        for mark, fixtures in USES.items():
            if fixtures & set(item.fixturenames):
                item.add_marker(mark)
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: ORDER.index(levels_of(item)[0]))


def pytest_terminal_summary(terminalreporter, config):
    """Of a run on several workers, what each level took of its budget on two."""
    workers = getattr(config.option, "numprocesses", None)
    if not workers:
        return
    found = {level: [0, 0.0] for level in LEVELS}
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for level in LEVELS:
            if level in getattr(report, "keywords", ()) and hasattr(report, "duration"):
                found[level][0] += report.when == "call"
                found[level][1] += report.duration / workers
    terminalreporter.section("budget")
    for level, (tests, seconds) in found.items():
        over = "  OVER" if seconds > BUDGET_S[level] else ""
        terminalreporter.line(f"{level:10}{tests:6} tests {seconds:6.0f} s of {BUDGET_S[level]:4} s{over}")


@pytest.fixture(autouse=True)
def one_thread():
    """A test that sets torch's threads changes no bit of those that share its process."""
    _reset_threads()
    yield
    _reset_threads()


def _reset_threads() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
