"""Command line: `python -m rewards.serve RECIPE [key=value ...]` serves a recipe's rewards over HTTP.

Runs in any interpreter that has the rewards' own needs, FastAPI and uvicorn: neither Ray nor DeepSpeed, and torch
only where a reward uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import recipes
from core.command_line import positive
from core.logs import start_logging
from core.prompts import Prompt, PromptFileError, load_prompts
from core.recipe import ConfigError, read_recipe
from core.recipe_help import add_help_config
from rewards.base import RewardError, RewardSet, reward_label
from rewards.recipe import REST, ServedRecipe, served_sets
from rewards.service.wire import read_token

log = logging.getLogger("rewards.serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 after SIGTERM or SIGINT, 2 when nothing can be served as asked."""
    arguments = _parse(argv)
    start_logging()
    signal.signal(signal.SIGTERM, _leave)
    try:
        trials = select_rewards(load_served(arguments.recipe, arguments.overrides), arguments.reward)
        listener = _listen(arguments)
        serve(trials, listener, arguments)
    except (ConfigError, RewardError) as error:
        sys.stderr.write(f"Cannot serve:\n{error}\n")
        return 2
    return 0


def load_served(recipe: str | Path, overrides: Sequence[str] = ()) -> ServedRecipe:
    """What a run's recipe says of rewards, the rest unread. Raises ConfigError with every problem of its keys."""
    return read_recipe(recipe, overrides, ServedRecipe, others=REST)


def select_rewards(recipe: ServedRecipe, labels: Sequence[str]) -> list[RewardSet]:
    """The recipe's rewards, or those of `labels`, each alone with an example of each of its tasks to be tried on.

    Raises ConfigError for a label that is absent, or that means several rewards.
    """
    found: dict[str, RewardSet] = {}
    problems = []
    for whole in served_sets(recipe, _prompts):
        for spec in whole.rewards:
            label = reward_label(spec)
            alone = dataclasses.replace(spec, weight=1.0, service=None)
            trial = dataclasses.replace(whole, rewards=[alone])
            known = found.setdefault(label, trial)
            if trial.task not in {known.task, *(other.task for other in known.other_tasks)}:
                found[label] = dataclasses.replace(known, other_tasks=[*known.other_tasks, trial])
            (first,) = known.rewards
            if (labels and label not in labels) or (first.name, first.params) == (spec.name, spec.params):
                continue
            problems.append(
                f"reward label {label!r} means {first.name} {first.params} and {spec.name} {spec.params}; "
                "a service knows a reward by its label, so give each a label of its own"
            )
    problems += [
        f"no reward is called {label!r}; there are {sorted(found)}" for label in labels if label not in found
    ]
    if not found:
        problems.append("the recipe holds no rewards")
    if problems:
        raise ConfigError(problems)
    return [trial for label, trial in found.items() if not labels or label in labels]


def serve(trials: Sequence[RewardSet], listener: socket.socket, arguments: argparse.Namespace) -> None:
    """Load the rewards, then answer until a signal comes; requests in work may finish within the grace period."""
    from rewards.service.app import ServiceSettings, build_app
    from rewards.service.hosting import HostedReward
    from rewards.service.listening import listening_server

    rewards = [HostedReward(trial, arguments.concurrency) for trial in trials]
    settings = ServiceSettings(arguments.max_request_mb * 2**20, arguments.token_env)
    server = listening_server(build_app(rewards, settings), grace_s=arguments.grace_s)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    sys.stdout.write(f"listening on {url}: {', '.join(reward.label for reward in rewards)}\n")
    sys.stdout.flush()
    server.run(sockets=[listener])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description="Serve a recipe's rewards.")
    parser.add_argument("recipe", help="path of the recipe that the run is trained with")
    parser.add_argument("overrides", nargs="*", help="key=value, the same as for the run")
    parser.add_argument(
        "--reward", action="append", default=[], metavar="LABEL", help="only this one (repeatable)"
    )
    add_help_config(parser, ServedRecipe)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8100, help="0 picks a free one; it is printed")
    parser.add_argument(
        "--token-env", metavar="NAME", help="environment variable with the bearer token to ask for"
    )
    parser.add_argument("--insecure", action="store_true", help="listen beyond this machine without a token")
    parser.add_argument(
        "--max-request-mb", type=positive, default=128, metavar="N", help="larger is refused (413)"
    )
    parser.add_argument(
        "--concurrency", type=positive, default=4, metavar="N", help="requests in work, per reward"
    )
    parser.add_argument(
        "--grace-s", type=positive, default=30, metavar="N", help="for requests in work at the end"
    )
    return parser.parse_intermixed_args(argv)


def _listen(arguments: argparse.Namespace) -> socket.socket:
    """A listening socket. Raises ConfigError for an address that is unusable, or open to others without a token,
    and FatalRewardError for an unusable token."""
    open_to_all = arguments.token_env is None
    if not open_to_all:
        read_token(arguments.token_env)
    try:
        found = socket.getaddrinfo(arguments.host, arguments.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and open_to_all:
            if not arguments.insecure:
                raise ConfigError(
                    [
                        f"--host {arguments.host} can be reached from other machines, and anyone there could use the "
                        "rewards; ask for a token with --token-env NAME, or say --insecure"
                    ]
                )
            log.warning("--insecure: anyone who reaches %s can use the rewards", arguments.host)
        return socket.create_server((address[0], arguments.port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError([f"cannot listen on {arguments.host} port {arguments.port}: {error}"]) from error


def _prompts(path: str, task: str) -> list[Prompt]:
    """The prompts that rewards are tried on; a machine that only scores may not have them."""
    try:
        return load_prompts(recipes.resolve(path), task)  # type: ignore[arg-type]
    except PromptFileError as error:
        log.warning("rewards are tried on a made-up prompt: %s", error.problems[0])
        return []


def _leave(*_: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
