"""Activation-aware scores: a weight is worth what it carries.

Shape suffixes: K input columns (for convolutions in·kh·kw, in the order of `weight.flatten(1)`).
"""

from __future__ import annotations

import math

from torch import Tensor

from gossamer.core import Stats
from gossamer.core.stats import statistic


def weight_times_input_norm(w: Tensor, stats: Stats) -> Tensor:
    """|w_ij|·sqrt(mean_t x_tj²), in float32 and the weight's own shape.

    Args:
        w: weight of rank 2 or more; all axes but the first are input columns.
        stats: needs "input_norm", shape [K].

    Raises:
        CalibrationError: "input_norm" is missing or of another layer; pass calibration data.
        NonFiniteError: "input_norm" holds NaN or infinity.

    Reference: Sun et al., Wanda, arXiv:2306.11695.
    Departs from: the paper sums x² over tokens, here it is a mean; ranks are the same.
    """
    norm_K = statistic(stats, "input_norm", (math.prod(w.shape[1:]),)).to(w.device)
    return w.detach().abs().float() * norm_K.float().view(w.shape[1:])
