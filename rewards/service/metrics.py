"""What a reward service counts, for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class ServiceMetrics:
    """Counters of one service, each with the label `reward` ("" for a request that names none served here)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        one: dict[str, Any] = {"labelnames": ["reward"], "registry": self._registry}
        two: dict[str, Any] = {"labelnames": ["reward", "cause"], "registry": self._registry}
        self.requests = Counter("reward_requests", "Scoring requests that came", **one)
        self.in_flight = Gauge("reward_requests_in_flight", "Requests waiting or being scored", **one)
        self.seconds = Histogram(
            "reward_seconds", "Seconds of a call, with its turn in a queue of calls", buckets=_SECONDS, **one
        )
        self.images = Counter("reward_images", "Images for which the reward gave an answer", **one)
        self.missing = Counter("reward_missing_images", "Images answered by none, nan or inf", **two)
        self.failures = Counter("reward_failures", "Requests that ended without scores", **two)

    def answered(self, label: str, scores: Sequence[float | None], seconds: float) -> None:
        """Count one call of a reward that answered."""
        self.seconds.labels(label).observe(seconds)
        self.images.labels(label).inc(len(scores))
        for score in scores:
            if score is None or not math.isfinite(score):
                cause = "none" if score is None else "nan" if math.isnan(score) else "inf"
                self.missing.labels(label, cause).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
