"""The attribute head's scale: as people used it, where a regression draws everything to the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import root

from picinspector.attributes import input_matrix
from training.attribute_head import AttributeHead
from training.builtin.labels import SPAQ_MEAN, SPAQ_SD


@torch.no_grad()
def match_spaq(head: AttributeHead, columns: Mapping[str, np.ndarray], log1p: Sequence[str]) -> None:
    """Scale and shift the attributes' logits so that over these photos they have SPAQ's means and deviations.

    Args:
        head: changed in place.
        columns: of N photos as they are, no degraded ones.
        log1p: columns that go in as log(1 + x).
    """
    attributes = head(torch.from_numpy(input_matrix(columns, tuple(columns), log1p)))[0].double().numpy()
    logits = np.log(attributes / (100.0 - attributes))  # (N, 6)
    for index, (mean, sd) in enumerate(zip(SPAQ_MEAN, SPAQ_SD, strict=True)):
        own = logits[:, index]

        def miss(line: np.ndarray, own: np.ndarray = own, mean: float = mean, sd: float = sd) -> np.ndarray:
            values = 100.0 / (1.0 + np.exp(-(line[0] * own + line[1])))
            return np.array([values.mean() - mean, values.std() - sd])

        slope, shift = root(miss, [1.0, 0.0]).x
        head.regression.weight[index] *= slope
        head.regression.bias[index] = head.regression.bias[index] * slope + shift
