"""The keys of a train-prompt set: YAML over defaults, unknown keys refused, all problems reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import random
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from core.seeds import derive_seed
from rewards.geneval.detection import RELATIONS
from rewards.geneval.names import CLASS_NAMES, COLORS
from rewards.geneval.prompt_grammar import NUMBERS, WORDINGS

MAX_COUNT = len(NUMBERS) - 1
"""The rules keep 16 detections of a class, so a surplus over 15 is the last that can be seen."""


class PromptConfigError(ValueError):
    """A prompt configuration cannot be used; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


@dataclass
class TagWeights:
    """How often each tag comes, in proportion. The defaults are the ones of Flow-GRPO's train set (Liu et al.
    2025), which leaves out `single_object`: every prompt of it over GenEval's classes is a test prompt.
    """

    single_object: float = 0.0
    two_object: float = 1.0
    counting: float = 5.0
    colors: float = 1.0
    position: float = 7.0
    color_attr: float = 3.0


@dataclass
class TrainPromptConfig:
    """What prompts are made of; the defaults are what GenEval's own are made of.

    `uncolored`: classes that never get a colour (GenEval colours no person). `counts`: the numbers asked for
    by `counting`. `unseen_classes` are held out, or `unseen_count` classes chosen by `unseen_seed`. `wording`:
    `geneval` (as the official prompts) or `english` (correct plurals); `plurals` (class -> plural) goes before
    either. `repeats`: a tag whose prompts are used up starts over in a new order, instead of being an error.
    """

    classes: list[str] = field(default_factory=lambda: list(CLASS_NAMES))
    uncolored: list[str] = field(default_factory=lambda: ["person"])
    colors: list[str] = field(default_factory=lambda: list(COLORS))
    relations: list[str] = field(default_factory=lambda: list(RELATIONS))
    counts: list[int] = field(default_factory=lambda: [2, 3, 4])
    tag_weights: TagWeights = field(default_factory=TagWeights)
    unseen_classes: list[str] = field(default_factory=list)
    unseen_count: int = 0
    unseen_seed: int = 0
    wording: str = "geneval"
    plurals: dict[str, str] = field(default_factory=dict)
    repeats: bool = False


def load_config(path: str | Path | None) -> TrainPromptConfig:
    """Read a YAML file over the defaults; without a file, the defaults.

    Raises PromptConfigError with every problem found.
    """
    if path is None:
        return TrainPromptConfig()
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise PromptConfigError([f"{path}: cannot be read ({error})"]) from error
    if not isinstance(loaded, DictConfig):
        raise PromptConfigError(
            [f"{path}: must be a mapping with keys {', '.join(_keys(TrainPromptConfig))}"]
        )
    problems = list(_unknown(map(str, loaded), _keys(TrainPromptConfig), "unknown key"))
    weights = loaded.get("tag_weights")
    if isinstance(weights, DictConfig):
        problems += _unknown(map(str, weights), _keys(TagWeights), "tag_weights: unknown key")
    elif "tag_weights" in loaded:
        problems.append(f"tag_weights: {weights!r} is not a mapping of {', '.join(_keys(TagWeights))}")
    if problems:
        raise PromptConfigError(problems)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainPromptConfig), loaded))
    except OmegaConfBaseException as error:
        key = f"key '{error.full_key}': " if getattr(error, "full_key", None) else ""
        raise PromptConfigError([f"{path}: {key}{str(error).splitlines()[0]}"]) from error
    assert isinstance(config, TrainPromptConfig)
    problems = find_problems(config)
    if problems:
        raise PromptConfigError(problems)
    return config


def find_problems(config: TrainPromptConfig) -> list[str]:
    """Every rule that the values break; empty when prompts can be made of them."""
    problems = list(_unknown([config.wording], WORDINGS, "wording: unknown name"))
    problems += _unknown(config.colors, COLORS, "colors: unknown name")
    problems += _unknown(config.relations, RELATIONS, "relations: unknown name")
    problems += _unknown(config.unseen_classes, config.classes, "unseen_classes: unknown name")
    # The default of `uncolored` names a class that a list of one's own may lack.
    names = [*config.classes, *CLASS_NAMES]
    problems += _unknown(config.uncolored, names, "uncolored: unknown name")
    problems += _unknown(config.plurals, names, "plurals: unknown name")
    for key in ("classes", "colors", "relations", "counts", "unseen_classes"):
        values = [normalized(str(value)) for value in getattr(config, key)]
        problems += [
            f"{key}: {v!r} is there twice" for v in sorted({v for v in values if values.count(v) > 1})
        ]
        problems += [f"{key}: an entry holds no word"] if "" in values else []
    problems += [f"counts: {n} is not in 2..{MAX_COUNT}" for n in config.counts if not 2 <= n <= MAX_COUNT]
    if not 0 <= config.unseen_count <= len(config.classes):
        problems.append(
            f"unseen_count: {config.unseen_count} is not in 0..{len(config.classes)}, the classes"
        )
    if config.unseen_classes and config.unseen_count:
        problems.append("unseen_classes and unseen_count: give the list or the number, not both")
    weights = dataclasses.asdict(config.tag_weights)
    problems += [
        f"tag_weights.{tag}: {weight} is not a number of at least 0"
        for tag, weight in weights.items()
        if not (math.isfinite(weight) and weight >= 0)
    ]
    if not any(weights.values()):
        problems.append("tag_weights: all are 0; give at least one tag some")
    return problems


def unseen_classes(config: TrainPromptConfig) -> tuple[str, ...]:
    """The classes held out, in the order of `classes`. Chosen whatever that order is."""
    held = set(config.unseen_classes)
    if config.unseen_count:
        rng = random.Random(derive_seed("geneval unseen classes", config.unseen_seed))
        held = set(rng.sample(sorted(config.classes), config.unseen_count))
    return tuple(name for name in config.classes if name in held)


def normalized(text: str) -> str:
    """Words only: Unicode-normalised, caseless, without punctuation, one space between."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def nearest(name: str, known: Collection[str]) -> str:
    """A hint after a name that is not known: the nearest one, or all when there are few."""
    # COCO's own "mouse", "remote" and "keyboard" are words of GenEval's names.
    near = [other for other in known if name in other.split()] or difflib.get_close_matches(
        name, known, n=1, cutoff=0.5
    )
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(known)}" if len(known) <= 12 else f"it is none of the {len(known)} known"


def _keys(schema: type) -> list[str]:
    return [item.name for item in dataclasses.fields(schema)]


def _unknown(names: Iterable[str], known: Collection[str], what: str) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{what} '{name}': {nearest(name, known)}"
