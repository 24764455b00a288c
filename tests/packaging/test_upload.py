"""What `ray job submit --working-dir .` uploads: the code and the small base, not environments or runs."""

from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("path", "uploaded"),
    [
        (".venv/bin/python", False),
        (".git/HEAD", False),
        (".cache/x", False),
        ("runs/demo/metrics.jsonl", False),
        ("data/images/1.png", False),
        ("rl/__pycache__/train.cpython-311.pyc", False),
        ("tests/fakes/tiny_run.py", False),
        ("rl/train.py", True),
        ("worlds/shapes/scenes/world.py", True),
        ("recipes/shapes/pdtr.yaml", True),
        ("recipes/shapes/prompts/edit_train.jsonl", True),
        ("recipes/shapes/base/transformer/diffusion_pytorch_model.safetensors", True),
        ("bench/engine.py", True),
    ],
)
def test_the_upload_takes_code_and_leaves_the_rest(path: str, uploaded: bool) -> None:
    matchers = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    assert any(matches(ROOT / path) for matches in matchers) is not uploaded
