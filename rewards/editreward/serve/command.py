"""`python -m rewards.editreward serve MODEL`: stock vLLM over an exported folder, kept alive on Ray-placed cards.

The folder is checked first; then it runs until it is stopped, see `core/cluster/servers/serving.py`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from core.command_line import positive
from core.failures import ClusterError
from rewards.editreward.model_folder import ModelCard, ModelFolderError
from rewards.editreward.serve.checks import DTYPES, EngineFacts, check_model, engine_problems

if TYPE_CHECKING:
    from core.cluster.servers.fleet import Room
    from core.cluster.servers.replica import ReplicaPlan

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
    add("--replicas", type=positive, default=1, metavar="N", help="servers, each with a whole model")
    add("--tensor-parallel", type=positive, default=1, metavar="N", help="cards that share one model")
    devices = ("auto", "cuda", "cpu")
    add("--device", choices=devices, default="auto", help="auto: cuda if the Ray cluster has GPUs")
    add("--dtype", choices=DTYPES, help="of the weights in memory; default: as exported")
    add("--host", default="127.0.0.1", help="address to listen on")
    port = "of the first replica, the others follow; 0: free ones"
    add("--port", type=int, default=8200, metavar="N", help=port)
    add("--cpus", type=float, default=1.0, metavar="N", help="Ray CPUs each replica asks for")
    add("--threads", type=positive, default=1, metavar="N", help="of one replica on a CPU")
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
    from core.cluster.servers.serving import Service, serve

    def plan(has_gpus: bool) -> tuple[list[ReplicaPlan], Room]:
        device = ("cuda" if has_gpus else "cpu") if arguments.device == "auto" else arguments.device
        log.info("%d replicas of %s on %s", arguments.replicas, card.served_name, device)
        return plans(card, facts, arguments, device=device)

    ready = {"model": str(card.folder), "served_name": card.served_name}
    remedy = "lower --replicas or --tensor-parallel"
    return serve(Service(card.served_name, ready, arguments.host, arguments.ready_file, remedy), plan)


def plans(
    card: ModelCard, facts: EngineFacts, arguments: argparse.Namespace, *, device: str
) -> tuple[list[ReplicaPlan], Room]:
    """One plan per replica, and what all of them ask of the cluster."""
    from core.cluster.servers.fleet import Room
    from core.cluster.servers.replica import ReplicaPlan

    environment = ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": str(arguments.threads)}
    cards = arguments.tensor_parallel if device == "cuda" else 0
    room = Room(arguments.replicas, arguments.cpus, cards, arguments.placement_timeout_s)
    replicas = [
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
    return replicas, room


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
