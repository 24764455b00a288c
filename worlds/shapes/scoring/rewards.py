"""The two rewards of the shapes world: GenEval's rules on the detector, and the edit verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import RewardOutput
from rewards.geneval import evaluate
from rewards.geneval.rewards import check_credit, geneval_output
from rewards.geneval.rules import check_record
from worlds.shapes.scenes.edits import Edit
from worlds.shapes.scenes.render import stack
from worlds.shapes.scenes.world import Scene
from worlds.shapes.scoring.components import analyse
from worlds.shapes.scoring.detector import detect
from worlds.shapes.scoring.verifier import EditScore, verify


class GenEvalShapes:
    """GenEval for text-to-image: metadata are GenEval records whose classes are shapes and `background`.

    `credit`: which verdict is the score (see `GenEvalResult`). All lie in [0, 1] but `flow_grpo_compat`,
    which goes down to -14. Raises ValueError for an unknown credit, malformed metadata or a picture of
    another size.
    """

    def __init__(self, credit: str = "dense") -> None:
        self.credit = check_credit(credit)

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError for a record that GenEval's rules cannot read."""
        check_record(metadata)

    def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        results = [
            evaluate(record, item.detections, classify_color=item.classify_color)
            for record, item in zip(metadata, self.find(stack(images)), strict=True)
        ]
        return geneval_output(results, self.credit)

    def find(self, images: np.ndarray) -> Sequence[Any]:
        """What each picture of uint8 [B, H, W, 3] holds: `detections`, and `classify_color` for them."""
        return detect(images)


class EditShapes:
    """The edit verifier: metadata carry the ground truth under `edit`; the source picture is not looked at.

    Scores in [0, 1]; components `instruction` and `preservation`, whose product the score is. Raises
    ValueError for metadata without a sound `edit` or a picture of another size.
    """

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError for metadata without a sound `edit`."""
        Edit.from_json(metadata.get("edit", {}))

    def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        pictures = stack(images)
        edits = [Edit.from_json(record.get("edit", {})) for record in metadata]
        judged = self.judge(pictures, edits)
        return RewardOutput(
            scores=[item.score for item in judged],
            components={
                "instruction": [item.instruction for item in judged],
                "preservation": [item.preservation for item in judged],
            },
        )

    def judge(self, images: np.ndarray, edits: Sequence[tuple[Edit, Scene]]) -> list[EditScore]:
        """Grades of results, uint8 [B, H, W, 3], each by its edit and source scene."""
        return [verify(picture, *edit) for picture, edit in zip(analyse(images), edits, strict=True)]
