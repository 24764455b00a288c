"""What a benchmark asks for, and what became of it: the two records that readers, runs and tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.prompts import Prompt


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


def read_text(path: Path, what: str, way_out: str) -> str:
    """The text of a data file. Raises DataError naming the file, what it is, and where to get it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([f"{path}: cannot be read as {what} ({error}); {way_out}"]) from error
