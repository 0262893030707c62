"""Channels: which weights of a network number their channels alike, read off its graph.

A `Space` is one numbering of channels. A convolution reads one and writes another; a batch norm, an activation, a
depthwise convolution and a pooling keep it; an addition makes two of them one. What cannot be followed is fixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..attach.adapted import refuse_adapters
from ..core.errors import TargetError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Work channel by channel, and do the same to each: they neither know nor change the numbering.
_SAME_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.ZeroPad2d, nn.Upsample),
)
_SAME_FUNCTIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, torch.clamp, functional.relu, functional.relu6, functional.gelu),
    *(functional.silu, functional.hardswish, functional.dropout, functional.avg_pool2d, functional.max_pool2d),
    *(functional.adaptive_avg_pool2d, functional.leaky_relu, functional.pad),
)
_SAME_METHODS = ("relu", "relu_", "sigmoid", "tanh", "clamp", "clamp_", "contiguous", "float")
_JOINING = (operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul)


@dataclass(eq=False)
class Space:
    """One numbering of channels.

    Args:
        size: channels.
        fixed: why it must stay as it is; "" where it may change.
        writers: layers whose weight has these channels first: they produce them.
        readers: (layer, repeat): layers whose weight has them second, each standing for `repeat` columns in a row.
        keepers: norms and depthwise convolutions, which hold one value or filter per channel.
    """

    size: int
    fixed: str = ""
    writers: list[str] = field(default_factory=list)
    readers: list[tuple[str, int]] = field(default_factory=list)
    keepers: list[str] = field(default_factory=list)
    _same_as: Space | None = None

    def root(self) -> Space:
        """The space this one has become part of."""
        return self if self._same_as is None else self._same_as.root()

    def join(self, other: Space) -> Space:
        """Make two numberings one."""
        a, b = self.root(), other.root()
        if a is b:
            return a
        if a.size != b.size:
            reason = f"an operation joins {a.size} channels with {b.size}"
            a.fixed, b.fixed = a.fixed or reason, b.fixed or reason
            return a
        a.fixed = a.fixed or b.fixed
        a.writers += b.writers
        a.readers += b.readers
        a.keepers += b.keepers
        b._same_as = a
        return a

    def fix(self, reason: str) -> None:
        """Leave this numbering alone, for the first reason given."""
        root = self.root()
        root.fixed = root.fixed or reason


@dataclass(frozen=True)
class _At:
    """Where a tensor's channels are numbered: its space, and columns per channel once it was flattened."""

    space: Space
    repeat: int = 1


def spaces(model: nn.Module, example: Tensor) -> list[Space]:
    """Every numbering of channels in the network.

    Args:
        model: traced by torch.fx, so its forward must not branch on values.
        example: an input, for shapes.

    Raises:
        TargetError: the forward cannot be traced, or weights carry masks, other parametrizations or adapters.
    """
    refuse_adapters(model)
    masked = [n for n, m in model.named_modules() if parametrize.is_parametrized(m)]
    if masked:
        raise TargetError(f"layers {', '.join(masked[:3])} carry masks or parametrizations; call handle.remove() first")
    try:
        traced = fx.symbolic_trace(model)
    except (fx.proxy.TraceError, TypeError) as error:
        raise TargetError(f"the forward of {type(model).__name__} cannot be traced ({error}); prune with regroup=True, "
                          "which needs no graph") from error  # fmt: skip
    return _Reader(traced, model).read(example)


def _rank(value: object) -> int:
    return value.ndim if isinstance(value, Tensor) else 0


