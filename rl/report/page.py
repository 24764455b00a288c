"""Puts a document into the page: one HTML file that loads nothing and may run nothing but its own script.

What comes from a run (prompts above all) travels as JSON in a block that no parser takes for markup, and the
script writes it as text. The content security policy names the script and the style by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

SCRIPTS = (
    "dom.js",
    "chart.js",
    "curves.js",
    "results.js",
    "gallery.js",
    "groups.js",
    "timeline.js",
    "main.js",
)
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def render_page(document: dict[str, Any]) -> str:
    """The whole page as text. Raises ValueError for NaN and infinities, which JSON does not know."""
    script = "'use strict';\n" + "\n".join(_part(name) for name in SCRIPTS)
    style = _part("page.css")
    fields = {
        "title": html.escape("Report: " + ", ".join(run["label"] for run in document["runs"])),
        "policy": f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}",
        "style": style,
        "script": script,
        "data": json_block(document),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], _part("page.html"))


def json_block(document: dict[str, Any]) -> str:
    """JSON that stands safely inside a script element: no character of it can begin or end markup."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


def _part(name: str) -> str:
    return resources.files("rl.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
