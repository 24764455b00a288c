"""GenEval: the rules that turn detections into a verdict, free of any detector."""

from rewards.geneval.detection import RELATIONS, Detection, relations
from rewards.geneval.rules import TAGS, GenEvalResult, evaluate

__all__ = ["RELATIONS", "TAGS", "Detection", "GenEvalResult", "evaluate", "relations"]
