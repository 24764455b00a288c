"""The judge's questions as versioned text files: reading, checking, and filling in pictures and instruction.

A template file has the sections `[system]` (may be left out), `[user]` and `[again]`, each header on a line of
its own. `{instruction}`, `{source}` and `{result}` in `[user]` stand for the text and the pictures; other
braces are plain text. `[again]` is added to the end when an answer could not be read. A changed template is a
new file with the next version number, since scores of different wordings do not compare.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rewards.judge.messages import Part

FOLDER = Path(__file__).parent / "templates"

PLACES: dict[str, frozenset[str]] = {
    "viescore_edit_sc": frozenset({"instruction", "source", "result"}),
    "viescore_t2i_sc": frozenset({"instruction", "result"}),
    "viescore_pq": frozenset({"result"}),
    "structured_edit": frozenset({"instruction", "source", "result"}),
    "structured_t2i": frozenset({"instruction", "result"}),
    "expected_score_edit": frozenset({"instruction", "source", "result"}),
    "expected_score_t2i": frozenset({"instruction", "result"}),
}
"""What each question shows the judge. PQ sees the result alone, so that wishes do not colour its quality."""

VERSION = "v1"

_HEADER = re.compile(r"^\[(system|user|again)\][ \t]*$", re.MULTILINE)
_PLACE = re.compile(r"\{(instruction|source|result)\}")


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
    ) -> tuple[Part, ...]:
        """The user turn in order. Nothing inside the instruction is taken for a placeholder."""
        pictures = {"source": source, "result": result}
        parts: list[Part] = []
        text = ""
        for index, piece in enumerate(_PLACE.split(self.user)):  # text and place names alternate
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
    sections = _sections(text, f"template {role}: {file}")
    _check_places(role, sections["user"], f"template {role}: {file}")
    return Template(
        name=file.name.removesuffix(".txt"),
        sha256=hashlib.sha256(content).hexdigest(),
        system=sections["system"],
        user=sections["user"],
        again=sections["again"],
    )


def _sections(text: str, where: str) -> dict[str, str]:
    """Section name to its stripped text; `system` is "" when it is left out."""
    before, *rest = _HEADER.split(text)
    names = rest[::2]
    if before.strip():
        raise TemplateError(f"{where}: has text before its first section; begin with [system] or [user]")
    if len(set(names)) != len(names):
        raise TemplateError(f"{where}: sections {names} repeat; write each once")
    found = {"system": ""} | {name: body.strip() for name, body in zip(names, rest[1::2], strict=True)}
    missing = [name for name in ("user", "again") if not found.get(name)]
    if missing:
        raise TemplateError(f"{where}: sections {missing} are missing or empty; write [user] and [again]")
    return found


def _check_places(role: str, user: str, where: str) -> None:
    used, wanted = Counter(_PLACE.findall(user)), PLACES[role]
    if set(used) != wanted:
        raise TemplateError(
            f"{where}: [user] uses {sorted(used)}; {role} shows the judge {sorted(wanted)}, neither more nor less"
        )
    twice = sorted(name for name, number in used.items() if number > 1)
    if twice:
        raise TemplateError(f"{where}: [user] uses {twice} more than once; use each once")
