"""Atomic checkpoints and exact resume.

A checkpoint is a folder that is complete or absent: filled under a temporary name, flushed, its manifest of
hashes written, then renamed. It holds `state.json`, `config.yaml`, `adapter/` (PEFT layout, what would be shipped),
`learner/` (optimizer and trainable weights of every rank, stage reference, moving average). DeepSpeed's part is
a pickle: it is loaded only from this run's own folder and only after every hash has matched.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from core.checkpoints import CHECKPOINTS, resume_folder, set_aside, step_folders
from core.files import atomic_write_json, atomic_write_text, new_folder
from core.inputs import Inputs, compare_inputs
from core.keys import MOVES_BITS
from core.recipe import ConfigError, to_yaml
from rewards.loading import free_params
from rl.recipe.schema import ResourcesConfig, RunConfig
from rl.record.state import RunState, StageProgress

log = logging.getLogger(__name__)

# Keys that may differ between the run that wrote a checkpoint and the one that continues it: who does the work,
# how often it is looked at and what it stops for, never what is computed.
_FREE_KEYS = ("output_dir", "resources.", "rollout.workers", "checkpoint.", "gallery.", "alarms.")
_MOVING_BITS = [
    f"resources.{name}"
    for name, hint in get_type_hints(ResourcesConfig, include_extras=True).items()
    if MOVES_BITS in getattr(hint, "__metadata__", ())
]
_REWARD_KEY = re.compile(r"((?:stages\.\d+(?:\.parts\.\d+)?|evaluation\.tasks\.\d+)\.rewards\.\d+\.)(.+)")
_STAGE_KEY = re.compile(r"stages\.(\d+)\.")
_FREE_REWARD_KEYS = ("timeout_s", "attempts", "max_missing_share", "constant_steps", "service")


def save_checkpoint(
    run_dir: Path, state: RunState, config_yaml: str, learner: Any, adapter_folder: Any, *, border: bool
) -> Path:
    """Write checkpoint `step_<n>` (`stage_<i>_end` at a stage border) and return its folder.

    `learner` is the `LearnerGroup`; `adapter_folder(path)` writes the shipped adapter.
    """
    name = f"stage_{state.stage}_end" if border else f"step_{state.step:06d}"
    final = run_dir / CHECKPOINTS / name
    with new_folder(final) as folder:
        (folder / "learner").mkdir()
        learner.save(folder / "learner")
        adapter_folder(folder / "adapter")
        atomic_write_text(folder / "config.yaml", config_yaml)
        atomic_write_json(folder / "state.json", asdict(state))
    log.info("checkpoint %s", final)
    return final


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The folder to resume from: an explicit one, or for `auto` the sound one with the most steps (None: start afresh).

    Raises CheckpointError as `core.checkpoints.resume_folder` does.
    """
    return resume_folder(run_dir, resume, checkpoints(run_dir))


def begin_at(config: RunConfig, run_dir: Path, resume: str | None) -> tuple[Path | None, RunState]:
    """The checkpoint to go on from (None: from step 0) and its state. Writes nothing. Raises ConfigError.

    Where the last stage has been given more steps, the end of its old ones is a step like others: what is due at one
    has not been looked at.
    """
    checkpoint = find_checkpoint(run_dir, resume) if resume else None
    if checkpoint is not None:
        if checkpoint.resolve().parent.parent != run_dir.resolve():
            raise ConfigError(
                [f"checkpoint {checkpoint} belongs to another run than {run_dir}; set output_dir and name"]
            )
        check_same_recipe((checkpoint / "config.yaml").read_text(), to_yaml(config))
    elif resume and (run_dir / "config.yaml").is_file():
        check_same_recipe((run_dir / "config.yaml").read_text(), to_yaml(config))
    elif resume is None and (run_dir / "metrics.jsonl").exists():
        raise ConfigError([f"{run_dir} holds an earlier run; add --resume auto, or set another name="])
    if checkpoint is None:
        return None, RunState()
    state = read_state(checkpoint)
    if checkpoint.name.startswith("stage_") and state.stages[-1].steps < config.stages[state.stage].steps:
        state.unseen = True
    return checkpoint, state


