"""The scores of an evaluation on disk: one line per scored batch, each score tied to the bytes of its picture.

The file's name carries the hash of the reward and its parameters, so another judge starts another file beside it.
What could not be scored is written down with its cause, and asked for again by the next run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.files import atomic_write_text
from core.records import append_records, read_records


@dataclass(frozen=True)
class ImageScore:
    """What the reward found on picture `k` of an item. `values` has no `score` where there is none."""

    key: str
    k: int
    sha256: str
    values: Mapping[str, float]


class ScoreStore:
    """Append-only; later lines replace earlier ones."""

    def __init__(self, folder: Path, scoring_sha256: str):
        self.path = folder / f"scores_{scoring_sha256[:12]}.jsonl"
        self._found: dict[tuple[str, int], ImageScore] = {}
        if not self.path.exists():
            return
        records = read_records(self.path)
        for record in records:
            for row in record["images"]:
                self._take(ImageScore(row["key"], row["k"], row["sha256"], row["values"]))
        # A torn last line would run into the next one that is appended.
        atomic_write_text(
            self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        )

    def get(self, key: str, k: int, sha256: str) -> Mapping[str, float] | None:
        """What is known of this very picture; None for nothing."""
        found = self._found.get((key, k))
        return found.values if found is not None and found.sha256 == sha256 else None

    def scored(self, key: str, k: int, sha256: str) -> bool:
        """Whether this very picture has a score."""
        return "score" in (self.get(key, k, sha256) or {})

    @property
    def empty(self) -> bool:
        """Whether not a single picture has a score."""
        return not any("score" in found.values for found in self._found.values())

    def add(self, batch: int, scores: Sequence[ImageScore], failures: Mapping[str, int]) -> None:
        """Keep the scores of one batch. failures: missing scores by cause, as the reward worker counts them."""
        rows = [{"key": s.key, "k": s.k, "sha256": s.sha256, "values": dict(s.values)} for s in scores]
        append_records(self.path, [{"batch": batch, "failures": dict(failures), "images": rows}])
        for score in scores:
            self._take(score)

    def _take(self, score: ImageScore) -> None:
        self._found[score.key, score.k] = score
