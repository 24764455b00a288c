"""Rules that keep the code readable, kept by a test with their reasons."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["bench", "models", "pretrain", "recipes", "rewards", "rl", "rollout"]
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_idea(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400, f"{path}: above 400 lines is more than one idea; split it"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long, f"{path}: functions above 60 lines do not fit a screen: {', '.join(long)}"
    assert path.name != "utils.py", f"{path}: name a file after what it holds"


def test_importing_packages_loads_nothing_heavy() -> None:
    """Command lines answer at once, and recipes can be checked where torch and Ray are not installed."""
    heavy = ["torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "PIL"]
    script = (
        "import sys\n"
        f"import {', '.join(PACKAGES)}, rewards.shapes, rewards.geneval, rl.recipe.schema\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
