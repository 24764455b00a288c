"""A lost learner rank costs a run the steps since its last checkpoint: fresh ranks go on there, within the run.

RankLost ──► what is left of the group ends ──► a new one in the same bundles ──► as `--resume auto` would go on

Rollout, encode and reward workers live on. What a rank itself raised (LogProbMismatch, a bug) is not RankLost and ends
the run: fresh ranks would compute it again.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path

from core.cluster.dispatch import PoolExhausted
from core.cluster.ranks import RankLost, RanksBlind
from core.recipe import ConfigError
from core.run_status import RunWatch
from rl.loop.checkpoint import begin_at, set_later_aside
from rl.loop.cluster import Cluster
from rl.loop.controller import Controller
from rl.recipe.schema import RunConfig
from rl.record.state import RunState

log = logging.getLogger(__name__)
Start = tuple[Path | None, RunState]


def train_with_restarts(
    config: RunConfig, cluster: Cluster, run_dir: Path, start: Start, *, fresh: bool, watch: RunWatch
) -> None:
    """Train from `start` to the run's end.

    Raises RankLost when a rank is lost once more than `resources.learner_restarts` allows, and what else ends a run.
    """
    allowed, (checkpoint, state) = config.resources.learner_restarts, start
    for restarts in range(allowed + 1):
        try:
            if restarts:
                cluster.restart_learner()
            _run(Controller(config, cluster, run_dir, state, checkpoint, fresh=fresh, watch=watch), cluster)
            return
        except RankLost as error:
            if isinstance(error, RanksBlind) or watch.stopping:
                raise
            if restarts == allowed:
                raise RankLost(f"{error}; resources.learner_restarts={allowed} are used up") from error
            cause = str(error)
            log.error("learner restart %d of %d: %s", restarts + 1, allowed, cause)
        gc.collect()  # the error's frames held references to the step's trajectories
        lost, fresh = state, False
        try:
            checkpoint, state = begin_at(config, run_dir, "auto")
        except ConfigError as refused:
            raise RankLost(f"{cause}; the run cannot go back: {refused}") from refused
        set_later_aside(run_dir, state.step)
        state = replace(
            state, restarts=lost.restarts, learner_restarts=lost.learner_restarts + 1,
            inputs=lost.inputs, changes=lost.changes,
        )  # fmt: skip
        watch.restarted(restarts + 1)
        log.warning("the run goes on from its checkpoint of step %d", state.step)


def _run(controller: Controller, cluster: Cluster) -> None:
    """Raises RankLost too where no worker can sample because the ranks that do are gone (placement inprocess)."""
    try:
        controller.run()
    except PoolExhausted:
        cluster.learner.check_alive()
        raise
