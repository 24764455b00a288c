"""From the name in a recipe to something that can be called: find it, check its signature, record its source.

Importing this module loads neither torch nor ray; a reward's own imports happen when it is loaded.
"""

import difflib
import hashlib
import importlib
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.base import DEFAULT_TIMEOUT_S, RewardLoadError, RewardSpec, reward_label, spec_problems
from rewards.overlap import OverlappingCalls
from rewards.thread import RewardThread

logger = logging.getLogger(__name__)

BUILTIN_REWARDS: dict[str, str] = {
    "geneval": "rewards.geneval.rewards:GenEval",
    "geneval_strict": "rewards.geneval.rewards:GenEvalStrict",
    "geneval_official": "rewards.geneval.rewards:GenEvalOfficial",
    "judge": "rewards.judge.judge:Judge",
    "editreward": "rewards.editreward.client:EditReward",
    "geneval_shapes": "worlds.shapes.scoring.rewards:GenEvalShapes",
    "edit_shapes": "worlds.shapes.scoring.rewards:EditShapes",
    "geneval_shapes_template": "worlds.shapes.scoring.template:TemplateGenEval",
    "edit_shapes_template": "worlds.shapes.scoring.template:TemplateEdit",
}
"""Names of the built-in rewards. The module behind a name loads when it is used."""

SERVED_REWARD = "rewards.service.client:ServedReward"
"""The client in whose hands a reward with a `service` is."""

PROTOCOL_KEYWORDS = ("images", "prompts", "references", "metadata")
ASKED_KEYWORD = "sources"
"""Given to a reward whose signature names it."""


@dataclass(frozen=True)
class RewardSource:
    """Where a reward came from. `path` and `sha256` (of the file's bytes as executed) are set for files."""

    name: str
    path: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class LoadedReward:
    """A reward ready to be called.

    `function` takes the protocol's keywords, `sources` if `takes_sources`, and `arguments`. `owner` is the instance
    when the reward is a class (the place of the optional `check` and `readiness`), else None. `thread` runs a blocking
    reward, which may share it with others; `overlapping` keeps the time of an async one.
    """

    spec: RewardSpec
    label: str
    source: RewardSource
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    owner: object | None
    takes_sources: bool = False
    thread: RewardThread = field(default_factory=RewardThread, compare=False)
    overlapping: OverlappingCalls = field(default_factory=OverlappingCalls, compare=False)


def load_reward(spec: RewardSpec) -> LoadedReward:
    """Find the reward that `spec` names; a class is instantiated with `spec.params`.

    A served reward is not looked for here: its client is loaded in its place. Raises RewardLoadError when a
    value is out of range, the reference leads nowhere, or the signature cannot take the protocol's keywords.
    """
    problems = spec_problems(spec)
    if problems:
        raise RewardLoadError("\n".join(problems))
    if spec.service is not None:
        return _load_served(spec)
    found, source = _resolve(spec.name)
    loaded = _bind(spec, found, source)
    logger.info("reward %s: %s path=%s sha256=%s", loaded.label, source.name, source.path, source.sha256)
    return loaded


def free_params(name: str) -> frozenset[str]:
    """Parameters of a reward that a resumed run may change: its class lists in `free_params` those that decide what
    a score costs and how it travels, never what it is. Empty for a reward that lists none or cannot be found.
    """
    try:
        found, _ = _resolve(name)
    except RewardLoadError:
        return frozenset()
    return frozenset(getattr(found, "free_params", ()))


def most_references(name: str) -> int | None:
    """How many references of a sample a reward takes, as its class or function states; None for any, and where it
    cannot be found."""
    try:
        found, _ = _resolve(name)
    except RewardLoadError:
        return None
    return getattr(found, "most_references", None)


def default_timeout_s(name: str, params: Mapping[str, Any]) -> float:
    """The time limit of one attempt where a recipe gives none: what the reward states as `default_timeout_s`, a number
    that may follow from its params; else 60 s. What keeps it from being loaded is for `load_reward` to say."""
    try:
        found, _ = _resolve(name)
        owner = found(**params) if inspect.isclass(found) else found
        return float(getattr(owner, "default_timeout_s", DEFAULT_TIMEOUT_S))
    except Exception:  # a reward is foreign code and may raise anything
        return DEFAULT_TIMEOUT_S


def set_problems(specs: Sequence[RewardSpec]) -> list[str]:
    """What is wrong with rewards as a set: nothing to train on, or labels that would overwrite each other."""
    labels = [reward_label(spec) for spec in specs]
    nothing = all(spec.weight == 0 for spec in specs)
    return ["no reward has a weight other than 0; give at least one"] * nothing + [
        f"reward label {label!r} is used {labels.count(label)} times; give each a `label` of its own"
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]


def _load_served(spec: RewardSpec) -> LoadedReward:
    client, _ = _resolve(SERVED_REWARD)
    owner = client(spec)
    logger.info(
        "reward %s: %s is served over HTTP, service.urls: %d", owner.label, spec.name, len(owner.urls)
    )
    return LoadedReward(spec, owner.label, RewardSource(spec.name), owner.score, {}, owner, True)


