"""Shared by the tests of rl."""

import socket

import pytest

from core.cluster.process_group import join_process_group


@pytest.fixture(scope="session")
def process_group():
    """This process as the only rank. Left standing: DeepSpeed keeps its groups and cannot join a second time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_process_group(rank=0, world_size=1, address="127.0.0.1", port=port, device="cpu", timeout_s=60)
