"""The floors as drawn for people are those that import-linter holds."""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_drawing_of_the_architecture_is_the_contract() -> None:
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    layers = contract["importlinter:contract:floors"]["layers"].split("\n")
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    drawing = page.split("## Floors")[1].split("```")[1].strip().splitlines()
    drawn = [line[:24].strip() for line in drawing if line[:24].strip("│ ")]
    assert drawn == [layer.strip() for layer in layers if layer.strip()]
