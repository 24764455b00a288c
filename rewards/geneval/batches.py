"""Which images may share a forward pass without changing each other's result."""

from __future__ import annotations

from collections.abc import Sequence


def same_shape_batches(shapes: Sequence[tuple[int, int]], divisor: int, batch_size: int) -> list[list[int]]:
    """Indices of `shapes` (height, width) in batches that pad to one size when each is padded by itself.

    divisor: a padded edge is the next multiple of it.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(shapes):
        padded = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
        groups.setdefault(padded, []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
