"""Train prompts in GenEval's six tags, as GenEval's records: `python -m rewards.geneval prompts`.

Test sets are kept out twice over: by text (caseless, words only) and by canonical clauses, that is, by what is
asked to be shown. "A dog and a cat" leaves out "a cat and a dog"; "a dog left of a cat" leaves out "a cat right
of a dog"; the wording, the tag and the exclude clauses do not matter. A prompt that only shares classes with a
test prompt stays: other colours, counts or relations are another prompt.

Held-out classes: the split `train` holds none of their names, not even as words of another name ("hot dog"
leaves with "dog", the colour orange with the fruit); every prompt of the split `unseen` asks for at least one.

Lines take turns over the tags in proportion to their weights, so any prefix is balanced, and a longer set with
the same seed begins with the shorter one. Pure Python, no image and no model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from core.files import atomic_write_text
from core.prompts import load_prompts
from core.seeds import derive_seed
from rewards.geneval.names import CLASS_NAMES
from rewards.geneval.prompt_config import (
    PromptConfigError,
    TrainPromptConfig,
    load_config,
    nearest,
    normalized,
    unseen_classes,
)
from rewards.geneval.prompt_grammar import prompt_text
from rewards.geneval.rules import TAGS, check_clauses

logger = logging.getLogger(__name__)

SPLITS = ("train", "unseen")

Record: TypeAlias = dict[str, Any]
Canonical: TypeAlias = tuple[tuple[Any, ...], tuple[Any, ...]]

_MIRROR = {"right of": "left of", "below": "above"}
"""Relation -> the one that says the same from the other side."""


class PromptSupplyError(ValueError):
    """A tag has fewer prompts than its weight asks for."""


@dataclass(frozen=True)
class Excluded:
    """What must not be generated: normalised texts, and canonical clauses where the test set has any."""

    texts: frozenset[str] = frozenset()
    clauses: frozenset[Canonical] = frozenset()

    def holds(self, record: Mapping[str, Any]) -> bool:
        return canonical(record["include"]) in self.clauses or normalized(record["prompt"]) in self.texts


def canonical(include: Sequence[Mapping[str, Any]]) -> Canonical:
    """What include clauses ask to be shown: equal for clauses in another order or seen from the other side."""
    objects = [(clause["class"], clause["count"], clause.get("color") or "") for clause in include]
    placed = []
    for item, clause in zip(objects, include, strict=True):
        if clause.get("position"):
            relation, target = clause["position"]
            pair = (item, objects[target])
            placed.append((_MIRROR[relation], *pair[::-1]) if relation in _MIRROR else (relation, *pair))
    return tuple(sorted(objects)), tuple(sorted(placed))


def read_test_sets(paths: Iterable[str | Path]) -> Excluded:
    """Read JSONL prompt files. Lines without include clauses are known by their text alone.

    Raises PromptFileError for a line that is no prompt, ValueError for clauses that the rules cannot read.
    """
    texts, clauses = set(), set()
    for path in paths:
        for prompt in load_prompts(path, "t2i"):
            texts.add(normalized(prompt.prompt))
            include = prompt.metadata.get("include")
            if include:
                check_clauses(include, f"{path}: prompt {prompt.prompt!r}: include")
                clauses.add(canonical(include))
    return Excluded(frozenset(texts), frozenset(clauses))


def generate(
    config: TrainPromptConfig,
    *,
    num: int,
    seed: int,
    split: str = "train",
    excluded: Excluded = Excluded(),  # noqa: B008 (frozen and empty)
) -> Iterator[Record]:
    """The first `num` records of the endless, seeded order of a split.

    config: sound, as `load_config` returns it. No text comes twice, unless `config.repeats` says so.

    Raises PromptSupplyError, on reaching it, when a tag has no prompt left, and ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    weights = {tag: weight for tag, weight in asdict(config.tag_weights).items() if weight > 0}
    total = sum(weights.values())
    owners: dict[str, str] = {}
    streams = {tag: _tag_records(tag, config, seed, split, excluded, owners) for tag in weights}
    taken = Counter({tag: 0 for tag in weights})
    for line in range(num):
        tag = max(weights, key=lambda tag: weights[tag] * (line + 1) / total - taken[tag])
        record = next(streams[tag], None)
        if record is None:
            raise PromptSupplyError(
                f"{tag}: {taken[tag]} prompts exist for the split {split} outside the given test sets, and "
                f"{num} lines with tag_weights.{tag}={weights[tag]:g} of {total:g} need about "
                f"{num * weights[tag] / total:.0f}. At most --num {line} is possible with these weights. Ask "
                f"for fewer, lower its weight, name more "
                f"{'counts' if tag == 'counting' else 'classes'}, or set repeats: true"
            )
        taken[tag] += 1
        yield record


