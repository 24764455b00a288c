"""What the command lines check of a record before anything starts. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


class Refused(ValueError):
    """What was asked for cannot be done; `problems` holds one line for each thing to mend."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(f"- {problem}" for problem in problems))
        self.problems = problems


def kinds_of(record: type) -> dict[str, type]:
    """The type of every field of a dataclass, None apart."""

    def kind_of(hint: Any) -> type:
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kind = next(kind for kind in kinds if kind is not NoneType)
        return get_origin(kind) or kind

    return {name: kind_of(hint) for name, hint in get_type_hints(record).items()}


def check_record(
    record: Mapping[str, Any], kinds: Mapping[str, type], required: Collection[str]
) -> list[str]:
    """What is wrong with the keys and the types of a record; `kinds` has the type of every known key.

    A whole number passes for a float. Null is taken as absent.
    """
    problems = []
    for key, value in record.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(kinds)}"
            problems.append(f"unknown key {key!r}: {hint}")
        elif value is not None and not _is(value, kinds[key]):
            problems.append(f"key {key!r} must be {_NAMES[kinds[key]]}, found {value!r:.60}")
        elif isinstance(value, list):
            odd = [one for one in value if not isinstance(one, str)]
            problems += [f"key {key!r} must hold paths, found {one!r:.60}" for one in odd]
    problems += [f"key {key!r} is missing" for key in required if record.get(key) is None]
    return problems


_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
