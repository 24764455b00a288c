"""What the value of a recipe's key may be: types with their bounds, said once, and how they read in a message.

Numbers are finite unless a key says otherwise, and true and false are no numbers.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, AllowInfNan, BeforeValidator
from pydantic_core import PydanticCustomError

_LONGEST_NAME = 200
"""File systems take 255 bytes; what is written beside a folder adds to its name."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("bool_is_no_number", "true and false are no numbers")
    return value


def folder_name(value: str) -> str:
    """The name itself. Raises ValueError for one that is no single part of a path, or too long for a file system."""
    if len(value.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise ValueError(f"a folder is called so: at most {_LONGEST_NAME} bytes")
    if value.strip() in ("", ".", "..") or not value.isprintable() or set(value) & set("/\\"):
        raise ValueError(
            "a folder is called so: no '/', '\\' or control character in it, and neither '.' nor '..'"
        )
    return value


class MovesBits:
    """Marks a key that a resumed run may change, though another value rounds otherwise."""


MOVES_BITS = MovesBits()

Whole = Annotated[int, BeforeValidator(_no_bool)]
Finite = Annotated[float, BeforeValidator(_no_bool), AllowInfNan(False)]

Count = Annotated[Whole, Ge(1)]
AtLeast0 = Annotated[Whole, Ge(0)]
AtLeast2 = Annotated[Whole, Ge(2)]
Seed = Annotated[Whole, Ge(0), Lt(2**63)]

Positive = Annotated[Finite, Gt(0)]
NonNegative = Annotated[Finite, Ge(0)]
Share = Annotated[Finite, Ge(0), Le(1)]
OpenShare = Annotated[Finite, Gt(0), Lt(1)]
Decay = Annotated[Finite, Ge(0), Lt(1)]
Guidance = Annotated[Finite, Ge(1)]

FolderName = Annotated[str, AfterValidator(folder_name)]
Device = Literal["cuda", "cpu"]
ModelDtype = Literal["float32", "bfloat16"]
PositionMode = Literal["flat", "mrope"]
Task = Literal["edit", "t2i"]
ZeroStage = Annotated[Literal[1, 2, 3], BeforeValidator(_no_bool)]


def split_optional(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> X, True; anything else -> itself, False."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kept = [item for item in typing.get_args(hint) if item is not type(None)]
        if len(kept) == 1:
            return kept[0], True
    return hint, False


def split_annotated(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bare type and its bounds."""
    if typing.get_origin(hint) is Annotated:
        base, *bounds = typing.get_args(hint)
        return base, tuple(bounds)
    return hint, ()


def type_name(hint: Any) -> str:
    """`int`, `float | null`, `list of str`: for the table of keys."""
    hint, optional = split_optional(hint)
    base, _ = split_annotated(hint)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if origin is Literal:
        name = type(arguments[0]).__name__
    elif origin is tuple:
        name = f"{len(arguments)} x {type_name(arguments[0])}"
    elif origin in (list, dict):
        name = f"{origin.__name__} of {type_name(arguments[-1])}"
    else:
        name = "any" if base is Any else base.__name__
    return f"{name} | null" if optional else name


def allowed(hint: Any) -> str:
    """The values that a key takes: `at least 1`, `in [0, 1)`, `flat, mrope`; empty where any of its type will do."""
    hint, _ = split_optional(hint)
    base, bounds = split_annotated(hint)
    if typing.get_origin(base) is Literal:
        return ", ".join(map(str, typing.get_args(base)))
    if any(isinstance(bound, AfterValidator) and bound.func is folder_name for bound in bounds):
        return "a folder's name"
    if typing.get_origin(base) in (list, tuple, dict):
        each = allowed(typing.get_args(base)[-1])
        least = [f"{bound.min_length} or more" for bound in bounds if isinstance(bound, MinLen)]
        return ", ".join([*least, *([f"each {each}"] if each else [])])
    low = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    high = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    if low is None:
        return "finite" if any(isinstance(bound, AllowInfNan) for bound in bounds) else ""
    if high is None:
        return f"at least {low.ge}" if isinstance(low, Ge) else f"above {low.gt}"
    first = f"[{low.ge}" if isinstance(low, Ge) else f"({low.gt}"
    return f"in {first}, " + (f"{high.le}]" if isinstance(high, Le) else f"{high.lt})")


def expectation(hint: Any) -> str:
    """What a value of another type is told to be: `a whole number, at least 1`."""
    inner, optional = split_optional(hint)
    base, _ = split_annotated(inner)
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    origin = typing.get_origin(base)
    kind = words.get(base, "a mapping" if origin is dict else f"a {type_name(inner)}")
    if origin is Literal:
        kind = f"one of {allowed(inner)}"
    elif bounds := allowed(inner):
        kind = f"{kind}, {bounds}"
    return f"{kind}, or null" if optional else kind
