"""Fuse: find activations that nothing but one linear layer feeds, so that its product can apply them itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..kernels.reference import ACTIVATIONS
from .examples import Example, call, close, tensors


class FusedActivation(nn.Identity):
    """Stands where an activation was that the linear layer before it now applies; keeps it for unpacking.

    Args:
        original: the activation; held outside the module tree, as it has no tensors.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def extra_repr(self) -> str:
        return f"was {type(self.original).__name__}"


@dataclass(frozen=True)
class Fusion:
    """A linear layer and the activation module that only it feeds.

    Args:
        linear: dotted name of the layer.
        module: dotted name of the activation.
        activation: what it computes: "relu", "gelu", "gelu_tanh" or "silu".
    """

    linear: str
    module: str
    activation: str


def find_fusions(model: nn.Module, examples: Sequence[Example], layers: Sequence[str]) -> tuple[Fusion, ...]:
    """Fusions among the named linear layers, each proven on the examples: outputs do not change.

    A parent's forward is traced with its children as leaves; a layer fuses when its one user is an activation
    module with no other user. What cannot be traced is left as it is.
    """
    proposed = tuple(_propose(model, set(layers)))
    if not proposed:
        return ()
    want = [list(tensors(call(model, e))) for e in examples]
    if _holds(model, proposed, examples, want):
        return proposed
    # One of them is wrong: keep those that hold by themselves.
    return tuple(f for f in proposed if _holds(model, (f,), examples, want))


def activation_of(module: nn.Module) -> str | None:
    """Which known function a module computes, by comparing values; None when it is none of them.

    Example:
        >>> activation_of(nn.GELU(approximate="tanh"))
        'gelu_tanh'
    """
    if next(module.children(), None) or next(module.parameters(), None) is not None or list(module.buffers()):
        return None
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64).view(7, 143)
    try:
        with torch.no_grad():
            y = module(x.clone())
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError):
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    # FastGELU's rounded constant moves results by 1e-10; erf and tanh GELU differ by 5e-4.
    near = [name for name, f in ACTIVATIONS.items() if name != "none" and float((f(x) - y).abs().max()) < 1e-7]
    return near[0] if near else None


class _Children(fx.Tracer):
    """Trace one forward, its children unopened."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _propose(model: nn.Module, layers: set[str]) -> Iterator[Fusion]:
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for parent_name, parent in list(model.named_modules()):
        prefix = f"{parent_name}." if parent_name else ""
        children = dict(parent.named_children())
        if not any(prefix + name in layers for name in children):
            continue
        known = {name: activation_of(m) for name, m in children.items() if places[id(m)] == 1}
        if any(known.values()):
            yield from (
                Fusion(prefix + linear, prefix + act, known[act])
                for linear, act in _pairs(parent, known)
                if prefix + linear in layers and places[id(children[linear])] == 1
            )


def _pairs(parent: nn.Module, known: dict[str, str | None]) -> list[tuple[str, str]]:
    try:
        graph = _Children().trace(parent)
    except Exception:  # a forward that cannot be traced may fail in any way; it is only left unfused
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or not known.get(node.target):
            continue
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        if calls[source.target] == 1 and calls[node.target] == 1 and source.target in dict(parent.named_children()):
            found.append((source.target, node.target))
    return found


def _holds(
    model: nn.Module, fusions: Sequence[Fusion], examples: Sequence[Example], want: Sequence[Sequence[Tensor]]
) -> bool:
    with _rehearsed(model, fusions) as counted:
        got = [list(tensors(call(model, e))) for e in examples]
        once_each = all(linear == act for linear, act in counted())
    return once_each and all(close(g, w) for g, w in zip(got, want))


@contextmanager
def _rehearsed(model: nn.Module, fusions: Sequence[Fusion]) -> Iterator[Callable[[], list[tuple[int, int]]]]:
    """Move each activation from its module to its layer's output, by hooks, and count the calls of both."""
    counts: Counter[str] = Counter()
    hooks = []
    originals = {f.module: model.get_submodule(f.module) for f in fusions}
    for f in fusions:
        stand_in = FusedActivation(originals[f.module])
        put(model, f.module, stand_in)
        hooks.append(model.get_submodule(f.linear).register_forward_hook(_applying(f, counts)))
        hooks.append(stand_in.register_forward_hook(_counting(f.module, counts)))
    try:
        yield lambda: [(counts[f.linear], counts[f.module]) for f in fusions]
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in originals.items():
            put(model, name, module)


def _applying(fusion: Fusion, counts: Counter[str]):
    def hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        counts[fusion.linear] += 1
        return ACTIVATIONS[fusion.activation](output)

    return hook


def _counting(name: str, counts: Counter[str]):
    def hook(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        counts[name] += 1

    return hook


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by its dotted name."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).add_module(child, module)


def undo_fusion(model: nn.Module) -> None:
    """Put every activation back where it was."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedActivation):
            put(model, name, module.original)
