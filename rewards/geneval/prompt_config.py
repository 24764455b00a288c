"""The keys of a train-prompt set: YAML over defaults, all problems reported at once."""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from core.keys import AtLeast0, NonNegative, Seed, Whole
from core.recipe import read_recipe, value_problems
from core.seeds import derive_seed
from rewards.geneval.detection import RELATIONS
from rewards.geneval.names import CLASS_NAMES, COLORS
from rewards.geneval.prompt_grammar import NUMBERS

MAX_COUNT = len(NUMBERS) - 1
"""The rules keep 16 detections of a class, so a surplus over 15 is the last that can be seen."""


@dataclass
class TagWeights:
    """How often each tag comes, in proportion. The defaults are the ones of Flow-GRPO's train set (Liu et al.
    2025), which leaves out `single_object`: every prompt of it over GenEval's classes is a test prompt.
    """

    single_object: NonNegative = 0.0
    """A photo of a bench."""
    two_object: NonNegative = 1.0
    """A bench and a bear."""
    counting: NonNegative = 5.0
    """Four benches."""
    colors: NonNegative = 1.0
    """A red bench."""
    position: NonNegative = 7.0
    """A bench left of a bear."""
    color_attr: NonNegative = 3.0
    """A red bench and a blue bear."""


@dataclass
class TrainPromptConfig:
    """What prompts are made of; the defaults are what GenEval's own are made of."""

    classes: list[str] = field(default_factory=lambda: list(CLASS_NAMES))
    """Objects that are asked for."""
    uncolored: list[str] = field(default_factory=lambda: ["person"])
    """Classes that never get a colour (GenEval colours no person)."""
    colors: list[str] = field(default_factory=lambda: list(COLORS))
    """Colours that are asked for."""
    relations: list[str] = field(default_factory=lambda: list(RELATIONS))
    """Positions that are asked for."""
    counts: list[Annotated[Whole, Ge(2), Le(MAX_COUNT)]] = field(default_factory=lambda: [2, 3, 4])
    """Numbers that `counting` asks for."""
    tag_weights: TagWeights = field(default_factory=TagWeights)
    unseen_classes: list[str] = field(default_factory=list)
    """Classes that are held out, by name."""
    unseen_count: AtLeast0 = 0
    """Classes that are held out, by number."""
    unseen_seed: Seed = 0
    """What those are drawn from."""
    wording: Literal["geneval", "english"] = "geneval"
    """As the official prompts, or with correct plurals."""
    plurals: dict[str, str] = field(default_factory=dict)
    """Plural of a class, before either wording."""
    repeats: bool = False
    """A tag whose prompts are used up starts over in a new order, instead of being an error."""


def load_config(path: str | Path | None) -> TrainPromptConfig:
    """Read a YAML file over the defaults; without a file, the defaults. Raises ConfigError with every problem found."""
    return (
        TrainPromptConfig() if path is None else read_recipe(path, [], TrainPromptConfig, rules=_broken_rules)
    )


def find_problems(config: TrainPromptConfig) -> list[str]:
    """Every value and every rule that cannot be; empty when prompts can be made of them."""
    return value_problems(config) + _broken_rules(config)


def _broken_rules(config: TrainPromptConfig) -> list[str]:
    problems = [
        *_unknown(config.colors, COLORS, "colors"),
        *_unknown(config.relations, RELATIONS, "relations"),
    ]
    problems += _unknown(config.unseen_classes, config.classes, "unseen_classes")
    # The default of `uncolored` names a class that a list of one's own may lack.
    names = [*config.classes, *CLASS_NAMES]
    problems += [*_unknown(config.uncolored, names, "uncolored"), *_unknown(config.plurals, names, "plurals")]
    for key in ("classes", "colors", "relations", "counts", "unseen_classes"):
        values = [normalized(str(value)) for value in getattr(config, key)]
        problems += [
            f"{key}: {v!r} is there twice" for v in sorted({v for v in values if values.count(v) > 1})
        ]
        problems += [f"{key}: an entry holds no word"] if "" in values else []
    if config.unseen_count > len(config.classes):
        problems.append(
            f"unseen_count: {config.unseen_count} is not in 0..{len(config.classes)}, the classes"
        )
    if config.unseen_classes and config.unseen_count:
        problems.append("unseen_classes and unseen_count: give the list or the number, not both")
    if not any(dataclasses.asdict(config.tag_weights).values()):
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


def _unknown(names: Iterable[str], known: Collection[str], key: str) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}: unknown name '{name}': {nearest(name, known)}"
