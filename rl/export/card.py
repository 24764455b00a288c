"""The model card of an adapter: how it was trained, what it scores on held-out prompts, whose licence holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from core import __version__
from core.statistics import bootstrap_mean, paired_bootstrap
from rewards.base import reward_label
from rewards.recipe import reward_specs
from rl.recipe.schema import RunConfig
from rl.recipe.stage_parts import stage_parts
from rl.record.evaluation import EVALUATIONS, TaskScores, read_scores

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def model_card(config: RunConfig, run_dir: Path, sha256: str, base: Path, *, merged: bool) -> str:
    """Markdown with the hub's YAML head. `sha256`: of the adapter, by which its evaluations are found; `base`: the
    folder of the model that it changes, whose licence it is under."""
    licence, where = base_licence(base)
    head = {
        "library_name": "diffusers", "base_model": Path(config.model.path).name, "tags": ["lora", "flow-grpo"],
    } | ({"license": licence} if licence else {})  # fmt: skip
    lora = config.model.lora
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {config.name}", "",
        f"A LoRA adapter (rank {lora.rank}, alpha {lora.alpha:g}) for {Path(config.model.path).name}, trained with "
        f"online RL (Flow-GRPO) by unipic-rl {__version__}. Its sha256 is `{sha256}`; the whole recipe is in "
        "`recipe.yaml`.",
        "", "## Training", "", "| stage | task | steps | rewards (weight) |", "|---|---|---|---|",
        *_stages(config), "", "## Scores on held-out prompts", "", *_scores(config, run_dir, sha256),
        "", "## Use", "", "```python", 'pipeline.load_lora_weights("diffusers")  # diffusers, SD3 family',
        'PeftModel.from_pretrained(transformer, ".")  # PEFT', "```",
        *(["", "`transformer/` has it merged, in the base's layout."] if merged else []),
        "", "## Licence", "", where, "",
    ]  # fmt: skip
    return "\n".join(lines)


def base_licence(base: Path) -> tuple[str | None, str]:
    """The hub's name of the base's licence where its card gives one, and a sentence for people."""
    card = base / "README.md"
    found = _FRONT.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    try:
        head = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        head = None
    name = head.get("license") if isinstance(head, dict) else None
    if isinstance(name, str):
        link = head.get("license_link") if isinstance(head, dict) else None
        return name, f"The base model's licence holds: {name}{f' ({link})' if link else ''}."
    files = sorted(path.name for path in base.glob("LICENSE*"))
    if files:
        return None, f"The base model's licence holds, which is in its {', '.join(files)}."
    return (
        None,
        "The base model's licence holds. Its folder names none: look it up where the model came from.",
    )


def _stages(config: RunConfig) -> Iterator[str]:
    for stage in config.stages:
        for part in stage_parts(stage):
            rewards = ", ".join(f"{reward_label(s)} ({s.weight:g})" for s in reward_specs(part.rewards))
            yield f"| {stage.name} | {part.task} | {stage.steps} | {rewards} |"


def _scores(config: RunConfig, run_dir: Path, sha256: str) -> Iterator[str]:
    """One row for each task that this very adapter was evaluated on, with the paired change since before training."""
    found: dict[str, TaskScores] = {}
    for path in sorted((run_dir / EVALUATIONS).glob("*/*.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("adapter_sha256") == sha256:
            scores = read_scores(path)
            if scores is not None and scores.guidance_scale == config.evaluation.guidance_scale:
                found[scores.task] = scores
    if not found:
        yield "This adapter was not evaluated."
        return
    yield "| task | score (95 %) | change since before training (95 %) | prompts |"
    yield "|---|---|---|---|"
    for task, scores in sorted(found.items()):
        now = bootstrap_mean(scores.rewards)
        before = read_scores(run_dir / EVALUATIONS / "before" / f"{task}.json")
        change = "-"
        if before is not None and before.inputs_sha256 == scores.inputs_sha256:
            difference = paired_bootstrap(before.rewards, scores.rewards)
            change = _interval(difference.mean, difference.low, difference.high, "+")
        missing = f" ({now.missing} not scored)" if now.missing else ""
        yield f"| {task} | {_interval(now.mean, now.low, now.high)} | {change} | {now.n}{missing} |"
    yield ""
    yield "Intervals are bootstraps over prompts, not over training seeds."


def _interval(mean: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    bounds = "" if low is None or high is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{mean:{sign}.4f}{bounds}"
