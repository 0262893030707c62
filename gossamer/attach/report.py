"""What a handle tells of its layers while they train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .meter import Flops


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Args:
        kept, size: entries of the support, and of the weight.
        grown: links that the last change of the support brought in.
        moved: links that came or went in all changes together: Σ_t |m_t − m_{t−1}|, the SAD of arXiv:2102.04010.
        dead_outputs: output neurons or channels with every incoming link pruned.
        dead_inputs: inputs with every outgoing link pruned.
    """

    name: str
    kept: int
    size: int
    grown: int = 0
    moved: int = 0
    dead_outputs: int = 0
    dead_inputs: int = 0

    @property
    def density(self) -> float:
        """Fraction kept."""
        return self.kept / max(self.size, 1)

    @property
    def churn(self) -> float:
        """Share of the kept links that came in with the last change."""
        return self.grown / max(self.kept, 1)


@dataclass(frozen=True)
class TrainingReport:
    """All layers, and the work done so far. Iterates over its layers; `print` shows a table."""

    method: str
    steps: int
    layers: tuple[LayerReport, ...]
    flops: Flops

    @property
    def density(self) -> float:
        """Fraction kept over all layers together."""
        return sum(r.kept for r in self) / max(sum(r.size for r in self), 1)

    @property
    def churn(self) -> float:
        """Share of all kept links that came in with the last change."""
        return sum(r.grown for r in self) / max(sum(r.kept for r in self), 1)

    @property
    def sad(self) -> int:
        """Links that came or went since the start, over all layers (sparse architecture divergence)."""
        return sum(r.moved for r in self)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers with nothing kept: whatever feeds on them alone sees a constant."""
        return tuple(r.name for r in self if r.size and not r.kept)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerReport:
        return self.layers[index]

    def __str__(self) -> str:
        wide = max([5, *(len(r.name) for r in self)])
        head = f"{'layer':<{wide}}  {'kept':>9}  {'density':>7}  {'churn':>6}  dead out/in"
        rows = [
            f"{r.name:<{wide}}  {r.kept:>9}  {r.density:>7.4f}  {r.churn:>6.1%}  {r.dead_outputs}/{r.dead_inputs}"
            for r in self
        ]
        work = self.flops.forward + self.flops.backward
        spent = f"{work:.3g} of {self.flops.dense:.3g} FLOPs dense ({self.flops.share:.1%})"
        lost = [f"collapsed, nothing kept: {', '.join(self.collapsed)}"] if self.collapsed else []
        return "\n".join([f"{self.method}, step {self.steps}: density {self.density:.4f}, {spent}", head, *rows, *lost])


def dead(kept: Tensor, groups: int) -> tuple[int, int]:
    """(outputs without a link, inputs without one) of a support with outputs first; inputs are counted per group."""
    outputs = kept.flatten(1).any(1)
    inputs = kept.reshape(groups, kept.shape[0] // groups, kept.shape[1], -1).any(3).any(1)
    return int((~outputs).sum()), int((~inputs).sum())
