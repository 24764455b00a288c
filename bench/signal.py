"""Which steps of the schedule a policy gradient learns from: signal and noise of a group's gradient, step by step.

For every step t asked for, groups of a recipe's stage share one trajectory up to t, part there by the SDE's noise, and
follow the ODE to the end (a branching group with a window of one step). A group's gradient is that of
mean_k A_k log p_k on the adapter: equation 2 at ratio 1, without the KL.

    share   what the gradients of different groups have in common (bench/signal_share.py); n groups an update give the
            optimizer a signal-to-noise ratio of about n x share
    norm    root mean square of a group's gradient; where steps are mixed, the largest decide what Adam normalises by
    mixed   one group in turn from each of the steps, as a recipe's window draws them

It says what a step teaches the stage as it is sampled in training. Whether that also helps without the noise, an
evaluation must say: with a large noise level the share grows, since undoing the noise is a lesson too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.signal_groups import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench signal`."""
    parser.add_argument("recipe", help="a recipe of rl.train; its rewards are called for every group")
    parser.add_argument("overrides", nargs="*", help="key=value, as for rl.train")
    parser.add_argument("--stage", default=None, help="name of the stage (the first)")
    parser.add_argument(
        "--adapter", default=None, help="PEFT folder of the policy, such as a checkpoint's adapter/"
    )
    parser.add_argument("--steps", nargs="+", type=int, default=None, help="steps from 0 (all but the last)")
    parser.add_argument("--groups", type=int, default=300, help="groups a step")
    parser.add_argument(
        "--coordinates", type=int, default=500_000, help="at most so many of the adapter's, drawn once"
    )
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a Markdown table."""
    # Here and not above: these bring Ray, which the other benchmarks do without.
    from bench.signal_groups import SignalBench, summarise
    from rl.recipe.schema import load_config

    config = load_config(arguments.recipe, arguments.overrides)
    steps = arguments.steps or list(range(config.rollout.num_steps - 1))
    bad = [step for step in steps if not 0 <= step < config.rollout.num_steps]
    if bad or arguments.groups < 3:
        raise SystemExit(
            f"--steps {bad}: rollout.num_steps={config.rollout.num_steps} has steps 0 to {config.rollout.num_steps - 1}"
            if bad
            else f"--groups {arguments.groups}: give 3 or more"
        )
    bench = SignalBench(config, arguments.stage, arguments.adapter, arguments.coordinates)
    print(
        f"{config.name}, stage {bench.stage.name}, {arguments.adapter or 'no adapter'}: T={config.rollout.num_steps}, "
        f"G={config.rollout.group_size}, noise level {config.rollout.noise_level:g}, {arguments.groups} groups a step\n"
    )
    print("| step | share x 1e3 | norm | groups without spread | reward | its spread | s/group |")
    print("|---|---|---|---|---|---|---|")
    rows, pooled = [], []
    for place, step in enumerate(steps):
        groups = bench.groups(step, arguments.groups)
        rows.append(summarise(str(step), groups))
        pooled += groups[place :: len(steps)]
        print(_line(rows[-1]), flush=True)
        del groups
    if len(steps) > 1:
        rows.append(summarise("mixed", pooled))
        print(_line(rows[-1]), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + "\n")
    return 0


def _line(row: Row) -> str:
    share = f"{1e3 * row.share.value:.2f} ± {1e3 * row.share.error:.2f}"
    return (
        f"| {row.step} | {share} | {row.norm:.2g} | {row.zero_spread:.2f} | {row.reward_mean:.3f} | "
        f"{row.reward_std:.3f} | {row.seconds:.3f} |"
    )
