"""The metric that decides which policy of a run is the best, and so what best/ holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from sage.util.errors import UserError


class Criterion(NamedTuple):
    """The config's `select`: a metric of the evaluations. More is better, unless `less`."""

    metric: str
    less: bool

    @classmethod
    def of(cls, select: str) -> Criterion:
        """Read `select`. A minus sign says that less is better; of a loss, it always is."""
        metric = select.removeprefix("-")
        return cls(metric, metric != select or lower_is_better(metric))

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric's value in an evaluation.

        Raises:
            UserError: the evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise UserError(f"select={self.metric}: no evaluation logs this; they log {', '.join(metrics)}")
        return float(metrics[self.metric])

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far, or the first. NaN and infinity never are."""
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.less else value > best)


def lower_is_better(metric: str) -> bool:
    return metric.endswith("loss")


def is_test(split: str) -> bool:
    """Whether a benchmark's split is one to measure a finished policy on, not to choose a policy by."""
    return split.startswith("test")
