"""The benchmarks by name: how each is read, where its pictures lie, who scores it, and how its table is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recipes
from rewards.base import RewardSpec
from rewards.benchmarks import dpg, gedit, geneval, imgedit, rewarded
from rewards.benchmarks.figures import Figure
from rewards.benchmarks.items import DataError, Item, subset
from rewards.benchmarks.layouts import GRID, Keyed, Layout, Numbered
from rewards.loading import default_timeout_s

SHAPES_PROMPTS = {task: f"recipes/shapes/prompts/{task}_heldout.jsonl" for task in ("t2i", "edit")}
SCORER = "scorer"
"""Label of the reward of every benchmark, so that records do not depend on its name."""
BATCH_S = 600.0


@dataclass(frozen=True)
class Request:
    """What the command line says about the data and the reward; what a benchmark does not use must be left out.

    reward: name of a reward in place of the benchmark's own. params: its parameters. timeout_s: seconds for one
    batch of pictures; None: 600, or what the reward itself states where that is more. scored: whether there is to be
    a table; else pictures are generated and that is all.
    """

    data: Path | None = None
    references: Path | None = None
    languages: tuple[str, ...] = ()
    task: str | None = None
    num_prompts: int | None = None
    compat: bool = False
    reward: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    scored: bool = True


@dataclass(frozen=True)
class Part:
    """Items of one task that one reward scores."""

    task: str
    items: tuple[Item, ...]
    reward: RewardSpec


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    reads: fields of `Request` that it uses beside num_prompts, compat, params and timeout_s; `needs`: those of them
    that must be given. images: pictures per prompt as published; `counts`: what else is possible (None: any number).
    decimals: of its table. size: default edge in px of what is generated; `defaults`: other values of the command
    line in place of its own.
    """

    name: str
    parts: Callable[[Request, Path], list[Part]]
    layout: Layout
    figures: Callable[..., list[Figure]]
    reads: frozenset[str]
    needs: tuple[str, ...] = ("data",)
    get_data: str = ""
    images: int = 1
    counts: tuple[int, ...] | None = (1,)
    decimals: int = 3
    defaults: dict[str, Any] = field(default_factory=dict)

    def read(self, request: Request) -> list[Part]:
        """Raises DataError with everything that is wrong with the data."""
        problems = [
            f"--{name} is missing; {self.get_data}"
            for name in self.needs
            if not getattr(request, name) and (request.scored or name != "reward")
        ]
        unused = ("data", "references", "languages", "task", "reward")
        problems += [
            f"--{name} is not used by {self.name}; leave it out"
            for name in unused
            if name not in self.reads and getattr(request, name)
        ]
        if problems:
            raise DataError(problems)
        parts = self.parts(request, request.data or Path())
        problems = _key_problems([item.key for part in parts for item in part.items])
        if problems:
            raise DataError(problems)
        return parts


def _key_problems(keys: Sequence[str]) -> list[str]:
    """Keys become file names, so they must differ and stay inside the folder."""
    unsafe = [key for key in keys if not key or Path(key).is_absolute() or ".." in Path(key).parts]
    twice = sorted(key for key, number in Counter(keys).items() if number > 1)
    return [f"key {key!r} cannot be a file name; mend the data" for key in unsafe] + [
        f"key {key!r} is used more than once; mend the data" for key in twice
    ]


def _part(request: Request, task: str, items: Sequence[Item], reward: str = "") -> Part:
    name, params = request.reward or reward, dict(request.params)
    limit_s = request.timeout_s or max(BATCH_S, default_timeout_s(name, params))
    spec = RewardSpec(name, params=params, timeout_s=limit_s, label=SCORER)
    return Part(task, tuple(subset(items, request.num_prompts)), spec)


def _geneval(request: Request, data: Path) -> list[Part]:
    return [_part(request, "t2i", geneval.read(data), "geneval_official")]


def _dpg(request: Request, data: Path) -> list[Part]:
    items = dpg.read(data, compat=request.compat, scored=request.scored)
    return [_part(request, "t2i", items, "rewards.benchmarks.judged:DPGQuestions")]


def _gedit(request: Request, data: Path) -> list[Part]:
    items = gedit.read(data, languages=request.languages or ("en",), references=request.references)
    return [_part(request, "edit", items, "rewards.benchmarks.judged:GEditGrades")]


def _imgedit(request: Request, data: Path) -> list[Part]:
    items = imgedit.read(data, references=request.references)
    return [_part(request, "edit", items, "rewards.benchmarks.judged:ImgEditGrades")]


def _shapes(request: Request, _: Path) -> list[Part]:
    rewards = {"t2i": "geneval_shapes", "edit": "edit_shapes"}
    parts = []
    for task in [request.task] if request.task else rewards:
        items = rewarded.read(recipes.resolve(SHAPES_PROMPTS[task]), task, prefix=f"{task}/")  # type: ignore[arg-type]
        parts.append(_part(request, task, items, rewards[task]))
    return parts


def _custom(request: Request, data: Path) -> list[Part]:
    assert request.task is not None
    return [_part(request, request.task, rewarded.read(data, request.task))]  # type: ignore[arg-type]


BENCHMARKS: dict[str, Benchmark] = {
    found.name: found
    for found in (
        Benchmark(
            "geneval", _geneval, Numbered(), geneval.figures, frozenset({"data", "reward"}),
            get_data=geneval.GET_DATA, images=4, counts=None, decimals=4,
        ),
        Benchmark(
            "dpg", _dpg, Keyed(), dpg.figures, frozenset({"data", "reward"}),
            get_data=dpg.GET_DATA, images=GRID, counts=(1, GRID), decimals=2,
        ),
        Benchmark(
            "gedit", _gedit, Keyed("fullset"), gedit.figures,
            frozenset({"data", "references", "languages", "reward"}), get_data=gedit.GET_DATA,
        ),
        Benchmark(
            "imgedit", _imgedit, Keyed(), imgedit.figures, frozenset({"data", "references", "reward"}),
            needs=("data", "references"), get_data=imgedit.GET_DATA, decimals=2,
        ),
        Benchmark(
            "shapes", _shapes, Numbered(), rewarded.shapes_figures, frozenset({"task"}), needs=(),
            counts=None, decimals=4,
            defaults={
                "size": 32, "num_steps": 10, "guidance_scale": 1.0, "max_sequence_length": 12, "dtype": "float32",
            },
        ),
        Benchmark(
            "custom", _custom, Numbered(), rewarded.figures, frozenset({"data", "task", "reward"}),
            needs=("data", "task", "reward"), get_data="custom scores any JSONL prompt set with any reward",
            counts=None, decimals=4,
        ),
    )
}  # fmt: skip
