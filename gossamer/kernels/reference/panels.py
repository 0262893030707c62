"""The plain torch twin of products on panels.

Shapes: P panels, K inputs, M outputs, W positions of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.formats import Format
from gossamer.kernels.reference.products import spmm_reference


def panels_reference(
    fmt: Format,
    x_PKW: Tensor,
    bias_M: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """act(W x + b) on panels x [P, K, W], summed in float32, in x's dtype unless `out_dtype` is another.

    Example:
        >>> from gossamer.formats import CSR
        >>> panels_reference(CSR.from_dense(torch.eye(2)), torch.ones(1, 2, 1)).tolist()
        [[[1.0], [1.0]]]
    """
    panels, cols, width = x_PKW.shape
    x_TK = x_PKW.float().transpose(1, 2).reshape(panels * width, cols)
    y_TM = spmm_reference(fmt, x_TK, bias_M, activation)
    return y_TM.view(panels, width, fmt.shape[0]).transpose(1, 2).to(out_dtype or x_PKW.dtype).contiguous()