class _Reader(fx.Interpreter):
    """Runs the graph once for its shapes, and follows the channels along."""

    def __init__(self, traced: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(traced)
        self.model = model
        self.at: dict[fx.Node, _At] = {}
        self.value: dict[fx.Node, object] = {}
        self.found: list[Space] = []
        self.rules: dict[type, Callable[[fx.Node, str, nn.Module, Tensor], _At]] = {
            **dict.fromkeys(_CONVS, self._conv),
            **dict.fromkeys(_NORMS, self._norm),
            nn.Linear: self._linear,
        }

    def read(self, example: Tensor) -> list[Space]:
        modes = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                self.run(example)
        finally:
            for m, mode in modes:
                m.training = mode
        self._fix_shared()
        unique = {id(s.root()): s.root() for s in self.found}
        return list(unique.values())

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        self.value[n] = out
        if n.op == "output":
            for source in n.all_input_nodes:
                self._fix(source, "the network's output")
        elif isinstance(out, Tensor):
            self.at[n] = self._follow(n, out)
        else:
            for source in n.all_input_nodes:
                self._fix(source, f"{n.name} looks at it")
        return out

    def _follow(self, n: fx.Node, out: Tensor) -> _At:
        sources = [s for s in n.all_input_nodes if s in self.at]
        if n.op == "call_module" and len(sources) == 1:
            module, x = self.model.get_submodule(str(n.target)), self.value[sources[0]]
            rule = self.rules.get(type(module))
            if rule and not (module._forward_pre_hooks or module._forward_hooks):  # hooks may rewrite weights
                return rule(sources[0], str(n.target), module, x)  # type: ignore[arg-type]
            if type(module) is nn.Flatten and module.start_dim == 1:
                return self._flat(sources[0], out)
            if type(module) in _SAME_MODULES:
                return self.at[sources[0]]
        if self._keeps(n, sources, out):
            return self.at[sources[0]]
        if self._flattens(n) and len(sources) == 1:
            return self._flat(sources[0], out)
        if n.op == "call_function" and n.target in _JOINING and sources:
            return self._joined(n, sources, out)
        for s in sources:
            self._fix(s, f"{n.name} is not followed")
        return self._new(out, f"comes from {n.name}" if sources else "the network's input")

    def _keeps(self, n: fx.Node, sources: list[fx.Node], out: Tensor) -> bool:
        if len(sources) != 1:
            return False
        known = n.target in _SAME_FUNCTIONS if n.op == "call_function" else n.target in _SAME_METHODS
        pooled = n.target in (torch.mean, "mean") and out.ndim > 1
        x = self.value[sources[0]]
        same = isinstance(x, Tensor) and x.ndim > 1 and x.shape[:2] == out.shape[:2]
        if pooled and same and n.op in ("call_function", "call_method"):
            dims = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
            dims = dims if isinstance(dims, (tuple, list)) else (dims,)
            return all(isinstance(d, int) and d % x.ndim > 1 for d in dims)  # type: ignore[union-attr]
        return bool(known and same and n.op in ("call_function", "call_method"))

    @staticmethod
    def _flattens(n: fx.Node) -> bool:
        named = n.target in (torch.flatten, "flatten")
        start = n.kwargs.get("start_dim", n.args[1] if len(n.args) > 1 else 0)
        return named and start == 1 and len(n.args) < 3 and "end_dim" not in n.kwargs

    def _flat(self, source: fx.Node, out: Tensor) -> _At:
        at = self.at[source]
        return _At(at.space, at.repeat * (out.shape[1] // max(at.space.root().size * at.repeat, 1)))

    def _joined(self, n: fx.Node, sources: list[fx.Node], out: Tensor) -> _At:
        first = self.at[sources[0]]
        for s in sources[1:]:
            other, value = self.at[s], self.value[s]
            if _rank(value) == _rank(self.value[sources[0]]) > 1 and other.repeat == first.repeat:
                first.space.join(other.space)
            else:
                self._fix(s, f"{n.name} is not followed")
                self._fix(sources[0], f"{n.name} is not followed")
        return first

    def _conv(self, source: fx.Node, name: str, conv: nn.Conv2d, x: Tensor) -> _At:
        at = self.at[source]
        if x.ndim != conv.weight.ndim:
            self._fix(source, f"{name} reads images without a batch")
        if conv.groups == 1 and at.repeat == 1:
            at.space.root().readers.append((name, 1))
            return self._new_space(conv.out_channels, writer=name)
        if conv.groups == conv.in_channels == conv.out_channels:
            at.space.root().keepers.append(name)
            return at
        self._fix(source, f"{name} is a grouped convolution")
        return self._new_space(conv.out_channels, writer=name, fixed=f"{name} is a grouped convolution")

    def _norm(self, source: fx.Node, name: str, norm: nn.BatchNorm2d, x: Tensor) -> _At:
        if self.at[source].repeat > 1:
            self._fix(source, f"{name} comes after flattening")
        self.at[source].space.root().keepers.append(name)
        return self.at[source]

    def _linear(self, source: fx.Node, name: str, linear: nn.Linear, x: Tensor) -> _At:
        at = self.at[source]
        if x.ndim == 2 and at.space.root().size * at.repeat == linear.in_features:
            at.space.root().readers.append((name, at.repeat))
            return self._new_space(linear.out_features, writer=name)
        self._fix(source, f"{name} reads another axis")
        return self._new_space(linear.out_features, writer=name, fixed=f"{name} reads another axis")

    def _new_space(self, size: int, *, writer: str | None = None, fixed: str = "") -> _At:
        space = Space(size, fixed, [writer] if writer else [])
        self.found.append(space)
        return _At(space)

    def _new(self, out: Tensor, fixed: str) -> _At:
        return self._new_space(out.shape[1] if out.ndim > 1 else 1, fixed=fixed)

    def _fix(self, source: fx.Node, reason: str) -> None:
        if source in self.at:
            self.at[source].space.fix(reason)

    def _fix_shared(self) -> None:
        """A parameter that stands in several places, or a layer called twice, cannot follow two numberings."""
        uses: dict[int, list[Space]] = {}
        for space in {id(s.root()): s.root() for s in self.found}.values():
            for name in (*space.writers, *(n for n, _ in space.readers), *space.keepers):
                for p in self.model.get_submodule(name).parameters(recurse=False):
                    uses.setdefault(id(p), []).append(space)
        counted = {id(p): 0 for p in self.model.parameters()}
        for module in self.model.modules():
            for p in module._parameters.values():
                if p is not None:
                    counted[id(p)] += 1
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                for p in self.model.get_submodule(str(node.target)).parameters(recurse=False):
                    counted[id(p)] += 1
        for key, found in uses.items():
            if counted[key] > 2:  # once as a module's own, once as called
                for space in found:
                    space.fix("a weight is used in several places")
