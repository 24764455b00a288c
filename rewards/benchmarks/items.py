"""What a benchmark asks for, and what became of it: the records that readers, runs and tables share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.prompts import Prompt
from core.text import parse_json

ANSWERED_BY = "answered_by."
"""A judge's component `answered_by.SNAPSHOT` is 1 where that snapshot answered."""


class DataError(ValueError):
    """A benchmark's data cannot be used; `problems` holds one sentence for each thing to mend."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    key: names the prompt's pictures in the benchmark's own layout; unique within the benchmark. group: what the
    tables average over first (tag, edit type, kind; "" for none). prompt: what is generated, with the metadata
    that its reward reads.
    """

    key: str
    group: str
    prompt: Prompt


@dataclass(frozen=True)
class ScoredItem:
    """An item with one entry per picture asked for: its named values, or None where nothing is known of it.

    `score` is the reward's own score; the other names are its components. A picture that is absent and one that
    could not be scored both have no `score`: neither is ever a number.
    """

    item: Item
    images: tuple[Mapping[str, float] | None, ...]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.item.prompt.metadata

    def values(self, name: str) -> list[float]:
        """The named value of every picture that has it."""
        return [image[name] for image in self.images if image is not None and name in image]


def subset(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` items (None: all) in their order, taken from the groups in turn, so that each is there if it can be.

    Official files list one group after the other: their first lines would be one group alone. Raises DataError
    when there are fewer.
    """
    if count is None:
        return list(items)
    if count > len(items):
        raise DataError([f"{count} prompts are asked for, and the data holds {len(items)}; ask for fewer"])
    seen: dict[str, int] = {}
    turns = []
    for place, item in enumerate(items):
        turn = seen[item.group] = seen.get(item.group, -1) + 1
        turns.append((turn, place))
    chosen = {place for _, place in sorted(turns)[:count]}
    return [item for place, item in enumerate(items) if place in chosen]


def read_text(path: Path, what: str, get_data: str) -> str:
    """The text of a data file. Raises DataError naming the file, what it is, and where to get it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([f"{path}: cannot be read as {what} ({error}); {get_data}"]) from error


def read_edits(path: Path, what: str, get_data: str) -> list[tuple[str, str, Any, Any]]:
    """(key, id, prompt, edit_type) of every entry of a JSON file `{key: {"prompt", "id", "edit_type"}}`.

    Raises DataError for a file that cannot be read or has another form.
    """
    text = read_text(path, what, get_data)
    try:
        return [
            (key, str(row["id"]), row["prompt"], row["edit_type"]) for key, row in parse_json(text).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{key: {"prompt", "id", "edit_type"}}'
        raise DataError([f"{path}: is not {form} ({type(error).__name__}: {error}); {get_data}"]) from error


def detectors(scored: Iterable[ScoredItem]) -> list[str]:
    """Who gave GenEval's verdicts: the prefix of every stored `PREFIX.correct`, detector and colour rule.

    This and `snapshots` read what was stored with each picture, so they name those that really answered, also when
    an evaluation was continued on another day.
    """
    names = {name for name in _names(scored) if name.endswith(".correct")}
    return sorted(name.rpartition(".")[0] for name in names)


def snapshots(scored: Iterable[ScoredItem]) -> list[str]:
    """The snapshots of the judge behind the answers."""
    return sorted(name.removeprefix(ANSWERED_BY) for name in _names(scored) if name.startswith(ANSWERED_BY))


def _names(scored: Iterable[ScoredItem]) -> set[str]:
    images: Iterable[Mapping[str, float] | None] = (image for item in scored for image in item.images)
    return {name for image in images for name in image or ()}
