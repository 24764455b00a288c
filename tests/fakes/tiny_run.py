"""A whole recipe at tiny size: random models of the real classes, a few prompts, a reward that reads pixels."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.fakes.tiny_models import make_tiny_folder

REWARD_SOURCE = '''
def redness(*, images, prompts, references, metadata):
    """Mean red minus mean green, in [0, 1]."""
    import numpy as np
    return [float((np.asarray(i, dtype=float)[..., 0] - np.asarray(i, dtype=float)[..., 1]).mean() / 510 + 0.5)
            for i in images]
'''


def write_prompts(folder: Path, count: int = 6) -> None:
    """`t2i.jsonl` and `edit.jsonl` with `count` prompts each."""
    colours, shapes = ("red", "green", "blue"), ("circle", "square")
    lines: dict[str, list[dict[str, Any]]] = {"t2i": [], "edit": []}
    for i in range(count):
        text = f"a {colours[i % 3]} {shapes[i % 2]}"
        lines["t2i"].append({"prompt": text, "metadata": {"index": i}})
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        lines["edit"].append({"prompt": f"make it {colours[i % 3]}", "image": uri, "metadata": {"index": i}})
    for task, records in lines.items():
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """Write model, prompts, reward and `recipe.yaml` below `folder`; `changes` are dotted keys with `__` for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_folder(folder / "model")
    write_prompts(folder)
    (folder / "reward.py").write_text(REWARD_SOURCE)
    reward = [{"name": f"{folder / 'reward.py'}:redness"}]
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {
            "path": str(folder / "model"), "dtype": "float32", "height": 32, "width": 32, "max_sequence_length": 16,
            "lora": {"rank": 4, "alpha": 8.0},
        },
        "rollout": {
            "workers": 1, "num_steps": 4, "group_size": 4, "prompts_per_rollout": 2, "chunk_size": 2,
            "guidance_scale": 1.0,
        },
        "learner": {
            "ranks": 1, "zero_stage": 1, "micro_batch_size": 4, "updates_per_rollout": 2, "learning_rate": 1e-3,
            "ema": {"enabled": False},
        },
        "stages": [
            {"name": "edit", "task": "edit", "prompts": str(folder / "edit.jsonl"), "steps": 2, "rewards": reward},
            {"name": "t2i", "task": "t2i", "prompts": str(folder / "t2i.jsonl"), "steps": 2, "rewards": reward},
        ],
        "evaluation": {
            "tasks": [
                {"task": t, "prompts": str(folder / f"{t}.jsonl"), "num_prompts": 4, "rewards": reward}
                for t in ("edit", "t2i")
            ],
            "num_steps": 2, "guidance_scale": 1.0, "batch_size": 2,
        },
        "resources": {
            "device": "cpu", "rollout_cpus": 0.25, "learner_cpus": 0.25, "reward_cpus": 0.25, "encode_cpus": 0.25,
            "reward_workers": 1, "threads": 1, "call_timeout_s": 300, "start_timeout_s": 300,
        },
        "checkpoint": {"every": 1, "keep_last": 3},
        "gallery": {"prompts": 2, "every": 1},
    }  # fmt: skip
    for key, value in changes.items():
        node = recipe
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
