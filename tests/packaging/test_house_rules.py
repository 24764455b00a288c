"""Rules that keep the code readable and its commands quick, kept by a test with their reasons."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["bench", "core", "models", "pretrain", "recipes", "rewards", "rl", "rollout", "worlds"]
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
HEAVY = ["torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "PIL"]
MAX_LINES, MAX_FUNCTION, MIN_LINES = 400, 60, 20
SHORT = {
    "core/failures.py": "exceptions that every floor names; they belong to no module above",
    "core/logs.py": "how every command starts its log",
    "core/seeds.py": "the one rule from names to seeds, without torch",
    "core/shards/errors.py": "raised by readers and writers of shards, which do not import each other",
    "core/training/randomness.py": "the torch half of core/seeds.py",
    "pretrain/data/readable.py": "one wording for readers that do not import each other",
    "pretrain/flow/peaks.py": "a table of hardware",
    "rewards/builtin.py": "the list of names that recipes may use",
    "rl/record/evaluation_sets.py": "a name shared with reward workers, which load no record",
}
"""Files below 20 lines, each with the reason why it does not belong to a neighbour."""


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_file_holds_one_idea(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines <= MAX_LINES, f"{path}: above {MAX_LINES} lines is more than one idea; split it"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, f"{path}: functions above {MAX_FUNCTION} lines do not fit a screen: {', '.join(long)}"
    assert path.name != "utils.py", f"{path}: name a file after what it holds"
    if path.name not in ("__init__.py", "__main__.py") and names(path) not in SHORT:
        assert lines >= MIN_LINES, f"{path}: a crumb; merge it into a neighbour, or give the reason in SHORT"


@cache
def loaded_after() -> dict[str, list[str]]:
    """The heavy modules that stand in `sys.modules` after each import, in this order, in one fresh interpreter."""
    script = (
        "import importlib, json, sys, time\n"
        "found, began = {}, time.process_time()\n"
        f"for name in {[*PACKAGES, *BEFORE_THE_CLUSTER]}:\n"
        "    importlib.import_module(name)\n"
        f"    found[name] = [heavy for heavy in {HEAVY} if heavy in sys.modules]\n"
        "    if name == 'rl': assert time.process_time() - began < 1.0, 'importing rl takes a second'\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BEFORE_THE_CLUSTER = [
    "worlds.shapes",
    "rewards.geneval",
    "rl.train",
    "rl.recipe.schema",
    "rl.recipe.validate",
    "rl.recipe.placement",
    "rl.loop.checkpoint",
    "rl.recipe.preflight",
    "rl.recipe.plan",
]
"""What checks a recipe and answers the command line."""


@pytest.mark.parametrize(
    "package", [*PACKAGES, "worlds.shapes", "rewards.geneval", "rl.train", "rl.recipe.schema"]
)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    """Command lines answer at once, and recipes can be checked where torch and Ray are not installed."""
    assert loaded_after()[package] == []


@pytest.mark.parametrize("module", BEFORE_THE_CLUSTER)
def test_what_runs_before_the_cluster_loads_neither_torch_nor_ray(module: str) -> None:
    assert set(loaded_after()[module]) & {"torch", "ray", "deepspeed"} == set()


def test_every_reason_for_a_short_file_has_its_file() -> None:
    short = {names(path) for path in FILES if len(path.read_text().splitlines()) < MIN_LINES}
    assert set(SHORT) <= short, "take out what is gone or has grown"