def _tag_records(
    tag: str,
    config: TrainPromptConfig,
    seed: int,
    split: str,
    excluded: Excluded,
    owners: dict[str, str],
) -> Iterator[Record]:
    """The records of one tag in a seeded order, each text once; with `repeats` round after round.

    owners: text -> the tag that has it, shared by all tags: a class "orange juice" beside a class "juice" would
    give one text to two.
    """
    axes = _axes(tag, config)
    size = 1
    for axis in axes:
        size *= len(axis)
    in_split = _split_test(config, split)
    for turn in itertools.count() if config.repeats else range(1):
        rng = random.Random(derive_seed("geneval prompts", seed, split, tag, turn))
        used: set[str] = set()
        for index in _shuffled(size, rng):
            values = []
            for axis in axes:
                index, place = divmod(index, len(axis))
                values.append(axis[place])
            record = _record(tag, values, config)
            text = normalized(record["prompt"])
            if text in used or not in_split(record) or excluded.holds(record):
                continue
            if owners.setdefault(text, tag) == tag:
                used.add(text)
                yield record
        if not used:
            return


def _axes(tag: str, config: TrainPromptConfig) -> list[list[Any]]:
    """What a tag's prompts choose from, independently of each other."""
    colored = [name for name in config.classes if name not in config.uncolored]
    pairs = list(itertools.permutations(colored if tag == "color_attr" else config.classes, 2))
    axes: dict[str, list[list[Any]]] = {
        "single_object": [config.classes],
        "two_object": [pairs],
        "counting": [config.classes, config.counts],
        "colors": [colored, config.colors],
        "position": [pairs, config.relations],
        # As upstream: two objects of one colour are not asked for.
        "color_attr": [pairs, list(itertools.permutations(config.colors, 2))],
    }
    return axes[tag]


def _record(tag: str, values: Sequence[Any], config: TrainPromptConfig) -> Record:
    """GenEval's record of one choice on each axis."""
    names = values[0] if isinstance(values[0], tuple) else (values[0],)
    include: list[dict[str, Any]] = [{"class": name, "count": 1} for name in names]
    record: Record = {"tag": tag, "include": include}
    if tag == "counting":
        include[0]["count"] = values[1]
        record["exclude"] = [{"class": names[0], "count": values[1] + 1}]
    elif tag == "position":
        # As upstream: the object that is placed comes second and points back at its target.
        include.reverse()
        include[1]["position"] = [values[1], 0]
    elif tag in ("colors", "color_attr"):
        colors = values[1] if isinstance(values[1], tuple) else (values[1],)
        for clause, color in zip(include, colors, strict=True):
            clause["color"] = color
    record["prompt"] = prompt_text(include, config.wording, config.plurals)
    return record


def _split_test(config: TrainPromptConfig, split: str) -> Callable[[Record], bool]:
    """Whether a record belongs to the split."""
    held = unseen_classes(config)
    if split == "unseen":
        return lambda record: any(clause["class"] in held for clause in record["include"])
    if not held:
        return lambda record: True
    words = re.compile(rf"\b(?:{'|'.join(re.escape(normalized(name)) for name in held)})\b")
    # A plural may hide a name from the text, so the class names are looked at too.
    barred = {name for name in config.classes if words.search(normalized(name))}
    return lambda record: (
        not (
            any(clause["class"] in barred for clause in record["include"])
            or words.search(normalized(record["prompt"]))
        )
    )


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """The numbers below `size` in random order, drawn one by one (Fisher and Yates, moves kept in a dict)."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        place = rng.randrange(last + 1)
        end = moved.pop(last, last)
        yield end if place == last else moved.get(place, place)
        if place != last:
            moved[place] = end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m rewards.geneval prompts`."""
    parser.description = "Write train prompts in GenEval's format, with the given test sets left out."
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl", help="the file to write")
    parser.add_argument("--num", required=True, type=int, help="how many prompts")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    parser.add_argument(
        "--config", metavar="YAML", help="keys of TrainPromptConfig in rewards/geneval/prompt_config.py"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="without or with the held-out classes"
    )
    parser.add_argument(
        "--exclude",
        action="extend",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE.jsonl",
        help="test sets whose prompts must not be among these, in whatever order or wording",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file whole or not at all; 0, or 2 when the arguments cannot be met."""
    try:
        _check(arguments)
        config = load_config(arguments.config)
        excluded = read_test_sets(arguments.exclude)
        _warn(config, arguments)
        records = list(
            generate(config, num=arguments.num, seed=arguments.seed, split=arguments.split, excluded=excluded)
        )
        atomic_write_text(arguments.output, "".join(json.dumps(record) + "\n" for record in records))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"No prompts were written:\n{error}\n")
        return 2
    counts = Counter(record["tag"] for record in records)
    shares = ", ".join(f"{tag} {counts[tag]}" for tag in TAGS if counts[tag])
    sys.stdout.write(f"{arguments.output}: {len(records)} prompts ({shares})\n")
    if held := unseen_classes(config):
        sys.stdout.write(f"held-out classes: {', '.join(held)}\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    problems = []
    if arguments.num < 1:
        problems.append(f"--num: {arguments.num} is below 1")
    if arguments.output.resolve() in [path.resolve() for path in arguments.exclude]:
        problems.append(f"--output: {arguments.output} is also a test set, which it would replace")
    if problems:
        raise PromptConfigError(problems)


def _warn(config: TrainPromptConfig, arguments: argparse.Namespace) -> None:
    if not arguments.exclude:
        logger.warning("no --exclude: test prompts may be among these prompts")
    for name in config.classes:
        if name not in CLASS_NAMES:
            logger.warning("class %r is not one of GenEval's detector; %s", name, nearest(name, CLASS_NAMES))
