"""Relative importance: an entry is worth its share of its row and of its column, times what it carries.

Shape suffixes: M output rows, K input columns (for convolutions in·kh·kw, in the order of `weight.flatten(1)`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core import Stats
from gossamer.core.stats import statistic


def relative_importance(w: Tensor, stats: Stats, *, power: float = 0.5) -> Tensor:
    """(|w_ij|/Σ_i|w_ij| + |w_ij|/Σ_j|w_ij|)·(√mean x_j²)^power, in float32 and the weight's own shape.

    Args:
        w: weight of rank 2 or more; all axes but the first are input columns.
        stats: needs "input_norm", shape [K].
        power: how much the inputs count; 0 leaves them out.

    Raises:
        CalibrationError: "input_norm" is missing or of another layer; pass calibration data.

    Example:
        >>> relative_importance(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), {"input_norm": torch.ones(2)}).tolist()
        [[0.75, 1.5], [1.0, 0.75]]

    Reference: Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models, ICLR
        2024.
    Departs from: rows and columns of zeros have shares of 0, the official code divides by 0; the paper sums x² over
        tokens, here it is a mean: ranks are the same.
    """
    size_MK = w.detach().float().flatten(1).abs()
    tiny = torch.finfo(torch.float32).tiny
    by_column_MK = size_MK / size_MK.sum(0).clamp(min=tiny)
    by_row_MK = size_MK / size_MK.sum(1, keepdim=True).clamp(min=tiny)
    norm_K = statistic(stats, "input_norm", (size_MK.shape[1],)).to(w.device).float()
    return ((by_column_MK + by_row_MK) * norm_K**power).view(w.shape)
