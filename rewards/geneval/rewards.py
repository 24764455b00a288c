"""The rewards `geneval`, `geneval_strict` and `geneval_official` for photographs (and the shapes world)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from rewards.base import FatalRewardError, RewardOutput
from rewards.geneval.backend import ColorClassifier, Detector
from rewards.geneval.credits import check_credit, labelled_output
from rewards.geneval.judging import judge_images
from rewards.geneval.loading import COLOR_RULES, load_colors, load_detector
from rewards.geneval.settings import PUBLISHED_SCALE, DetectorSettings, folder_problems

logger = logging.getLogger(__name__)


class GenEval:
    """GenEval's verdict on each image as a reward; metadata are GenEval records.

    `credit` says which verdict is the score (see `GenEvalResult`): `dense` and `strict` in [0, 1], `correct`
    (the official figure), or `flow_grpo_compat`, which goes down to -14. `colors`: `clip` (GenEval's rule, with
    the folder `clip`), `lab` (ours, without CLIP) or `detector` (shapes only). The other parameters are those
    of `DetectorSettings`. Raises ValueError for malformed metadata, FatalRewardError when a model cannot load.
    """

    def __init__(
        self,
        *,
        credit: str = "dense",
        detector: str = "mask2former",
        checkpoint: str | None = None,
        config: str | None = None,
        colors: str = "clip",
        clip: str | None = None,
        device: str = "auto",
        batch_size: int = 16,
        scale: Sequence[int] = PUBLISHED_SCALE,
        trust_checkpoint: bool = False,
    ) -> None:
        self.credit = check_credit(credit)
        self.settings = DetectorSettings(
            backend=detector,
            checkpoint=checkpoint,
            config=config,
            device=device,
            batch_size=batch_size,
            scale=tuple(scale),
            trust_checkpoint=trust_checkpoint,
        )
        self.colors, self.clip = colors, clip

    def check(self) -> list[str]:
        """Problems of the configuration: values, paths, packages. Loads no model."""
        problems = self.settings.problems()
        if self.colors not in COLOR_RULES:
            return [*problems, f"colors is {self.colors!r}; choose one of {', '.join(COLOR_RULES)}"]
        if self.colors == "detector" and self.settings.backend != "shapes":
            problems.append("colors is 'detector', which only detector 'shapes' has; choose clip or lab")
        if self.colors == "clip":
            problems += folder_problems("clip", self.clip)
        elif self.clip is not None:
            problems.append(f"clip is set, which colors {self.colors!r} does not use; leave it out")
        return problems

    def readiness(self) -> list[str]:
        """Load the models in this process, and say in the log which they are."""
        try:
            detector, colors = self._load()
        except FatalRewardError as error:
            return [str(error)]
        logger.info("geneval scores with %s; colours: %s", detector.label, colors.label)
        return []

    def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Image.Image | None],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        """Components `SCORING.PART`: SCORING names detector and colour rule, PART is `dense`, `strict`,
        `correct` or one of the six tags, which holds the score of that tag's samples.
        """
        detector, colors = self._load()
        results = judge_images(images, metadata, detector, colors)
        return labelled_output(results, self.credit, f"{detector.scoring}.{colors.scoring}")

    def _load(self) -> tuple[Detector, ColorClassifier]:
        detector = load_detector(self.settings)
        return detector, load_colors(self.colors, self.clip, self.settings.device)


class GenEvalStrict(GenEval):
    """`GenEval` that pays for exactly the objects asked for, all right, and for nothing less."""

    def __init__(self, **params: Any) -> None:
        super().__init__(credit="strict", **params)


class GenEvalOfficial(GenEval):
    """`GenEval` that pays the official figure, which forgives surplus objects. For evaluation."""

    def __init__(self, **params: Any) -> None:
        super().__init__(credit="correct", **params)
