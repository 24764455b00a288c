"""`python -m rewards.editreward serve MODEL`: stock vLLM over an exported folder, watched, on Ray-placed cards.

    checks ──► room on the Ray cluster ──► one vLLM per replica ──► all ready: URLs printed, --ready-file written
                                             │ dies: restarted with back-off, at most --max-restarts times in a row
    SIGTERM ──► every server and everything below it is ended

It runs until it is stopped. vLLM's own log comes through line by line, each with its replica's number before it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.failures import ClusterError
from core.files import atomic_write_json
from rewards.editreward.model_folder import ModelCard, ModelFolderError
from rewards.editreward.serve.checks import DTYPES, EngineFacts, check_model, engine_problems

if TYPE_CHECKING:
    from rewards.editreward.serve.replicas import ReplicaPlan, ReplicaStatus

log = logging.getLogger("rewards.editreward.serve.command")
REFUSALS = (ModelFolderError, ClusterError)

CPU_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every replica would bind to the same core
}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    add = parser.add_argument
    add("model", help="folder made by `python -m rewards.editreward export`")
    add("--replicas", type=_positive, default=1, metavar="N", help="servers, each with a whole model")
    add("--tensor-parallel", type=_positive, default=1, metavar="N", help="cards that share one model")
    devices = ("auto", "cuda", "cpu")
    add("--device", choices=devices, default="auto", help="auto: cuda if the Ray cluster has GPUs")
    add("--dtype", choices=DTYPES, help="of the weights in memory; default: as exported")
    add("--host", default="127.0.0.1", help="address to listen on")
    port = "of the first replica, the others follow; 0: free ones"
    add("--port", type=int, default=8200, metavar="N", help=port)
    add("--cpus", type=float, default=1.0, metavar="N", help="Ray CPUs each replica asks for")
    add("--threads", type=_positive, default=1, metavar="N", help="of one replica on a CPU")
    add("--placement-timeout-s", type=float, default=60.0, metavar="S", help="to wait for free cards")
    add("--start-timeout-s", type=float, default=900.0, metavar="S", help="to wait for a server")
    add("--max-restarts", type=int, default=5, metavar="N", help="in a row, of one replica")
    add("--ready-file", type=Path, metavar="PATH", help="JSON with the URLs, there while all is up")
    more = "a further argument for vLLM (repeatable): --vllm=--gpu-memory-utilization=0.5"
    add("--vllm", action="append", default=[], metavar="ARG", help=more)


def run(arguments: argparse.Namespace) -> int:
    """0: ended by SIGTERM or SIGINT. 1: every replica is lost."""
    card, facts = check_model(arguments.model)
    problems = engine_problems(card, facts, tensor_parallel=arguments.tensor_parallel)
    if problems:
        raise ModelFolderError(problems)
    return _serve(card, facts, arguments)


def plans(
    card: ModelCard, facts: EngineFacts, arguments: argparse.Namespace, *, device: str
) -> list[ReplicaPlan]:
    """One plan per replica."""
    from rewards.editreward.serve.replicas import ReplicaPlan

    environment = ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": str(arguments.threads)}
    return [
        ReplicaPlan(
            index=index,
            command=tuple(vllm_command(card, facts, arguments, device=device)),
            folder=str(card.folder),
            host=arguments.host,
            port=arguments.port and arguments.port + index,
            environment=environment,
            start_timeout_s=arguments.start_timeout_s,
            max_restarts=arguments.max_restarts,
        )
        for index in range(arguments.replicas)
    ]


def vllm_command(
    card: ModelCard, facts: EngineFacts, arguments: argparse.Namespace, *, device: str
) -> list[str]:
    """vLLM's server without host and port.

    The weights' type is named, since vLLM's `auto` would halve float32; the activation is off, since vLLM would
    otherwise answer probabilities in place of the regressor's numbers (DESIGN section 8).
    """
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(card.folder),
        "--served-model-name", card.served_name,
        "--runner", "pooling",
        "--pooler-config", '{"use_activation": false}',
        "--dtype", arguments.dtype or facts.dtype,
        "--max-model-len", str(facts.max_length),
        "--limit-mm-per-prompt", '{"image": 2, "video": 0}',
        "--disable-access-log-for-endpoints", "/classify,/health,/metrics,/v1/models",
        "--tensor-parallel-size", str(arguments.tensor_parallel),
        *(["--enforce-eager"] if device == "cpu" else []),
        *(["--distributed-executor-backend", "mp"] if arguments.tensor_parallel > 1 else []),
        *arguments.vllm,
    ]  # fmt: skip


def _serve(card: ModelCard, facts: EngineFacts, arguments: argparse.Namespace) -> int:
    import ray

    from rewards.editreward.serve.fleet import Room, check_host, cluster_has_gpus, place

    leaving = _leave_on_signals()
    try:
        has_gpus = cluster_has_gpus()
        _leave_on_signals(leaving)  # Ray has set its own
        device = ("cuda" if has_gpus else "cpu") if arguments.device == "auto" else arguments.device
        check_host(arguments.host)
        cards = arguments.tensor_parallel if device == "cuda" else 0
        room = Room(arguments.replicas, arguments.cpus, cards, arguments.placement_timeout_s)
        log.info("%d replicas of %s on %s", arguments.replicas, card.served_name, device)
        fleet = place(plans(card, facts, arguments, device=device), room)
        try:
            return _watch(fleet, card, arguments, leaving)
        finally:
            _forget(arguments.ready_file)
            fleet.close()
    finally:
        ray.shutdown()


def _watch(fleet, card: ModelCard, arguments: argparse.Namespace, leaving: threading.Event) -> int:  # type: ignore[no-untyped-def]
    from rewards.editreward.serve.fleet import wait_until_ready

    _forget(arguments.ready_file)
    urls = fleet.start()
    show = _Shower()
    if not wait_until_ready(fleet, show, arguments.start_timeout_s + 60, leaving):
        return 0
    sys.stdout.write(f"ready: {card.served_name}\n" + "".join(f"{url}\n" for url in urls))
    sys.stdout.flush()
    if arguments.ready_file:
        ready = {"model": str(card.folder), "served_name": card.served_name, "urls": urls}
        atomic_write_json(arguments.ready_file, ready)
    while not leaving.wait(0.5):
        statuses = fleet.statuses()
        show(statuses)
        if all(status.state == "failed" for status in statuses):
            log.error("every replica is lost")
            return 1
    log.info("stopping")
    return 0


class _Shower:
    """Passes vLLM's log through and says when a replica's state changes."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[str, str]] = {}

    def __call__(self, statuses: Sequence[ReplicaStatus]) -> None:
        for index, status in enumerate(statuses):
            for line in status.lines:
                sys.stderr.write(f"[replica {index}] {line}\n")
            state = (status.state, status.detail)
            if self._states.get(index) != state:
                level = logging.INFO if status.state in ("starting", "ready") else logging.WARNING
                because = f": {status.detail}" if status.detail else ""
                log.log(level, "replica %d at %s is %s%s", index, status.url, status.state, because)
            self._states[index] = state
        sys.stderr.flush()


def _leave_on_signals(leaving: threading.Event | None = None) -> threading.Event:
    leaving = leaving or threading.Event()
    leave: Callable[..., None] = lambda *_: leaving.set()  # noqa: E731
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return leaving


def _forget(ready_file: Path | None) -> None:
    if ready_file:
        ready_file.unlink(missing_ok=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
