"""The rewards `geneval`, `geneval_strict` and `geneval_official`: from pictures to verdicts to a reward's output."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from rewards.base import FatalRewardError, RewardOutput
from rewards.geneval.detection import NO_COLOR, ColorClassifier, ColorQuestion, Detection, Detector
from rewards.geneval.loading import COLOR_RULES, load_colors, load_detector, thread_of
from rewards.geneval.rules import TAGS, GenEvalResult, check_record, evaluate
from rewards.geneval.settings import PUBLISHED_SCALE, DetectorSettings, folder_problems

logger = logging.getLogger(__name__)

CREDITS = ("dense", "strict", "correct", "flow_grpo_compat")
PARTS = ("dense", "strict", "correct")


class GenEval:
    """GenEval's verdict on each image as a reward; metadata are GenEval records.

    `credit` says which verdict is the score (see `GenEvalResult`): `dense` and `strict` in [0, 1], `correct`
    (the official figure), or `flow_grpo_compat`, which goes down to -14. `colors`: `clip` (GenEval's rule, with
    the folder `clip`), `lab` (ours, without CLIP) or `detector` (shapes only). The other parameters are those
    of `DetectorSettings`. Raises ValueError for malformed metadata, FatalRewardError when a model cannot load.
    """

    default_timeout_s = 300.0

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
        self.thread = thread_of(repr(self.settings))

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

    def check_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError for a record that GenEval's rules cannot read."""
        check_record(metadata)

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
        references: Sequence[Sequence[Image.Image]],
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


def judge_images(
    images: Sequence[Image.Image],
    metadata: Sequence[Mapping[str, Any]],
    detector: Detector,
    colors: ColorClassifier,
) -> list[GenEvalResult]:
    """Judge each image by its GenEval record.

    The rules run twice. Which objects they ask about depends on the detections alone, so the first run only
    gathers the questions; all are answered in one call, and the second run reads the answers in turn. Raises
    ValueError for malformed metadata, as `evaluate` does, before any colour is looked at.
    """
    pictures = [image.convert("RGB") for image in images]
    found = list(zip(pictures, metadata, detector.detect(pictures), strict=True))
    questions: list[ColorQuestion] = []
    for picture, record, detections in found:

        def gather(
            class_name: str, objects: Sequence[Detection], picture: Image.Image = picture
        ) -> list[str]:
            questions.extend(ColorQuestion(picture, class_name, detection) for detection in objects)
            return [NO_COLOR] * len(objects)

        evaluate(record, detections, classify_color=gather)
    answers = iter(colors.classify(questions) if questions else [])

    def answer(class_name: str, objects: Sequence[Detection]) -> list[str]:
        return [next(answers) for _ in objects]

    return [evaluate(record, detections, classify_color=answer) for _, record, detections in found]


def check_credit(credit: str) -> str:
    """The credit itself. Raises ValueError when there is none of that name."""
    if credit not in CREDITS:
        raise ValueError(f"credit: {credit!r} is not one of {', '.join(CREDITS)}")
    return credit


def geneval_output(results: Sequence[GenEvalResult], credit: str) -> RewardOutput:
    """Verdicts as scores of the chosen credit, with the other verdicts as components."""
    columns = {name: [float(getattr(result, name)) for result in results] for name in CREDITS}
    return RewardOutput(columns[credit], {name: columns[name] for name in PARTS})


def labelled_output(results: Sequence[GenEvalResult], credit: str, scoring: str) -> RewardOutput:
    """As `geneval_output`, with one for each tag; every component's name begins with `scoring`.

    The component of each of the six tags holds the score of its own samples and None for all others, so its
    mean is the tag's. The prefix keeps the figures of different detectors and colour rules apart in the log.
    """
    plain = geneval_output(results, credit)
    tagged = list(zip((result.tag for result in results), plain.scores, strict=True))
    by_tag = {tag: [score if own == tag else None for own, score in tagged] for tag in TAGS}
    parts = {**plain.components, **by_tag}
    return RewardOutput(plain.scores, {f"{scoring}.{name}": values for name, values in parts.items()})
