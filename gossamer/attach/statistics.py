"""Statistics of a layer's inputs, taken where calibration pauses: column norms, means, variances and Gram matrices.

Shape suffixes: N tokens (or positions), K input columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError, NonFiniteError
from ..core.ranks import ProcessGroup, least_over_ranks, sum_over_ranks
from ..core.sparsifier import Stats
from .calibrate import Arrival
from .recurrent import RECURRENT


class Collector:
    """Takes a layer's input statistics from an arrival; layers fed by the very same tensors share them.

    q, k and v projections read one tensor: their Gram matrix is computed once.

    Args:
        needs: which statistics.
        group: processes whose batches count together: sums and counts are added up over them.
    """

    def __init__(self, needs: Sequence[str], group: ProcessGroup | None = None) -> None:
        self.needs, self.group = tuple(needs), group
        self._key: tuple[object, ...] = ()
        self._inputs: list[weakref.ref[Tensor]] = []  # weak, so that nothing outlives its pass
        self._stats: dict[str, Tensor] = {}

    def __call__(self, arrival: Arrival, module: nn.Module) -> Stats:
        """Statistics of the layer's input columns, as asked for, and "tokens".

        "input_norm" [K] = √(mean_n x_nj²); "input_mean" [K] and "input_var" [K], E[x²] − E[x]²; "gram" [K, K] =
        mean_n x_n x_nᵀ; all over real tokens, float32.

        Raises:
            NonFiniteError: an activation is NaN or infinite; the message names the layer.
        """
        key = (_geometry(module), *(x._version for x in arrival.inputs))
        known = (key == self._key and self._seen(arrival.inputs)) if arrival.inputs else bool(self._stats)
        if self.group is not None:  # ranks share statistics all together or not at all
            known = bool(least_over_ranks(int(known), self.group))
        if not known:
            self._key, self._inputs, self._stats = (), [], {}  # one layer's statistics at a time
            self._stats = self._measure(arrival, module)
            self._key, self._inputs = key, [weakref.ref(x) for x in arrival.inputs]
        return self._stats

    def _seen(self, inputs: Sequence[Tensor]) -> bool:
        return len(inputs) == len(self._inputs) and all(r() is x for r, x in zip(self._inputs, inputs))

    def _measure(self, arrival: Arrival, module: nn.Module) -> dict[str, Tensor]:
        total, sums = 0, dict.fromkeys(self.needs)
        for x, mask in zip(arrival.inputs, arrival.masks):
            x_NK = columns(x, module)
            x_NK = x_NK if mask is None else x_NK[mask.to(x.device)]
            total += len(x_NK)
            for need in self.needs:
                sums[need] = _ADD[need](sums[need], x_NK)
        if self.group is not None:
            w = arrival.target.turned(module.weight)  # type: ignore[arg-type]
            none_0K = w.new_zeros(0, w.shape[1:].numel())
            sums = {need: _ADD[need](value, none_0K) for need, value in sums.items()}  # zeros where no batch came
            sums = {need: sum_over_ranks(value, self.group) for need, value in sums.items()}
            total = int(sum_over_ranks(torch.tensor(total), self.group))
        stats = {need: _FINISH[need](value, max(total, 1)) for need, value in sums.items()}
        for need, value in stats.items():
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"activations into layer {arrival.target.name!r} are NaN or infinite ({need}); "
                    "check the calibration data, or run the model in float32"
                )
        return {**stats, "tokens": torch.tensor(total)}


def _geometry(module: nn.Module) -> tuple[object, ...]:
    """What decides which columns a layer makes of its input: layers that agree in it may share statistics."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return ()
    return type(module), module.kernel_size, module.stride, module.padding, module.dilation


def _add_square(total: Tensor | None, x_NK: Tensor) -> Tensor:
    square_K = torch.linalg.vector_norm(x_NK, dim=0, dtype=torch.float32).square()
    return square_K if total is None else total.add_(square_K)


def _add_gram(total: Tensor | None, x_NK: Tensor) -> Tensor:
    x_NK = x_NK.float()
    gram_KK = x_NK.t() @ x_NK
    return gram_KK if total is None else total.add_(gram_KK)


def _add_sum(total: Tensor | None, x_NK: Tensor) -> Tensor:
    sum_K = x_NK.sum(0, dtype=torch.float64)
    return sum_K if total is None else total.add_(sum_K)


def _add_moments(total: Tensor | None, x_NK: Tensor) -> Tensor:
    """Sums of x and of x², [2, K], in float64: a variance is the difference of two large numbers."""
    square_K = torch.linalg.vector_norm(x_NK, dim=0, dtype=torch.float64).square()
    moments_2K = torch.stack([x_NK.sum(0, dtype=torch.float64), square_K])
    return moments_2K if total is None else total.add_(moments_2K)


def _variance(moments_2K: Tensor, tokens: int) -> Tensor:
    mean_K, square_K = moments_2K / tokens
    return (square_K - mean_K.square()).clamp(min=0).float()


_ADD = {"input_norm": _add_square, "input_mean": _add_sum, "input_var": _add_moments, "gram": _add_gram}
_FINISH = {
    "input_norm": lambda s, n: (s / n).sqrt(),
    "input_mean": lambda s, n: (s / n).float(),
    "input_var": _variance,
    "gram": lambda s, n: s / n,
}


def without_statistics(module: nn.Module) -> str | None:
    """Why a layer's input has no column statistics; None when it has."""
    if isinstance(module, RECURRENT):
        return "the weights of a recurrent layer meet hidden states, which calibration does not see"
    if isinstance(module, nn.Conv3d):
        return "statistics of 3-D convolutions are not collected"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None
    if module.groups != 1:
        return "a grouped convolution has one input per group, so it has no single column statistic"
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return f"padding {module.padding!r} in mode {module.padding_mode!r} has no column statistic"
    return None


def columns(x: Tensor, module: nn.Module) -> Tensor:
    """A layer's input as rows of what its weight multiplies: x_NK, in the order of weight.flatten(1).

    Raises:
        CalibrationError: the layer has no column statistics (`without_statistics` says why).
    """
    if reason := without_statistics(module):
        raise CalibrationError(f"{reason}; skip it, or prune it by magnitude")
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(-1, x.shape[-1])
    flat = isinstance(module, nn.Conv1d)
    lead = (lambda first, rest: (first, *rest)) if flat else (lambda first, rest: rest)
    cols_BKL = torch.nn.functional.unfold(
        x.unsqueeze(-2) if flat else x,
        lead(1, module.kernel_size),
        dilation=lead(1, module.dilation),
        padding=lead(0, module.padding),
        stride=lead(1, module.stride),
    )
    return cols_BKL.transpose(1, 2).reshape(-1, cols_BKL.shape[1])
