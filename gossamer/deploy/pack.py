"""pack: measure every layer on its own shape, and give each the format and kernel that was fastest."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..core.errors import BudgetError, DispatchError, TargetError
from .candidates import FEWEST_ZEROS, Candidate, automatic, named
from .earlier import measured_or_recalled
from .examples import Example, as_list, call, difference, tensors
from .fuse import FusedActivation, Fusion, find_fusions, put
from .layers import Layer, find_layers, matrix_of, packed_layers, refuse_masks
from .look import Look
from .measure import Measured, Work, choose, memory_of
from .record import PackedLayer, PackReport
from .structure import Structure, density_of, detect
from .tensors import disk_bytes, memory_bytes
from .timing import last_level_cache, median, torch_threads

Progress = Callable[[str, int, int], None]


def pack(
    model: nn.Module,
    example: Example | Sequence[Example],
    *,
    candidates: Sequence[str] | None = None,
    repeats: int = 9,
    threads: int | None = None,
    min_gain: float = 1.0,
    fuse: bool = True,
    inplace: bool = False,
    remeasure: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Store each layer in the format, and run it on the kernel, that measured fastest on its own shape.

    Layers are `nn.Linear`, transformers' `Conv1D`, and `nn.Conv1d` to `nn.Conv3d`. Plan → measure → swap: one pass
    learns every layer's number of tokens, or the images a convolution sees; each candidate is checked against
    torch's dense layer, then timed in turn with the others; layers where dense wins stay dense. Layers of one
    shape, structure and density (to 1 %) share one measurement, and the machine remembers it: packing such layers
    again measures nothing, and the report says "measured earlier".

    Args:
        example: what the model will be called with: a mapping (keywords), a tuple (arguments) or a tensor; a list
            of several, such as [prompt, one token], counts the sum of their times.
        candidates: choose among these only: "csr", "rowgrouped(g=4)/cpu", "dense/onednn"; an error if none of
            them can run a layer. Layers with fewer than 10 % zeros are then left as they are unless a dense
            candidate is named. Convolutions have one dense way, torch's, whichever is named.
        repeats: rounds of measuring, at least 1.
        threads: threads to measure with; torch's setting when None.
        min_gain: sparse only where the best dense time is at least this many times the sparse one.
        fuse: let the products apply the activations that follow them.
        inplace: change the model itself instead of a copy.
        remeasure: measure also what this machine remembers, as every benchmark must.
        progress: called with (layer, done, total).

    Returns:
        The packed model, in eval mode. `report_of(packed)` tells what was done and why.

    Raises:
        TargetError: masks are still attached, the model has nothing to pack, or is on `meta`.
        NonFiniteError: a weight holds NaN or infinity; the layer is named.
        DispatchError: named candidates cannot run a layer; the reasons are listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
        >>> packed = pack(model, torch.randn(32, 64))  # doctest: +SKIP
        >>> report_of(packed).counts()  # doctest: +SKIP
        {'dense/onednn': 1}
    """
    if repeats < 1 or min_gain <= 0:
        raise BudgetError(f"repeats must be at least 1 and min_gain above 0, got {repeats} and {min_gain}")
    refuse_masks(model)
    examples = as_list(example)
    if packed_layers(model):
        raise TargetError("this model is packed already; call gossamer.unpack(model) first")
    began = time.perf_counter()
    model = (model if inplace else copy.deepcopy(model)).eval()
    with torch_threads(threads) as count:
        packed, report = _Packing(model, examples, candidates, repeats, min_gain, remeasure, progress).run(fuse)
    report = replace(report, threads=count, seconds=time.perf_counter() - began)
    packed.__dict__["gossamer_report"] = report
    return packed


def report_of(model: nn.Module) -> PackReport:
    """What packing did to this model.

    Raises:
        TargetError: the model did not come from `pack`.
    """
    report = model.__dict__.get("gossamer_report")
    if report is None:
        raise TargetError(f"this {type(model).__name__} has no packing report; it comes with gossamer.pack(model, ...)")
    return report