def set_later_aside(run_dir: Path, step: int) -> None:
    """Move the checkpoints of more than `step` steps out of the way of a run that continues there."""
    set_aside(run_dir, [path for path, steps in checkpoints(run_dir).items() if steps > step])


def checkpoints(run_dir: Path) -> dict[Path, int]:
    """Those of steps and stage borders with their steps, fewest first; 0 for a border that cannot say."""
    found = step_folders(run_dir / CHECKPOINTS)
    for border in (run_dir / CHECKPOINTS).glob("stage_*_end"):
        try:
            found[border] = read_state(border).step
        except (OSError, ValueError, KeyError, TypeError):
            found[border] = 0
    return dict(sorted(found.items(), key=lambda item: item[1]))


def read_state(folder: Path) -> RunState:
    """The run state of a verified checkpoint."""
    document = json.loads((folder / "state.json").read_text())
    stages = [StageProgress(**entry) for entry in document["stages"]]
    return RunState(**{**document, "stages": stages, "inputs": Inputs.read(document)})


def take_served(state: RunState, served: Mapping[str, str], *, accept: bool) -> None:
    """Compare what services say of the code of their rewards with what they said before. Raises ConfigError."""
    before = {name: digest for name, digest in state.inputs.held.items() if name in served}
    if before:
        state.changes += compare_inputs(Inputs(before), Inputs(dict(served)), step=state.step, accept=accept)
    state.inputs.held.update(served)


def check_same_recipe(saved_yaml: str, current_yaml: str) -> None:
    """Raise ConfigError naming each key that would change what is computed after a resume; the log names those that
    change its rounding alone."""
    import yaml

    document = yaml.safe_load(saved_yaml)
    saved, current = _flat(document), _flat(yaml.safe_load(current_yaml))
    last = len(document.get("stages", [])) - 1
    problems = [
        f"key '{key}' was {saved.get(key)!r} when the checkpoint was written and is {current.get(key)!r} now; "
        f"{_remedy(key, last)}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
        and not key.startswith(_FREE_KEYS)
        and not _free(key, current)
        and not _adds(key, saved, current, last)
    ]
    if problems:
        raise ConfigError(problems)
    for key in _MOVING_BITS:
        if saved.get(key) != current.get(key):
            log.warning(
                "key '%s' was %r and is %r now: the run goes on, but not to the bit as it would have",
                key, saved.get(key), current.get(key),
            )  # fmt: skip


def _adds(key: str, saved: dict[str, Any], current: dict[str, Any], last: int) -> bool:
    """Whether a key only lengthens the run: a stage after the saved recipe's `last`, or more steps of that one. Under a
    rate that falls over the stage, more steps would have made those that are done others."""
    stage = _STAGE_KEY.match(key)
    if stage is not None and int(stage[1]) > last:
        return True
    if key != f"stages.{last}.steps" or saved.get("learner.final_learning_rate") is not None:
        return False
    return isinstance(current.get(key), int) and current[key] > saved[key]


def _remedy(key: str, last: int) -> str:
    if key == f"stages.{last}.steps":
        return (
            "set it back: only more steps may be added, and none where learner.final_learning_rate makes the rate fall "
            "over the stage (add a stage after it)"
        )
    return "set it back, or start a new run under another name"


def _free(key: str, current: dict[str, Any]) -> bool:
    """Whether a key of a reward says only how its scores are obtained."""
    found = _REWARD_KEY.fullmatch(key)
    if found is None:
        return False
    head, *rest = found[2].split(".")
    if head == "params" and rest:
        return rest[0] in free_params(str(current.get(f"{found[1]}name")))
    return head in _FREE_REWARD_KEYS


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of everything that says something; an empty list or mapping does not."""
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = dict(enumerate(node)).items()  # type: ignore[assignment]
    else:
        return {prefix.rstrip("."): node}
    flat: dict[str, Any] = {}
    for key, child in children:
        flat |= _flat(child, f"{prefix}{key}.")
    return flat
