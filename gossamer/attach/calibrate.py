"""Calibration: one forward pass per batch, all of them paused together at every layer to be pruned.

Each batch runs in a greenlet. When it reaches a target it stops; once all batches wait there, the layer's input
statistics are taken, the layer is pruned, and the passes go on through the pruned layer. So every layer sees what
it will see when deployed, each batch is run exactly once, only one layer's statistics exist at a time, and nothing
is assumed about how a model hands arguments from block to block: its own forward does that.

Shape suffixes: N tokens (or positions), K input columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..core.errors import CalibrationError, NonFiniteError
from ..core.sparsifier import Stats
from .recurrent import RECURRENT
from .targets import Target

# Keys and values of cross-attention in transformers' encoder-decoders: T5, BART and OPT-style, BERT.
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|crossattention).*\.(k|v|k_proj|v_proj|key|value)$")
Batch = Mapping[str, object] | Sequence[object] | Tensor


class _Modes:
    """torch's thread-local modes. Passes share a thread, so each must find its own again when it goes on."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@dataclass(eq=False)
class _Pass:
    """One batch on its way through the model."""

    batch: Batch
    run: greenlet
    at: str | None = None
    x: Tensor | None = None
    modes: _Modes | None = None
    done: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Arrival:
    """A layer that all batches (or all that ever will) have reached.

    Args:
        target: the layer.
        inputs: its input in each batch, any leading axes.
        masks: per batch, which tokens are real (None = all).
    """

    target: Target
    inputs: list[Tensor]
    masks: list[Tensor | None]


def stream(
    model: nn.Module, batches: Iterable[Batch], targets: Sequence[Target], visit: Callable[[Arrival], None]
) -> list[str]:
    """Run every batch through the model once, calling `visit` at each target before it runs.

    Args:
        model: called as model(**batch) for mappings, model(*batch) for tuples and lists, model(batch) otherwise.
        batches: calibration batches; "attention_mask" tells padding from tokens.
        targets: layers to stop at.
        visit: may change the layer's weight; the passes go on with the new one. A layer that a forward calls more
            than once (shared blocks) is visited at its first call only.

    Returns:
        Names of targets that no batch ever reached (such as experts never routed to).

    Raises:
        CalibrationError: no batch was given, or the model's forward fails on one.
    """
    by_name = {t.name: t for t in targets}
    order = {t.name: i for i, t in enumerate(targets)}
    passes = [_start(model, batch) for batch in batches]
    if not passes:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    by_run = {p.run: p for p in passes}
    hooks = [t.module(model).register_forward_pre_hook(_pause(t.name, by_run), with_kwargs=True) for t in targets]
    visited: set[str] = set()
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for p in passes:
                _advance(p, visited)
            while waiting := [p for p in passes if p.at is not None]:
                # Batches may differ in route (experts); definition order keeps early layers first.
                name = min((p.at for p in waiting if p.at), key=order.__getitem__)
                here = [p for p in waiting if p.at == name]
                visit(Arrival(by_name[name], [p.x for p in here], [_mask(p, name) for p in here]))  # type: ignore[misc]
                visited.add(name)
                for p in here:
                    _advance(p, visited)
    finally:
        for hook in hooks:
            hook.remove()
        outer = _Modes()
        for p in passes:
            if not p.run.dead:
                p.run.throw(GreenletExit)
        outer.set()
        for module, mode in training:
            module.training = mode
    return [t.name for t in targets if t.name not in visited]


def _start(model: nn.Module, batch: Batch) -> _Pass:
    def forward() -> None:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)

    return _Pass(batch, greenlet(forward))


def _pause(name: str, by_run: Mapping[greenlet, _Pass]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        current = getcurrent()
        mine = by_run.get(current)
        if mine is None or name in mine.done:
            return
        mine.done.add(name)
        x = args[0] if args else next(iter(kwargs.values()))
        current.parent.switch((name, x))

    return hook


def _advance(p: _Pass, visited: set[str]) -> None:
    """Let one pass run on to the next layer nobody has pruned yet, or to its end."""
    while True:
        p.at, p.x = None, None
        outer = _Modes()
        (p.modes or outer).set()
        try:
            stop = p.run.switch()
            _refuse_inference_mode(p)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"the model's forward failed on a calibration batch ({_describe(p.batch)}): "
                f"{type(error).__name__}: {error}; check that model(**batch) runs by itself"
            ) from error
        finally:
            p.modes = _Modes()
            outer.set()
        if p.run.dead:
            return
        p.at, p.x = stop
        if p.at not in visited:
            return


def _refuse_inference_mode(p: _Pass) -> None:
    if torch.is_inference_mode_enabled():
        p.run.throw(GreenletExit)  # leaves the mode on its way out
        raise CalibrationError(
            "the model's forward (or its caller) runs under inference_mode, whose tensors cannot be written later; "
            "use torch.no_grad there"
        )


def _describe(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(
            f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in batch.items()
        )
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


def _mask(p: _Pass, name: str) -> Tensor | None:
    """Real tokens of this pass's input, flat, if the batch says which they are and the counts agree."""
    if not isinstance(p.batch, Mapping) or p.x is None:
        return None
    # Cross-attention's keys and values read the encoder's states, whatever the decoder's own mask says.
    decodes = "decoder" in name and "decoder_input_ids" in p.batch and not _CROSS.search(name)
    mask = p.batch.get("decoder_attention_mask" if decodes else "attention_mask")
    flat = isinstance(mask, Tensor) and p.x.ndim == 2 and p.x.shape[0] == mask.numel()
    if not isinstance(mask, Tensor) or not (flat or mask.shape == p.x.shape[:-1]):
        return None
    return mask.reshape(-1).bool()


class Collector:
    """Takes a layer's input statistics from an arrival; layers fed by the very same tensors share them.

    q, k and v projections read one tensor: their Gram matrix is computed once.
    """

    def __init__(self, needs: Sequence[str]) -> None:
        self.needs = tuple(needs)
        self._key: tuple[object, ...] = ()
        self._held: list[Tensor] = []
        self._stats: dict[str, Tensor] = {}

    def __call__(self, arrival: Arrival, module: nn.Module) -> Stats:
        """Statistics of the layer's input columns: "input_norm" [K], "gram" [K, K], "tokens".

        input_norm_j = √(mean_n x_nj²);  gram = mean_n x_n x_nᵀ;  both over real tokens, float32.

        Raises:
            NonFiniteError: an activation is NaN or infinite; the message names the layer.
        """
        key = (_geometry(module), *((id(x), x._version) for x in arrival.inputs))
        if key != self._key:
            self._key, self._held, self._stats = (), [], {}  # one layer's statistics at a time
            self._stats = self._measure(arrival, module)
            self._key, self._held = key, arrival.inputs  # held, so that ids are not reused
        return self._stats

    def _measure(self, arrival: Arrival, module: nn.Module) -> dict[str, Tensor]:
        total, sums = 0, dict.fromkeys(self.needs)
        for x, mask in zip(arrival.inputs, arrival.masks):
            x_NK = columns(x, module)
            x_NK = x_NK if mask is None else x_NK[mask.to(x.device)]
            total += len(x_NK)
            for need in self.needs:
                sums[need] = _ADD[need](sums[need], x_NK)
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


_ADD = {"input_norm": _add_square, "gram": _add_gram}
_FINISH = {"input_norm": lambda s, n: (s / n).sqrt(), "gram": lambda s, n: s / n}


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
