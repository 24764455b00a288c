"""The ground floor: files, recipes, logs, statistics, seeds, prompts, pictures; nothing here knows a model."""

import importlib.util
from pathlib import Path

__version__ = "0.1.0"

PACKAGES = ("core", "models", "pretrain", "recipes", "rewards", "rl", "rollout", "worlds")


def _check_packages() -> None:
    """Raise ImportError where a folder of the user's has the name of one of this project's packages and is found first,
    in any process: what is imported from it would be missing without a word of why."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or []]
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        found = places[0] if places else origin
        if found is not None and found.parent != root and (root / name).is_dir():
            raise ImportError(
                f"{found} hides this project's package {name!r}: rename it, or run from another folder (its parent is "
                "searched before the installed packages)"
            )


_check_packages()
