"""The judge's questions as versioned text files: reading, checking, and filling in pictures and instruction.

A template file has the sections `[system]` (may be left out), `[user]` and `[again]`, each header on a line of
its own. `{instruction}`, `{source}` and `{result}` in `[user]` stand for the text and the pictures; other
braces are plain text. Lines of `-----` around `{instruction}` are sent with 16 hex digits of the request's own, so that
no instruction closes them. `[again]` is added to the end when an answer could not be read. A changed template is a new
file with the next version number, since scores of different wordings do not compare.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "templates"

PLACES: dict[str, set[str]] = {
    "viescore_edit_sc": {"instruction", "source", "result"},
    "viescore_t2i_sc": {"instruction", "result"},
    "viescore_pq": {"result"},
    "structured_edit": {"instruction", "source", "result"},
    "structured_t2i": {"instruction", "result"},
    "expected_score_edit": {"instruction", "source", "result"},
    "expected_score_t2i": {"instruction", "result"},
}
"""What each question shows the judge. PQ sees the result alone, so that wishes do not colour its quality."""

VERSION = "v1"

_HEADER = re.compile(r"^\[(system|user|again)\][ \t]*$", re.MULTILINE)
_PLACE = re.compile(r"\{(instruction|source|result)\}")
_FENCED = re.compile(r"^-----\n\{instruction\}\n-----$", re.MULTILINE)


class TemplateError(ValueError):
    """A template file that cannot be used; the text names the file and what to change."""


@dataclass(frozen=True)
class Template:
    """One question. name: file name without `.txt`, so with its version. sha256: of the file's bytes."""

    name: str
    sha256: str
    system: str
    user: str
    again: str

    def parts(
        self, *, instruction: str, source: Image.Image | None, result: Image.Image, again: bool
    ) -> tuple[str | Image.Image, ...]:
        """The user turn in order. Nothing inside the instruction is taken for a placeholder or for the fence around it:
        the fence is a hash over the instruction, which no text can hold of itself; and it is the same for the same
        question, so that answers are found in the cache."""
        fence = (
            f"-----{hashlib.sha256(f'{self.sha256} {instruction}'.encode(errors='replace')).hexdigest()[:16]}"
        )
        user = _FENCED.sub(f"{fence}\n{{instruction}}\n{fence}", self.user)
        pictures = {"source": source, "result": result}
        parts: list[str | Image.Image] = []
        text = ""
        for index, piece in enumerate(_PLACE.split(user)):  # text and place names alternate
            picture = pictures.get(piece) if index % 2 else None
            if picture is not None:
                parts += [text.strip(), picture]
                text = ""
            else:
                text += instruction if index % 2 else piece
        if again:
            text = f"{text.strip()}\n\n{self.again}"
        return tuple(part for part in [*parts, text.strip()] if part != "")


def load_template(role: str, path: str | None = None) -> Template:
    """The packaged template of a role (a key of `PLACES`), or the recipe's own file for it.

    Raises TemplateError, naming the file.
    """
    file = FOLDER / f"{role}.{VERSION}.txt" if path is None else Path(path).expanduser()
    try:
        content = file.read_bytes()
        text = content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(
            f"template {role}: cannot read {file} from {Path.cwd()}: {error}; "
            "give a UTF-8 file that every node has"
        ) from error
    before, *rest = _HEADER.split(text)
    sections = dict(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))
    problem = _problem(role, before, rest[::2], sections)
    if problem:
        raise TemplateError(f"template {role}: {file}: {problem}")
    return Template(
        name=file.name.removesuffix(".txt"),
        sha256=hashlib.sha256(content).hexdigest(),
        system=sections.get("system", ""),
        user=sections["user"],
        again=sections["again"],
    )


def _problem(role: str, before: str, names: Sequence[str], sections: Mapping[str, str]) -> str:
    """What is wrong with a file's text before its sections, their names as written, or their texts; "" for nothing."""
    if before.strip():
        return "has text before its first section; begin with [system] or [user]"
    if len(sections) != len(names):
        return f"sections {names} repeat; write each once"
    missing = [name for name in ("user", "again") if not sections.get(name)]
    if missing:
        return f"sections {missing} are missing or empty; write [user] and [again]"
    used, wanted = Counter(_PLACE.findall(sections["user"])), PLACES[role]
    if set(used) != wanted:
        return f"[user] uses {sorted(used)}; {role} shows the judge {sorted(wanted)}, neither more nor less"
    twice = sorted(name for name, number in used.items() if number > 1)
    return f"[user] uses {twice} more than once; use each once" if twice else ""
