"""What the parameters of a built-in reward may be, and how each bad one reads."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


def value_problems(schema: TypeAdapter[Any], values: Mapping[str, Any]) -> Iterator[str]:
    """Every value that does not fit the schema, as one sentence that names its key."""
    try:
        schema.validate_python(values)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            remedy = found["msg"].replace("Input should be", "it should be", 1)
            yield f"{found['loc'][0]} is {found['input']!r}; {remedy[0].lower()}{remedy[1:]}"


def choice_problems(what: str, given: Iterable[str], choices: Collection[str]) -> list[str]:
    """Every name that is not among the choices, with the nearest that is."""
    problems = []
    for name in given:
        if name not in choices:
            near = difflib.get_close_matches(str(name), list(choices), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            problems.append(f"{what} {name!r} is not known; {hint}it is one of {', '.join(choices)}")
    return problems
