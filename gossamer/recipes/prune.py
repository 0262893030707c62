"""prune: make a model sparse in place, in one pass, with or without calibration data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from ..attach.calibrate import Batch
from ..attach.journal import Journal, data_digest
from ..attach.shelf import shelf_of
from ..attach.spool import Spool
from ..attach.spread import tries_out
from ..attach.statistics import without_statistics
from ..attach.targets import Found, find
from ..core.errors import CalibrationError, PatternError, TargetError, UnknownName
from ..core.pattern import Pattern
from ..core.policy import OneShot
from ..core.ranks import ProcessGroup
from ..core.registry import get_method
from ..core.regroup import tied_rows
from ..core.sparsifier import Sparsifier, require_finite
from ..score.trial import Loss, Trial, as_batches
from .allocate import MEASURED, allocate
from .pruning import LayerResult, Progress, Run
from .rebuild import Rebuild, refuse_reconstruction
from .reconstruct import Fitted, Reconstruct


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: a line per layer, every layer left out with the reason, how blocks were reconstructed."""

    method: str
    pattern: str
    layers: tuple[LayerResult, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    blocks: tuple[tuple[str, Fitted], ...] = ()

    @property
    def density(self) -> float:
        """Fraction kept over the pruned layers together."""
        return sum(r.kept for r in self.layers) / max(sum(math.prod(r.shape) for r in self.layers), 1)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {**asdict(self), "density": self.density}


def prune(
    model: nn.Module,
    method: str | Sparsifier,
    *,
    density: float | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    regroup: bool = False,
    sequential: str | None = None,
    reconstruct: Reconstruct | None = None,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    unreached: str = "dense",
    allocation: str | dict[str, float] = "uniform",
    workdir: str | Path | None = None,
    offload: bool = False,
    spool: str | Path | Spool | None = None,
    process_group: ProcessGroup | None = None,
    progress: Progress | None = None,
    **options: object,
) -> PruneReport:
    """Make a model's weights sparse, in place.

    Args:
        method: a registered name (with its `options`), or a Sparsifier.
        density: fraction of weights kept, in [0, 1].
        sparsity: the same said the other way, 1 − density; give one of the two. N:M patterns need neither.
        pattern: a name ("2:4", "4-row", "unstructured") or an expression; default: the method's own.
        regroup: let patterns that tie rows ("4-row", "64:2:8") choose which rows they tie, instead of neighbours;
            keeps more of the score at the same density, and packing finds the groups again.
        sequential: "layer": each layer's statistics are taken after all layers before it were pruned; "block": those of
            a whole block before any of its layers is, which runs each block twice. None: as the method's paper does.
        reconstruct: `Reconstruct()`: once a block's layers are pruned, what they kept is trained until the block gives
            what the dense one gave. Takes `data`, and any method that prunes layer by layer.
        data: calibration batches for methods that need them: mappings are passed as keywords. Methods that go by the
            loss's gradient take pairs (inputs, target), or mappings.
        loss: (output, target) → scalar, for those; None: the model returns it.
        targets: glob patterns of layers ("re:" for regular expressions); empty = all but the output head.
        skip: layers to leave alone.
        unreached: what becomes of layers that no batch reaches, such as experts never routed to: "dense" lists them as
            skipped, "magnitude" scores them by their weights, which their line in the report says.
        allocation: how the density is spread over layers: "uniform", "er", "erk", "sensitivity" or "owl" (measured with
            `data`: one more pass), a method in which layers compete ("snip", with `data` and `loss`: its densities, not
            its choice), or a density per layer name.
        workdir: keep finished layers here; a run that was killed goes on from the last finished layer.
        offload: keep the target weights on disk (in `workdir`) and only the layer at hand in memory.
        spool: keep activations of paused passes in a file in this folder, but for the last used 256 MiB; or a `Spool`
            that keeps another share.
        process_group: processes of torch.distributed that prune the same model together, each with its own `data`:
            statistics are summed over them, so that all prune alike.
        progress: called with (layer, done, total).

    Returns:
        A report; the model itself is changed.

    Raises:
        UnknownName: no such method or option.
        PatternError: a layer does not fit the pattern; all such layers are listed.
        CalibrationError: the method needs data and none was given, or the model fails on it.
        NonFiniteError: a weight or an activation is NaN or infinite; the layer is named.

    Example:
        >>> report = prune(model, "wanda", density=0.5, pattern="2:4", data=batches)  # doctest: +SKIP
    """
    began = time.perf_counter()
    sparsifier = _sparsifier(method, density, sparsity, pattern, options)
    sparsifier = replace(sparsifier, regroup=True) if regroup else sparsifier
    order = _order(sparsifier, sequential)
    if unreached not in ("dense", "magnitude"):
        raise UnknownName(f"unreached is 'dense' or 'magnitude', got {unreached!r}")
    found = _leave_out(model, find(model, tuple(targets), tuple(skip)), sparsifier)
    _check_fit(model, found, sparsifier)
    tried = tries_out(sparsifier, allocation)
    _check_group(sparsifier, allocation, spool, process_group, workdir)
    _check_shelf(model, found, sparsifier, tried or allocation == "sensitivity", workdir, offload)
    if data is not None:
        data = list(as_batches(data) if tried else data)
    if sparsifier.needs and not data:
        raise CalibrationError(f"method {sparsifier.name!r} scores weights by data; pass data= (calibration batches)")
    if offload and workdir is None:
        raise TargetError("offload keeps weights on disk and needs to know where; pass workdir=")
    if offload and any(t.weight(model).device.type != "cpu" for t in found.targets):
        raise TargetError("offload maps weights from files, which only a model on the CPU can use; call model.cpu()")
    trial = Trial.of(data, loss) if tried and data is not None else None
    per_layer = allocate(
        model, found.targets, sparsifier, allocation, data=data, trial=trial, progress=progress, workdir=workdir
    )
    run_of = {
        "options": {k: repr(v) for k, v in sorted(options.items())},
        "sequential": order,
        "unreached": unreached,
        "data": data_digest(data),
    }
    if reconstruct is not None:
        refuse_reconstruction(sparsifier, data, offload)
        if spool or process_group is not None or shelf_of(model) is not None:
            raise TargetError(
                "reconstruct= trains blocks of a model in memory, in one process; leave spool= and process_group= out"
            )
        run_of["reconstruct"] = repr(reconstruct)
    journal = Journal(workdir, _identity(model, found, sparsifier, per_layer) | run_of) if workdir is not None else None
    spool = Spool(spool) if isinstance(spool, (str, Path)) else spool
    run = Run(model, found.targets, per_layer, journal, offload, progress, spool, process_group)
    rebuild = Rebuild(run, reconstruct, order) if reconstruct is not None else None
    if rebuild is not None:
        missed = rebuild(data)
    elif sparsifier.probe:
        missed = run.together(sparsifier, trial)
    else:
        missed = run.with_data(data, order) if sparsifier.needs else run.without_data(sparsifier)
    missed = run.by_magnitude(missed) if unreached == "magnitude" else missed
    if run.shelf is not None:
        run.shelf.close()
    skipped = (*found.skipped, *((n, "no calibration batch reached it; left dense") for n in missed))
    fits = tuple(rebuild.fits.items()) if rebuild is not None else ()
    return PruneReport(
        sparsifier.name, _words(sparsifier), tuple(run.results), skipped, time.perf_counter() - began, fits
    )


def _sparsifier(
    method: str | Sparsifier,
    density: float | None,
    sparsity: float | None,
    pattern: str | None,
    options: dict[str, object],
) -> Sparsifier:
    if density is not None and sparsity is not None:
        raise TargetError(f"density={density} and sparsity={sparsity} say the same thing; give one of the two")
    if sparsity is not None:
        density = 1.0 - sparsity
    if isinstance(method, Sparsifier):
        extra = [*options, *(["pattern"] if pattern is not None else [])]
        if extra:
            raise TargetError(
                f"a Sparsifier has its options already; {', '.join(extra)} would be ignored, leave them out"
            )
        return _one_shot(method if density is None else method.at_density(density))
    given = {"density": density, "pattern": pattern}
    return _one_shot(get_method(method)(**{k: v for k, v in given.items() if v is not None}, **options))


def _one_shot(sparsifier: Sparsifier) -> Sparsifier:
    if not isinstance(sparsifier.policy, OneShot):
        raise TargetError(
            f"method {sparsifier.name!r} chooses its support while the model trains; use gossamer.attach(model, ...) "
            "and handle.step()"
        )
    if sparsifier.scope == "model" and sparsifier.needs and not sparsifier.probe:
        raise TargetError("one pool over the whole model needs all statistics at once; use scope='layer'")
    return sparsifier


def _order(sparsifier: Sparsifier, sequential: str | None) -> str:
    """What is seen dense while statistics are taken."""
    if sequential is not None and (not sparsifier.needs or sparsifier.probe):
        raise TargetError(
            f"method {sparsifier.name!r} takes no statistics of a layer's inputs, so sequential={sequential!r} means "
            "nothing to it; leave it out"
        )
    if sequential not in (None, "layer", "block"):
        raise UnknownName(f"sequential is 'layer' or 'block', got {sequential!r}")
    return sequential or sparsifier.sequential


def _leave_out(model: nn.Module, found: Found, sparsifier: Sparsifier) -> Found:
    """Layers whose inputs have no column statistics stay dense where the method needs them, and are listed."""
    if not sparsifier.needs or sparsifier.probe:
        return found
    reasons = {t: without_statistics(t.module(model)) for t in found.targets}
    kept = tuple(t for t, reason in reasons.items() if reason is None)
    left = tuple((t.name, reason) for t, reason in reasons.items() if reason is not None)
    if not kept:
        raise TargetError(f"no layer can be scored by its inputs: {left[0][0]}: {left[0][1]}; use method 'magnitude'")
    return Found(kept, (*found.skipped, *left))


def _check_fit(model: nn.Module, found: Found, sparsifier: Sparsifier) -> None:
    """Everything that can be refused is refused before any weight changes."""
    problems = []
    for t in found.targets:
        w = t.weight(model)
        if w.is_meta and shelf_of(model) is None:
            raise TargetError(f"layer {t.name!r} is on the meta device and has no values; load the weights first")
        if not w.is_meta:
            require_finite(w, f"the weight of layer {t.name!r}")
        try:
            (tied_rows if sparsifier.regroup else Pattern.place)(sparsifier.pattern, w.shape)
        except PatternError as error:
            problems.append(f"{t.name} {tuple(w.shape)}: {error}")
    if problems:
        raise PatternError(
            f"{len(problems)} of {len(found.targets)} layers do not fit; pass skip= to leave them dense:\n  "
            + "\n  ".join(problems[:20])
        )


def _check_group(
    sparsifier: Sparsifier, allocation: object, spool: object, group: object, workdir: str | Path | None
) -> None:
    """Only what streams batches through the model can spool them, or share them out over processes."""
    if (spool or group) and (not sparsifier.needs or sparsifier.probe):
        raise TargetError(f"method {sparsifier.name!r} streams no batches, so spool= and process_group= mean nothing")
    if group is not None and (allocation in MEASURED or workdir is not None):
        raise TargetError(
            "processes of a group measure no allocation together, and keep no workdir, for each might stop at another "
            "layer; leave these out"
        )


def _check_shelf(
    model: nn.Module, found: Found, sparsifier: Sparsifier, whole: bool, workdir: str | Path | None, offload: bool
) -> None:
    """A model on disk has one block in memory: what needs all of it, or a place for results, is said first."""
    shelf = shelf_of(model)
    if shelf is None:
        return
    if whole or sparsifier.scope == "model":
        raise TargetError(
            f"method {sparsifier.name!r} with this allocation looks at all layers at once, which a model on disk does "
            "not have in memory; take a method that goes layer by layer and allocation='uniform', 'erk' or 'owl'"
        )
    if workdir is None or offload:
        raise TargetError(
            "a model on disk keeps finished layers in workdir=, which it needs, and has no use for offload="
        )
    shelf.check(found.targets)


def _words(sparsifier: Sparsifier) -> str:
    return f"{sparsifier.pattern}{', rows regrouped' if sparsifier.regroup else ''}"


def _identity(
    model: nn.Module, found: Found, sparsifier: Sparsifier, per_layer: dict[str, Sparsifier]
) -> dict[str, object]:
    return {
        "method": sparsifier.name,
        "pattern": _words(sparsifier),
        "layers": {
            t.name: {"shape": list(t.weight(model).shape), "budget": repr(per_layer[t.name].budget)}
            for t in found.targets
        },
    }
