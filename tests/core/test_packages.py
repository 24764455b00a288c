"""A folder of the user's that hides one of the project's packages is named in every process that imports it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["core", "models", "rewards.py", "rollout", "recipes"])
def test_a_folder_that_hides_a_package_is_named(tmp_path, name):
    own = tmp_path / name
    if own.suffix:
        own.write_text("")
    else:
        own.mkdir()
        (own / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import rl.recipe.schema"
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    package = own.stem
    assert ended.stderr.splitlines()[-1].startswith(
        f"ImportError: {own} hides this project's package {package!r}: rename it"
    )


def test_a_folder_without_code_hides_nothing(tmp_path):
    (tmp_path / "recipes").mkdir()
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import core; print(core.__version__)"
    )
    ended = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
