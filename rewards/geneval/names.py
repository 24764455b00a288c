"""The words of GenEval: the 80 classes of COCO in COCO's order, and ten colours.

Three classes are called otherwise than in COCO (computer mouse, tv remote, computer keyboard), so a detector's
classes are matched by index, never by name.
"""

from __future__ import annotations

from collections.abc import Mapping

CLASS_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

_RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


def class_order_problems(named: Mapping[int, str]) -> list[str]:
    """Which of a model's classes stand at an index where COCO has another one; empty when none does.

    named: class index -> the model's own name. Names that COCO does not know (`motorbike`, `LABEL_3`) say
    nothing about the order and are let pass.
    """
    index = {name: k for k, name in enumerate(CLASS_NAMES)} | {
        coco: CLASS_NAMES.index(name) for coco, name in _RENAMED.items()
    }
    return [
        f"class {k} is called {name!r}, which is COCO's class {index[name]}"
        for k, name in sorted(named.items())
        if name in index and index[name] != k
    ]
