"""How the inputs and outputs of each layer go together, in the few steps whose support is about to move by it.

Shape suffixes: N samples (times tokens or pixels), M outputs, K input columns as in `weight.flatten(1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.ranks import mean_over_ranks
from .statistics import columns
from .targets import Target, sharers

Parts = dict[str, Tensor]


class Sums:
    """Raw moments of one layer: number, Σx, Σy, Σx², Σy², Σyxᵀ. They add up over passes, and over ranks."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.listening = shape, False
        self.parts: Parts = {}

    def open(self, like: Tensor) -> None:
        """Start from nothing, on the device of `like`. Raw moments cancel, so they are summed in float64."""
        kind = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no other
        zeros = lambda *shape: torch.zeros(shape, dtype=kind, device=like.device)
        m, k = self.shape[0], self.shape[1:].numel()
        # n has a dimension because compiled code takes a scalar on the CPU for a constant.
        self.parts = dict(n=zeros(1), x=zeros(k), y=zeros(m), xx=zeros(k), yy=zeros(m), yx=zeros(m, k))
        self.listening = True

    def close(self) -> None:
        """Let go of everything."""
        self.parts, self.listening = {}, False

    def add(self, x_NK: Tensor, y_NM: Tensor) -> None:
        """One forward pass."""
        kind = self.parts["n"].dtype
        x_NK, y_NM = x_NK.detach().to(kind), y_NM.detach().to(kind)
        with torch.autocast(x_NK.device.type, enabled=False):
            self.parts["yx"].add_(y_NM.t() @ x_NK)
        for name, v in (("x", x_NK), ("y", y_NM)):
            self.parts[name].add_(v.sum(0))
            self.parts[2 * name].add_(v.square().sum(0))
        self.parts["n"].add_(len(x_NK))


def correlation(parts: Mapping[str, Tensor]) -> Tensor:
    """Pearson's correlation of every output with every input column, [M, K], in [−1, 1]; 0 where one is constant.

    c = (Σyxᵀ/n − ȳx̄ᵀ) / √(var y · var x)
    """
    # What rounding leaves of the variance of something constant, seen from the type it was summed in.
    least = 64 * torch.finfo(parts["n"].dtype).eps
    n, x_K, y_M, xx_K, yy_M, yx_MK = (parts[name] for name in ("n", "x", "y", "xx", "yy", "yx"))
    spread = {name: q / n - (s / n).square() for name, s, q in (("x", x_K, xx_K), ("y", y_M, yy_M))}
    flat_MK = (spread["y"] <= least * yy_M / n)[:, None] | (spread["x"] <= least * xx_K / n)
    scale_MK = (spread["y"][:, None] * spread["x"]).clamp(min=0).sqrt()
    c_MK = (yx_MK / n - torch.outer(y_M, x_K) / n.square()) / scale_MK
    return torch.where(flat_MK, 0, c_MK).clamp(-1, 1)


class Activity:
    """Catches the moments of layers while on. Its hooks stay, so that compiled forward passes have them.

    Passes without gradients (evaluation) do not count. Sums are plain attributes: as buffers, DDP would overwrite those
    of every rank with the first one's. Hooks find them on their layer: what a hook alone holds, compiled code takes for
    constant.

    Args:
        original: the parameter behind a target's weight.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], original: Callable[[Target], Tensor]) -> None:
        self.targets, self.original = tuple(targets), original
        self._sums = {t.name: Sums(t.weight(model).shape) for t in targets}
        self._watched: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []
        for t in targets:
            for module, _ in sharers(model, t):
                module._moments = self._sums[t.name]  # type: ignore[assignment]
                self._watched.append(module)
                self._hooks.append(module.register_forward_hook(_watch, with_kwargs=True))

    def on(self) -> None:
        """Catch from the next forward pass on."""
        for t in self.targets:
            self._sums[t.name].open(self.original(t))

    def off(self) -> None:
        """Stop catching and let go of what was caught."""
        for sums in self._sums.values():
            sums.close()

    def take(self) -> dict[str, Tensor]:
        """Correlations by layer, outputs first; over all ranks where several train together."""
        flat = {f"{n} {part}": x for n, sums in self._sums.items() for part, x in sums.parts.items()}
        flat = mean_over_ranks(flat)
        shared = {n: {part: flat[f"{n} {part}"] for part in sums.parts} for n, sums in self._sums.items()}
        seen = {n: parts for n, parts in shared.items() if parts and bool(parts["n"])}
        return {n: correlation(parts).view(self._sums[n].shape) for n, parts in seen.items()}

    def remove(self) -> None:
        """Take the hooks away."""
        self.off()
        for hook in self._hooks:
            hook.remove()
        for module in self._watched:
            del module._moments
        self._hooks, self._watched = [], []


def _watch(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
    if not layer._moments.listening or not torch.is_grad_enabled():  # type: ignore[union-attr]
        return
    x_NK = columns(args[0] if args else kwargs["input"], layer)
    over_pixels = isinstance(layer, (nn.Conv1d, nn.Conv2d))
    y = output.flatten(2).transpose(1, 2) if over_pixels else output
    layer._moments.add(x_NK, y.reshape(len(x_NK), -1))  # type: ignore[union-attr, operator]
