"""What must be known beside the weights for a score to mean anything. Saved as `editreward.json` with the model.

Never published for Skywork-EditReward, so the choices are ours (DESIGN section 5): z-scored targets, K dimensions
that one saved rule combines, the text and the picture sizes of training. A folder without this file is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "editreward.json"
FORMAT = 1
COMBINE = ("mean", "min", "geometric_mean")
VIEWS = ("full", "result")
PLACEHOLDER = "{instruction}"
RUBRIC = (
    "The first picture was edited by this instruction: {instruction}\n"
    "The second picture is the result. How well was the instruction carried out, was everything else left as it "
    "was, and how good does the result look?"
)
RESULT_RUBRIC = "How good does this picture look?"


class SettingsError(ValueError):
    """A model folder or a set of constants that cannot be scored with; says which and why."""


@dataclass(frozen=True)
class EditRewardSettings:
    """Constants of one trained model.

    dimensions: names of the K outputs; means, stds: of their training labels, in label units.
    score_low, score_high: the scale of the labels. combine: how K dimensions become one reward.
    view: `full` shows source, result and instruction; `result` shows the result alone (the blur meter to beat).
    rubric: the user text, with `{instruction}` once (for the view `result`: without it).
    chat_template: Jinja, as the tokenizer renders it. min_pixels, max_pixels: of a picture as the model sees it.
    token_pixels: pixels a side of what one image token sees.
    """

    dimensions: tuple[str, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]
    score_low: float
    score_high: float
    combine: str
    view: str
    rubric: str
    chat_template: str
    add_generation_prompt: bool
    min_pixels: int
    max_pixels: int
    token_pixels: int

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise SettingsError("; ".join(problems))

    def problems(self) -> list[str]:
        """Everything that is wrong with these constants, one sentence each."""
        k = len(self.dimensions)
        checks = [
            (k >= 1, "dimensions is empty; name at least one"),
            (len(set(self.dimensions)) == k, f"dimensions repeats a name: {self.dimensions}"),
            (len(self.means) == k == len(self.stds), f"means and stds must have one number for each of {k} dimensions"),
            (all(math.isfinite(m) for m in self.means), f"means must be finite, not {self.means}"),
            (all(math.isfinite(s) and s > 0 for s in self.stds), f"stds must be above 0, not {self.stds}"),
            (self.score_low < self.score_high, f"score range [{self.score_low}, {self.score_high}] is empty"),
            (self.combine in COMBINE, f"combine={self.combine!r} is not one of {', '.join(COMBINE)}"),
            (
                self.combine != "geometric_mean" or self.score_low >= 0,
                f"combine=geometric_mean needs labels that are never negative, but score_low={self.score_low}",
            ),
            (self.view in VIEWS, f"view={self.view!r} is not one of {', '.join(VIEWS)}"),
            (
                self.rubric.count(PLACEHOLDER) == (self.view == "full"),
                f"rubric must hold {PLACEHOLDER} once with view=full and not at all with view=result",
            ),
            (bool(self.chat_template), "chat_template is empty"),
            (0 < self.min_pixels <= self.max_pixels, f"pixels [{self.min_pixels}, {self.max_pixels}] is no range"),
            (self.token_pixels > 0, f"token_pixels={self.token_pixels} must be above 0"),
        ]  # fmt: skip
        return [message for fine, message in checks if not fine]

    # ---- from raw outputs to a reward ---------------------------------------------------------------------

    def label_units(self, raw: Sequence[float]) -> list[float]:
        """The K raw outputs of the model (z-scores) in the units of the labels."""
        if len(raw) != len(self.dimensions):
            raise SettingsError(
                f"{len(raw)} outputs for {len(self.dimensions)} dimensions {self.dimensions}: the server answers "
                "for another model"
            )
        return [m + s * z for z, m, s in zip(raw, self.means, self.stds, strict=True)]

    def combined(self, values: Sequence[float]) -> float:
        """K values in label units as one. A geometric mean takes a negative prediction for 0."""
        if self.combine == "mean":
            return math.fsum(values) / len(values)
        if self.combine == "min":
            return min(values)
        return math.prod(max(0.0, v) for v in values) ** (1 / len(values))

    def score(self, raw: Sequence[float]) -> float:
        """One number in label units from the K raw outputs."""
        return self.combined(self.label_units(raw))

    def reward(self, raw: Sequence[float]) -> float:
        """The score on [0, 1], where 0 and 1 are the ends of the labels' scale; beyond them it is clipped."""
        share = (self.score(raw) - self.score_low) / (self.score_high - self.score_low)
        return min(1.0, max(0.0, share))

    def text(self, instruction: str) -> str:
        """The user text for one instruction (not a format string: braces in it stay as they are)."""
        return self.rubric.replace(PLACEHOLDER, instruction)

    # ---- files --------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, record: Any, where: str) -> EditRewardSettings:
        """Raises SettingsError naming `where` and every missing or unknown key."""
        if not isinstance(record, Mapping):
            raise SettingsError(f"{where}: expected a JSON object, found a {type(record).__name__}")
        if record.get("format") != FORMAT:
            raise SettingsError(
                f"{where}: format {record.get('format')!r} is not {FORMAT}; export the model again"
            )
        known = {f.name for f in fields(cls)}
        missing, unknown = sorted(known - record.keys()), sorted(record.keys() - known - {"format"})
        if missing or unknown:
            raise SettingsError(
                f"{where}: missing keys {missing}, unknown keys {unknown}; without them scores mean nothing, so "
                "export the model again"
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "format"
        }
        try:
            return cls(**values)
        except (SettingsError, TypeError) as error:
            raise SettingsError(f"{where}: {error}") from error


def load_settings(folder: str | Path) -> EditRewardSettings:
    """The constants of a model folder. Raises SettingsError when the file is absent or unusable."""
    path = Path(folder) / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(
            f"{path} does not exist: without its constants scores mean nothing. Make the folder with "
            "`python -m rewards.editreward export`"
        ) from error
    except ValueError as error:
        raise SettingsError(f"{path}: not JSON ({error})") from error
    return EditRewardSettings.from_json(record, str(path))
