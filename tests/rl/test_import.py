"""The packages are cheap to import: the schema, the checks and the CLI load neither torch nor ray."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["rl", "rewards", "rollout", "models", "pretrain", "recipes"])
def test_a_package_loads_nothing_heavy(package):
    code = f"import sys, {package}; print(sorted({{'torch', 'ray', 'numpy', 'diffusers', 'PIL'}} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_importing_rl_takes_less_than_a_second_of_processor_time():
    """Processor time, so that a busy machine does not fail it."""
    code = "import time; began = time.process_time(); import rl; print(time.process_time() - began)"
    assert float(run(code)) < 1.0


@pytest.mark.parametrize(
    "module",
    [
        "rl.train",
        "rl.recipe.schema",
        "rl.recipe.validate",
        "rl.recipe.placement",
        "rl.loop.checkpoint",
        "rl.recipe.preflight",
        "rl.recipe.plan",
    ],
)
def test_what_runs_before_the_cluster_loads_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'ray', 'deepspeed'}} & set(sys.modules)))"
    assert run(code).strip() == "[]"