class _Packing:
    """One call of `pack`."""

    def __init__(
        self,
        model: nn.Module,
        examples: list[Example],
        candidates: Sequence[str] | None,
        repeats: int,
        min_gain: float,
        remeasure: bool,
        progress: Progress | None,
    ) -> None:
        self.model, self.examples, self.specs = model, examples, candidates
        self.repeats, self.min_gain, self.remeasure, self.progress = repeats, min_gain, remeasure, progress
        self.known: dict[tuple[Look, tuple[Candidate, ...]], tuple[str, Measured, bool]] = {}
        self.lines: list[PackedLayer] = []
        self.skipped: list[tuple[str, str]] = []
        self.fused: list[tuple[str, str]] = []
        self.cold = False

    def run(self, fuse: bool) -> tuple[nn.Module, PackReport]:
        if self.specs is not None:
            named(self.specs, ())  # a mistyped name is refused before anything runs
        layers, skipped = find_layers(self.model, self.examples)
        self.skipped += skipped
        if not layers:
            raise TargetError(_nothing_to_pack(skipped))
        want, before_ms = self._outputs(), self._pass_ms()
        bytes_before = memory_bytes(self.model)
        names = [layer.name for layer in layers if layer.name]
        fusions = {f.linear: f for f in find_fusions(self.model, self.examples, names)} if fuse else {}
        self.cold = sum(_bytes(layer.weight(self.model)) for layer in layers) > last_level_cache()
        for done, layer in enumerate(layers, 1):
            self._one(layer, fusions.get(layer.name))
            if self.progress is not None:
                self.progress(layer.name, done, len(layers))
        worst = difference(self._outputs(), want)
        report = PackReport(
            layers=tuple(self.lines),
            skipped=tuple(self.skipped),
            fused=tuple(self.fused),
            threads=0,
            bytes_before=bytes_before,
            bytes_after=memory_bytes(self.model),
            bytes_on_disk=disk_bytes(self.model),
            model_ms_before=before_ms,
            model_ms_after=self._pass_ms(),
            difference=worst,
            seconds=0.0,
        )
        return self.model, report

    def _outputs(self) -> list[Tensor]:
        return [t for e in self.examples for t in tensors(call(self.model, e))]

    def _pass_ms(self) -> float:
        times, until = [], time.perf_counter() + 0.5
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 15):
            began = time.perf_counter()
            for example in self.examples:
                call(self.model, example)
            times.append((time.perf_counter() - began) * 1e3)
        return median(times).ms

    def _one(self, layer: Layer, fusion: Fusion | None) -> None:
        module, w_MK = layer.module(self.model), layer.weight(self.model)
        with torch_threads(1):  # many small steps, where threads would wait for each other longer than they work
            density, structures = density_of(w_MK), detect(w_MK, layer.taps(self.model))
        allowed = self._allowed(density, structures, layer)
        if not allowed:
            self.skipped.append((layer.name, f"{1 - density:.0%} zeros, and only sparse candidates were named"))
            return
        work = layer.work(self.model, fusion.activation if fusion else "none")
        kind = layer.kind(self.model)
        look = Look(
            kind,
            tuple(w_MK.shape),
            str(w_MK.dtype),
            layer.tokens,
            module.bias is not None,
            work.activation,
            structures,
            round(100 * density),
        )
        shared, measured, earlier = self._measured(layer, look, work, allowed)
        words = structures[0].name if structures else f"{1 - density:.0%} zeros"
        try:
            choice = choose(measured, allowed, self.min_gain, words, 1 - density)
        except DispatchError as error:
            raise DispatchError(f"layer {layer.name!r}, {layer.tokens[0]} tokens: {error}") from None
        winner = next(c for c in allowed if str(c) == choice.winner.candidate)
        nbytes = self._swap(layer, winner, fusion, work)
        line = PackedLayer(
            name=layer.name,
            kind=kind,
            shape=tuple(w_MK.shape),
            density=density,
            structure=words,
            tokens=layer.tokens,
            activation="none" if winner.backend == "dense" else work.activation,
            dense_ms=choice.dense_ms,
            best_dense_ms=choice.best_dense_ms,
            ms=choice.winner.ms,
            format=winner.format,
            backend="torch" if winner.backend == "dense" else winner.backend,
            bytes_dense=_bytes(w_MK),
            bytes_packed=nbytes,
            reason=choice.reason,
            shared_with=shared,
            trials=measured.trials,
            measured_earlier=earlier,
        )
        self.lines.append(line)

    def _allowed(self, density: float, structures: tuple[Structure, ...], layer: Layer) -> tuple[Candidate, ...]:
        dense = layer.dense
        if self.specs is None:
            return automatic(density, structures, min(layer.tokens), dense)
        chosen = named(self.specs, structures)
        sparse = tuple(c for c in chosen if c.format != "dense" and 1 - density >= FEWEST_ZEROS)
        if layer.images and any(c.format == "dense" for c in chosen):
            return (*dense, *sparse)
        return (*(c for c in chosen if c.format == "dense"), *sparse)

    def _measured(
        self, layer: Layer, look: Look, work: Work, allowed: tuple[Candidate, ...]
    ) -> tuple[str | None, Measured, bool]:
        # Densities that round to one percent may lie on both sides of what makes sparse candidates worth measuring.
        key = look, allowed
        if key in self.known:
            return self.known[key]
        measured, earlier = measured_or_recalled(
            look, work, (*work.dense, *allowed), self.repeats, cold=self.cold, remeasure=self.remeasure
        )
        self.known[key] = (layer.name, measured, earlier)
        return None, measured, earlier

    def _swap(self, layer: Layer, winner: Candidate, fusion: Fusion | None, work: Work) -> int:
        """Put the packed layer in; a plain torch layer needs none. Returns its bytes in memory."""
        if winner.backend == "dense":
            return _bytes(layer.weight(self.model))
        packed = layer.packed(self.model, winner, work)
        if fusion is not None:
            put(self.model, fusion.module, FusedActivation(self.model.get_submodule(fusion.module)))
            self.fused.append((fusion.linear, fusion.activation))
        if layer.name:
            put(self.model, layer.name, packed)
        else:
            self.model = packed
        return memory_of(matrix_of(packed).plan)


def _bytes(w: Tensor) -> int:
    return w.numel() * w.element_size()


def _nothing_to_pack(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return "this model has no linear layer and no convolution; nothing here can be packed"
    return "no layer can be packed: " + "; ".join(f"{n}: {r}" for n, r in skipped[:5])
