"""Workers of one role and their calls: who may make which call, who rests, who is lost. Pure; nothing here touches Ray.

ready ──failed──► recovering ──answered──► ready
                   │       ▲
   no node for it  ▼       │ a node with room
                  absent ──┘        recovering ──on a node, and silent for too long──► dead

A failed call goes to the workers that have failed it least often, and waits for them where they are busy or coming
back. A worker that fails rests longer each time, and must answer before it gets work again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from core.failures import DataFailure, ObjectsLost

_REST_S, _LONGEST_REST_S = 0.5, 60.0


@dataclass(eq=False)
class Call:
    """One method call that any worker of `role` can make. `key` tells the caller which one it was.

    tried: the workers that failed it, one entry for each time; causes: why.
    """

    role: str
    key: Hashable
    method: str
    args: tuple[Any, ...]
    num_returns: int = 1
    tried: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    @property
    def attempts(self) -> int:
        """Times that it was made, this one included."""
        return len(self.tried) + 1

    def history(self) -> str:
        """How it failed so far, for messages."""
        workers = sorted(set(self.tried))
        return (
            f"{self.role} call {self.method}({self.key}) failed {len(self.tried)} times on {len(workers)} "
            f"worker{'s' * (len(workers) > 1)} ({', '.join(map(str, workers))}): {self.causes}"
        )


@dataclass(frozen=True)
class Done:
    """A finished call: references to all returns, the first one fetched; or the `failure`: the prompt's own, or inputs
    that were lost with a node, to be made again. `time`: when it was fetched, in Unix seconds."""

    call: Call
    refs: tuple[Any, ...]
    result: Any
    failure: DataFailure | ObjectsLost | None = None
    time: float = field(default_factory=time.time)


@dataclass(eq=False)
class Worker:
    """state: ready, recovering (asked again from `probe_at` until `deadline`), absent or dead; `cause`: why it is not
    ready.

    failures: in a row. restarted: its process ended, or was ended. on_node: a node had room for it when that was last
    looked up, while it was not ready; an absent worker has waited for one until its deadline, and goes on waiting.
    Times are of the monotonic clock.
    """

    handle: Any
    index: int
    state: str = "ready"
    in_flight: int = 0
    failures: int = 0
    restarted: bool = False
    on_node: bool = True
    cause: str = ""
    probe_at: float = 0.0
    deadline: float = 0.0

    def rest(self, cause: str, *, restarted: bool, now: float, limit_s: float) -> None:
        """Out of service until it answers; it has `limit_s` for that."""
        self.failures += 1
        self.state, self.cause, self.restarted = "recovering", cause, restarted
        self.probe_at = now + min(_REST_S * 2 ** (self.failures - 1), _LONGEST_REST_S)
        self.deadline = self.probe_at + limit_s

    def placed(self, on_node: bool, *, now: float, limit_s: float) -> None:
        """Whether it has a node now. Where it has one again, it may be asked, and has `limit_s` to answer."""
        if on_node and not self.on_node:
            self.state, self.probe_at, self.deadline = "recovering", now, now + limit_s
        self.on_node = on_node


@dataclass
class Pool:
    """The workers of a role. floor: how many must be alive. max_in_flight: calls that one has at once."""

    workers: list[Worker]
    floor: int
    max_in_flight: int
    queue: deque[Call] = field(default_factory=deque)
    finished: deque[Done] = field(default_factory=deque)

    def alive(self) -> list[Worker]:
        return [w for w in self.workers if w.state not in ("absent", "dead")]

    def lost(self) -> str:
        """Why the others are absent or dead, for messages."""
        alive = self.alive()
        return "; ".join(f"worker {w.index}: {w.cause}" for w in self.workers if w not in alive)

    def pairs(self) -> list[tuple[Call, Worker]]:
        """Takes from the queue what can start now, each call with its worker; `in_flight` counts them already."""
        found, waiting = [], deque[Call]()
        while self.queue and self._free(self.workers):
            call = self.queue.popleft()
            fewest = min(call.tried.count(w.index) for w in self.alive() if w.on_node)
            free = self._free([w for w in self.workers if call.tried.count(w.index) == fewest])
            if not free:
                waiting.append(call)
                continue
            worker = min(free, key=lambda w: (w.in_flight, w.index))
            worker.in_flight += 1
            found.append((call, worker))
        self.queue.extendleft(reversed(waiting))
        return found

    def _free(self, workers: list[Worker]) -> list[Worker]:
        return [w for w in workers if w.state == "ready" and w.in_flight < self.max_in_flight]
