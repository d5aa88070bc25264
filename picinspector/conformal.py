"""Prediction intervals that hold what they promise: split conformal prediction from held-out errors.

Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World" (2005); Lei et al., "Distribution-Free Predictive
Inference for Regression" (2018). Mondrian: each bin of the prediction has errors of its own, so that an interval is as
wide as the scorer errs at that score. Lower and upper bound are calibrated apart, for errors are skewed at the ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_BINS = 5
#: Rows a bin needs before it gets one of its own: the 5 % tail of fewer is the one or two largest errors.
_ROWS_PER_BIN = 60


@dataclass(frozen=True)
class Intervals:
    """How far labels lie from predictions, by bin of the prediction; in the predictions' scale.

    Attributes:
        coverage: share of photos like those it was calibrated on whose label lies inside, at least; 0-1.
        edges: (K - 1,) predictions at which the next bin starts, ascending.
        low, high: (K,) what to add to a prediction; `low` <= 0 <= `high`, infinite where too few rows were there.
    """

    coverage: float
    edges: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.low) == len(self.high) == len(self.edges) + 1:
            raise ValueError(f"{len(self.low)} lows and {len(self.high)} highs for {len(self.edges) + 1} bins")

    def around(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lower and the upper bound of each of N predictions: (N,), (N,)."""
        bins = np.searchsorted(np.asarray(self.edges), predicted, side="right")
        return predicted + np.asarray(self.low)[bins], predicted + np.asarray(self.high)[bins]

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for infinite."""
        finite = {
            name: [round(value, 6) if np.isfinite(value) else None for value in getattr(self, name)]
            for name in ("low", "high")
        }
        return {"method": "split conformal", "coverage": self.coverage, "edges": list(self.edges), **finite}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Intervals:
        """What `to_json` gave. Raises KeyError, TypeError or ValueError where it is something else."""
        low = tuple(-np.inf if value is None else float(value) for value in content["low"])
        high = tuple(np.inf if value is None else float(value) for value in content["high"])
        return cls(float(content["coverage"]), tuple(float(edge) for edge in content["edges"]), low, high)


def calibrate(predicted: np.ndarray, labels: np.ndarray, coverage: float = 0.9, bins: int = _BINS) -> Intervals:
    """Intervals from the errors on rows that the model was not fitted on.

    With rows set aside, the coverage is guaranteed for photos drawn as they were. With out-of-fold predictions it is
    the cross-conformal variant (Vovk 2015; CV+ of Barber et al. 2021), which keeps it in practice.

    Args:
        predicted, labels: (N,) in one scale.
        coverage: share of labels inside, 0-1.
        bins: at most this many, equally full.
    """
    predicted, labels = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    count = int(np.clip(len(labels) // _ROWS_PER_BIN, 1, bins))
    edges = np.unique(np.quantile(predicted, np.arange(1, count) / count)) if len(labels) else np.zeros(0)
    bin_of_row = np.searchsorted(edges, predicted, side="right")
    tail, low, high = (1 - coverage) / 2, [], []
    for index in range(len(edges) + 1):
        errors = np.sort((labels - predicted)[bin_of_row == index])
        # The k-th smallest error from either end: the next photo's lies beyond it with probability k / (n + 1).
        rank = int(np.floor((len(errors) + 1) * tail + 1e-9))
        low.append(min(0.0, float(errors[rank - 1])) if rank else -np.inf)
        high.append(max(0.0, float(errors[-rank])) if rank else np.inf)
    return Intervals(coverage, tuple(edges.tolist()), tuple(low), tuple(high))
