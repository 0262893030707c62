"""What packing did, layer by layer: measured, chosen, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields


@dataclass(frozen=True)
class Trial:
    """One candidate on one layer.

    Args:
        candidate: format, options and backend, such as "rowgrouped(g=4)/cpu".
        ms: its calls in the examples together, at the fastest twentieth of repeated runs; None where it was refused.
        nbytes: the weight as stored plus what its kernel lays out, in memory.
        refused: why it was not considered; None where it was.
    """

    candidate: str
    ms: float | None
    nbytes: int | None
    refused: str | None = None


@dataclass(frozen=True)
class PackedLayer:
    """One layer that was measured. Its times are undisturbed ones: the fastest twentieth of interleaved runs.

    Args:
        name: dotted module name.
        shape: outputs, inputs; of a convolution the inputs of one pixel, C / groups * kernel.
        density: fraction of the weight kept, in [0, 1].
        structure: what regularity the zeros have, in words.
        tokens: rows of input, or output pixels of a convolution, one entry per call in the examples.
        activation: fused into the chosen product, "none" where there is none.
        dense_ms: torch's own dense product or convolution.
        best_dense_ms: the fastest dense way: of a product torch's or oneDNN's.
        ms: the chosen one.
        format: how the weight is stored now.
        backend: what multiplies it; "torch" where the layer was left as it is.
        bytes_dense: the weight before, in memory.
        bytes_packed: the weight now, with all that its kernel laid out, in memory.
        reason: the choice in words.
        shared_with: the layer of the same shape and structure whose times were taken over, or None.
        trials: every candidate, refused ones with the reason.
        measured_earlier: the times were remembered from an earlier run on this machine.
        kind: "linear", or a convolution with the images it was measured on, such as "conv 3x3 /2 on 1x32x112x112".
    """

    name: str
    shape: tuple[int, int]
    density: float
    structure: str
    tokens: tuple[int, ...]
    activation: str
    dense_ms: float
    best_dense_ms: float
    ms: float
    format: str
    backend: str
    bytes_dense: int
    bytes_packed: int
    reason: str
    shared_with: str | None
    trials: tuple[Trial, ...]
    measured_earlier: bool = False
    kind: str = "linear"

    @property
    def speedup(self) -> float:
        """Best dense time over the chosen time."""
        return self.best_dense_ms / self.ms if self.ms else 1.0

    @property
    def sparse(self) -> bool:
        """True where the weight is stored in a sparse format."""
        return self.format != "dense"


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Args:
        layers: every layer that was measured.
        skipped: layers that were not, with the reason.
        fused: (linear layer, activation) pairs computed together now.
        threads: threads that everything was measured with.
        bytes_before: all parameters and buffers, in memory.
        bytes_after: the same after packing, with all that the kernels laid out.
        bytes_on_disk: tensors as `save` writes them.
        model_ms_before: one pass over the examples, before.
        model_ms_after: the same after packing.
        difference: largest output difference, relative to the largest output.
        seconds: what packing took.
    """

    layers: tuple[PackedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, str], ...]
    threads: int
    bytes_before: int
    bytes_after: int
    bytes_on_disk: int
    model_ms_before: float
    model_ms_after: float
    difference: float
    seconds: float

    @property
    def speedup(self) -> float:
        """Whole passes: time before over time after."""
        return self.model_ms_before / self.model_ms_after

    def counts(self) -> dict[str, int]:
        """How many layers run in each format and backend."""
        found: dict[str, int] = {}
        for layer in self.layers:
            key = f"{layer.format}/{layer.backend}"
            found[key] = found.get(key, 0) + 1
        return found

    def to_dict(self) -> dict[str, object]:
        """JSON-ready, with the derived figures."""
        layers = [{**asdict(layer), "speedup": layer.speedup} for layer in self.layers]
        return {**asdict(self), "layers": layers, "speedup": self.speedup, "counts": self.counts()}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> PackReport:
        """The report that `to_dict` wrote, after its trip through JSON."""
        known = {f.name: record[f.name] for f in fields(cls)}
        known["layers"] = tuple(_layer_from(r) for r in record["layers"])
        return cls(**{**known, **{k: tuple(map(tuple, record[k])) for k in ("skipped", "fused")}})

    def rows(self) -> list[dict[str, object]]:
        """One flat record per layer, for a table."""
        return [
            {
                "layer": r.name,
                "kind": r.kind,
                "shape": f"{r.shape[0]}x{r.shape[1]}",
                "density": r.density,
                "tokens": " + ".join(map(str, r.tokens)),
                "torch ms": r.dense_ms,
                "best dense ms": r.best_dense_ms,
                "ms": r.ms,
                "measured": "earlier" if r.measured_earlier else "now",
                "runs as": f"{r.format}/{r.backend}",
                "bytes": f"{r.bytes_dense} → {r.bytes_packed}",
                "reason": r.reason,
            }
            for r in self.layers
        ]


def _layer_from(record: Mapping[str, object]) -> PackedLayer:
    # Models that were saved by earlier versions do not say all of it.
    known = {f.name: record[f.name] for f in fields(PackedLayer) if f.name in record or f.default is MISSING}
    listed = {k: tuple(record[k]) for k in ("shape", "tokens")}
    return PackedLayer(**{**known, **listed, "trials": tuple(Trial(**t) for t in record["trials"])})