def _resolve(name: str) -> tuple[Any, RewardSource]:
    """The object behind a reference of any of the three forms."""
    reference = BUILTIN_REWARDS.get(name, name)
    place, colon, attribute = reference.rpartition(":")
    if not colon or not place or not attribute:
        near = difflib.get_close_matches(name, BUILTIN_REWARDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RewardLoadError(
            f"reward {name!r} is not built in: {hint}built-in: {', '.join(sorted(BUILTIN_REWARDS))}; "
            "write your own as 'package.module:function' or 'path/to/file.py:function'"
        )
    if place.endswith(".py"):
        module, source = _load_file(name, Path(place))
    else:
        module, source = _import_module(name, place), RewardSource(name)
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1) or sorted(public)[:5]
        raise RewardLoadError(
            f"reward {name!r}: {place} has no {attribute!r}; it has {', '.join(near) or 'nothing'}"
        )
    return getattr(module, attribute), source


def _import_module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:  # the module's own code may raise anything
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        hint = "; is the package installed, or the working directory its parent?" if missing else ""
        raise RewardLoadError(
            f"reward {name!r}: cannot import {module}: {describe_error(error)}{hint}"
        ) from error


def _load_file(name: str, path: Path) -> tuple[ModuleType, RewardSource]:
    """Execute a reward file. Its bytes are read once, so the logged sha256 is that of the code that runs."""
    try:
        resolved = path.expanduser().resolve(strict=True)
        code = resolved.read_bytes()
    except OSError as error:
        raise RewardLoadError(
            f"reward {name!r}: cannot read {path} from {Path.cwd()}: {error.strerror}; "
            "give a path that every node has, relative to the working directory or absolute"
        ) from error
    sha256 = hashlib.sha256(code).hexdigest()
    identity = hashlib.sha256(f"{resolved}\0{sha256}".encode()).hexdigest()[:16]
    module_name = f"_reward_file_{identity}"
    if module_name not in sys.modules:
        module = ModuleType(module_name)
        module.__file__ = str(resolved)
        sys.modules[module_name] = module  # dataclasses and typing look their module up here
        try:
            exec(compile(code, str(resolved), "exec", dont_inherit=True), module.__dict__)
        except BaseException as error:
            del sys.modules[module_name]
            if not isinstance(error, Exception | SystemExit):
                raise
            raise RewardLoadError(
                f"reward {name!r}: running {path} failed: {describe_error(error)}"
            ) from error
    return sys.modules[module_name], RewardSource(name, str(resolved), sha256)


def _bind(spec: RewardSpec, found: Any, source: RewardSource) -> LoadedReward:
    """Instantiate a class, pick its method, and check that the protocol's keywords fit."""
    if not callable(found):
        raise RewardLoadError(f"reward {spec.name!r} is a {type(found).__name__}; name a function or a class")
    if not inspect.isclass(found):
        asked = _asked(found)
        _check_signature(spec, found, "function", (*PROTOCOL_KEYWORDS, *asked, *spec.params))
        return LoadedReward(spec, reward_label(spec), source, found, spec.params, None, bool(asked))
    _check_signature(spec, found, "constructor", tuple(spec.params))
    try:
        owner = found(**spec.params)
    except Exception as error:  # a constructor may raise anything
        raise RewardLoadError(
            f"reward {spec.name!r}: {found.__name__}({_format_params(spec)}) raised {describe_error(error)}"
        ) from error
    function = getattr(owner, "score", owner)
    if not callable(function):
        raise RewardLoadError(
            f"reward {spec.name!r}: class {found.__name__} has neither `score` nor `__call__`"
        )
    asked, method = _asked(function), "__call__" if function is owner else "score"
    _check_signature(spec, function, f"{found.__name__}.{method}", (*PROTOCOL_KEYWORDS, *asked))
    shared = getattr(owner, "thread", None)
    thread = shared if isinstance(shared, RewardThread) else RewardThread()
    return LoadedReward(spec, reward_label(spec), source, function, {}, owner, bool(asked), thread)


def _asked(function: Callable[..., Any]) -> tuple[str, ...]:
    """What a callable is given beside the protocol's keywords, because its signature names it."""
    try:
        return (ASKED_KEYWORD,) if ASKED_KEYWORD in inspect.signature(function).parameters else ()
    except ValueError:  # some callables written in C carry no signature
        return ()


def _check_signature(
    spec: RewardSpec, function: Callable[..., Any], what: str, keywords: Sequence[str]
) -> None:
    """Refuse a callable that cannot take exactly `keywords` by name."""
    clash = set(spec.params) & {*PROTOCOL_KEYWORDS, ASKED_KEYWORD}
    if clash:
        raise RewardLoadError(
            f"reward {spec.name!r}: params may not hold {sorted(clash)}; the framework gives these"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C carry no signature
        return
    try:
        signature.bind(**dict.fromkeys(keywords))
    except TypeError as error:
        raise RewardLoadError(
            f"reward {spec.name!r}: {what}{signature} does not take {', '.join(keywords) or 'no arguments'} "
            f"by keyword: {error}; its params are {_format_params(spec) or 'empty'}"
        ) from None


def _format_params(spec: RewardSpec) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in spec.params.items())


def describe_error(error: BaseException) -> str:
    """`Type: message (file:line)` of an exception, with the line where it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {error}{place}"
