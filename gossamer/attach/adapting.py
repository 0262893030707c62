"""The verb: put adapters on a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..core.errors import TargetError, near
from ..core.registry import get_method
from .adapted import Adapted, put_on, refuse_unfit
from .adapters import Adapters
from .delta import Adapter, Place
from .targets import Target, find


def adapt(
    model: nn.Module,
    method: str | Adapter,
    *,
    name: str = "default",
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    also: Iterable[str] = (),
    keep_zeros: bool = False,
    **options: object,
) -> Adapters:
    """Freeze a model and give its layers a few numbers that learn in the weights' place.

    Args:
        method: a registered name of site "delta" with its `options` ("s2ft", "sara", "lora", ...), or an Adapter.
        name: the adapter's, for switching and fusing.
        targets: glob patterns of layers, "re:" for regular expressions; empty = the method's own.
        skip: layers to leave alone.
        also: glob patterns of parameters that learn beside the deltas, such as a new classifier's.
        keep_zeros: cut every change to the entries that are not 0 now, so that a pruned model stays as sparse. It costs
            the dense weight's gradient.

    Returns:
        The handle: its `parameters()` go to the optimizer; `step()`, `use`, `merge`, `unmerge`, `fuse`, `save`.

    Example:
        >>> adapters = adapt(model, "s2ft", density=0.02)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)  # doctest: +SKIP

    Raises:
        UnknownName: no such method or option.
        TargetError: a pattern matches nothing, a change of a layer would be lost, or the model has adapters already
            (the handle's `add` puts another one beside them).
    """
    _refuse_adapted(model)
    chosen = _adapter(method, options)
    places = _places(model, chosen, tuple(targets), tuple(skip))
    handle = _frozen(model, _named(model, tuple(also)))
    _put(handle, chosen, places, name=name, keep_zeros=keep_zeros, options=options)
    handle.use(name)
    return handle


def load_adapter(model: nn.Module, path: str | Path, *, name: str = "default") -> Adapters:
    """Freeze a model and put on it the adapter that a folder holds, one of `Adapters.save` or a LoRA of peft.

    Raises:
        FileDamaged: a file is missing or altered.
        TargetError: the adapter does not fit the model, or the model carries adapters already (their handle's `load`).
    """
    _refuse_adapted(model)
    handle = _frozen(model, ())
    handle.load(path, name)
    for own in handle.also:
        model.get_parameter(own).requires_grad_(True)
    handle.use(name)
    return handle


def add(
    handle: Adapters,
    method: str | Adapter,
    *,
    name: str,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    keep_zeros: bool = False,
    **options: object,
) -> None:
    """Another adapter beside those that are there; `use` switches to it. See `adapt`."""
    chosen = _adapter(method, options)
    places = _places(handle.model, chosen, tuple(targets), tuple(skip))
    _put(handle, chosen, places, name=name, keep_zeros=keep_zeros, options=options)


def _refuse_adapted(model: nn.Module) -> None:
    if any(isinstance(m, Adapted) for m in model.modules()):
        raise TargetError("the model carries adapters already; call add() of their handle, or remove() them first")


def _frozen(model: nn.Module, also: tuple[str, ...]) -> Adapters:
    handle = Adapters(model, {n: p.requires_grad for n, p in model.named_parameters()}, also)
    model.requires_grad_(False)
    for own in also:
        model.get_parameter(own).requires_grad_(True)
    return handle


def _adapter(method: str | Adapter, options: dict[str, object]) -> Adapter:
    if isinstance(method, str):
        return get_method(method, site="delta")(**options)
    if options:
        raise TargetError(f"an Adapter has its options already; {', '.join(options)} would be ignored, leave them out")
    return method


def _places(model: nn.Module, chosen: Adapter, targets: tuple[str, ...], skip: tuple[str, ...]) -> tuple[Target, ...]:
    """The layers: those named, or the method's own as far as the model has them."""
    named = targets or tuple(t for t in chosen.targets if _matches(model, t))
    if chosen.targets and not named:
        raise TargetError(
            f"the model has none of the layers that {chosen.name!r} changes by default ({', '.join(chosen.targets)}); "
            "name yours with targets="
        )
    found = find(model, named, skip).targets
    for target in found:
        refuse_unfit(model, target)
    return found


def _matches(model: nn.Module, spec: str) -> bool:
    return any(fnmatch.fnmatchcase(name, spec) for name, m in model.named_modules() if hasattr(m, "weight"))


def _put(
    handle: Adapters,
    chosen: Adapter,
    places: tuple[Target, ...],
    *,
    name: str,
    keep_zeros: bool,
    options: dict[str, object],
) -> None:
    handle.refuse_name(name)
    model = handle.model
    where = [Place(model, t.name, i, len(places), keep_zeros) for i, t in enumerate(places)]
    deltas = {t: chosen.make(t.weight(model).detach(), place) for t, place in zip(places, where)}
    for target, delta in deltas.items():
        delta.keep_zeros = keep_zeros
        put_on(model, target, name, delta)
    handle.settings[name] = {"method": chosen.name, "options": options, "keep_zeros": keep_zeros}


def _named(model: nn.Module, specs: tuple[str, ...]) -> tuple[str, ...]:
    known = [n for n, _ in model.named_parameters()]
    for spec in specs:
        if not fnmatch.filter(known, spec):
            raise TargetError(f"also={spec!r} matches none of the model's parameters; {near(spec, known)}")
    return tuple(n for n in known if any(fnmatch.fnmatchcase(n, s) for s in specs))
