"""GenEval: the rules that turn detections into a verdict, free of any detector."""

from rewards.geneval.clauses import ClassifyColor
from rewards.geneval.detection import RELATIONS, Detection, relations
from rewards.geneval.rules import TAGS, GenEvalResult, evaluate
from rewards.geneval.summary import GenEvalSummary, TagSummary, summarize

__all__ = [
    "RELATIONS",
    "TAGS",
    "ClassifyColor",
    "Detection",
    "GenEvalResult",
    "GenEvalSummary",
    "TagSummary",
    "evaluate",
    "relations",
    "summarize",
]
