"""The wheel holds the whole framework and nothing else, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import core

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP = sorted(pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
DATA = (".py", ".txt", ".html", ".css", ".js")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")


def run(words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside the sources; offline, with the installed setuptools."""
    source = tmp_path_factory.mktemp("source")
    for name in [*TOP, "tests", "bench"]:
        shutil.copytree(ROOT / name, source / name, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run(["build", "--wheel", "--no-isolation", "--outdir", "dist"], source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    done = run(
        ["pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)], target
    )
    assert done.returncode == 0, done.stderr
    return target


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without `__init__.py` would be shipped as a namespace and checked by nobody."""
    folders = {path.parent for name in TOP if name != "recipes" for path in (ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_source_and_recipe_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"unipic_rl-{core.__version__}-py3-none-any")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for name in TOP
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and (path.suffix in DATA or name == "recipes")
    }
    about = f"unipic_rl-{core.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == wanted


def test_an_installed_wheel_plans_a_packaged_recipe(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    script = "import rl, recipes; print(rl.__file__, recipes.resolve('recipes/shapes/base'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert all(Path(path).is_relative_to(installed) for path in done.stdout.split())
    dry = run(["rl.train", "recipes/shapes/pdtr.yaml", "--dry-run"], tmp_path, **environment)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    assert "Ready to run." in dry.stdout
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing behind"
