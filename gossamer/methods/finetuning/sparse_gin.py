"""Sparse GIN attention: a small graph network in each layer, whose edges are the pretrained attention's strongest.

Shape suffixes: B sequences, H heads, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core import method
from gossamer.core.errors import BudgetError, TargetError
from gossamer.nn import SparseGIN

NAME = "sparse_gin"


@dataclass(frozen=True)
class GraphTuning:
    """What `sparse_gin` builds: `on(model)` puts a graph network into each of the model's layers."""

    hidden: int
    first: float
    last: float
    dropout: float
    seed: int
    needs: tuple[str, ...] = ()

    def on(self, model: nn.Module) -> Graphs:
        """Freeze a transformers model and give each layer a graph network, which alone learns.

        Raises:
            TargetError: the model has no layers of a known kind, or graph networks already.
        """
        places = list(_places(model))
        if not places:
            raise TargetError(
                "sparse_gin knows layers made as Llama's (self_attn between input_layernorm and "
                f"post_attention_layernorm) or BERT's (attention of self and output); {type(model).__name__} has none"
            )
        if any(hasattr(place.attention, NAME) for place in places):
            raise TargetError("the model has graph networks already; remove() them first")
        handle = Graphs(model, {n: p.requires_grad for n, p in model.named_parameters()}, _implementation(model))
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for n, place in enumerate(places):
                handle.hooks += place.give(self._network(place, n / max(len(places) - 1, 1)))
        _implement(model, "eager")
        return handle

    def _network(self, place: _Place, depth: float) -> SparseGIN:
        scale = self.first + (self.last - self.first) * depth
        gin = SparseGIN(place.width, self.hidden, scale=scale, causal=place.layer is not None, dropout=self.dropout)
        some = next(place.attention.parameters())
        return gin.to(some.device, torch.promote_types(some.dtype, torch.float32)).train(place.attention.training)


class Graphs:
    """The handle on a model that carries graph networks. They are submodules of its attention layers, so
    `model.state_dict()` holds them.

    Args:
        was_trained: for each parameter by name, whether it learnt before.
        implementation: how attention was computed before.
    """

    def __init__(self, model: nn.Module, was_trained: dict[str, bool], implementation: str | None) -> None:
        self.model, self.was_trained, self.implementation = model, was_trained, implementation
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []

    def networks(self) -> dict[str, SparseGIN]:
        """By the name of the attention layer that holds them."""
        return {n.removesuffix(f".{NAME}"): m for n, m in self.model.named_modules() if isinstance(m, SparseGIN)}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer trains."""
        for gin in self.networks().values():
            yield from gin.parameters()

    @property
    def trainable(self) -> int:
        """How many numbers learn."""
        return sum(p.numel() for p in self.parameters())

    def remove(self) -> None:
        """Take the graph networks out: the model is what it was, and learns again what it learnt."""
        for hook in self.hooks:
            hook.remove()
        for name in self.networks():
            delattr(self.model.get_submodule(name), NAME)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.was_trained.get(name, True))
        if self.implementation is not None:
            _implement(self.model, self.implementation)


@dataclass(frozen=True)
class _Place:
    """An attention layer; for layers as Llama's also the one that holds it, whose input is the residual stream."""

    attention: nn.Module
    width: int
    layer: nn.Module | None = None

    def give(self, gin: SparseGIN) -> list[torch.utils.hooks.RemovableHandle]:
        self.attention.add_module(NAME, gin)
        if self.layer is None:
            return [self.attention.register_forward_hook(_after_the_sum)]
        before = self.layer.register_forward_pre_hook(_remember, with_kwargs=True)
        return [before, self.attention.register_forward_hook(_before_the_sum)]


def _places(model: nn.Module) -> Iterator[_Place]:
    for m in model.modules():
        own = dict(m.named_children())
        if {"self_attn", "input_layernorm", "post_attention_layernorm", "mlp"} <= own.keys():
            # Gemma's norms stand elsewhere: what follows attention there is not the sum.
            if "pre_feedforward_layernorm" not in own:
                yield _Place(own["self_attn"], own["input_layernorm"].weight.shape[0], m)  # type: ignore[union-attr, index]
        elif {"self", "output"} <= own.keys() and hasattr(own["output"], "LayerNorm"):
            yield _Place(m, own["output"].LayerNorm.weight.shape[0])  # type: ignore[union-attr, index]


# Hooks know their modules by argument only, so that copies of a model run their own.
def _remember(layer: nn.Module, args: tuple, kwargs: dict) -> None:
    layer.self_attn.stream = args[0] if args else kwargs["hidden_states"]


def _before_the_sum(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    """Llama: the layer adds its input to what attention returns; the graph network sees the sum."""
    y_BTD, attention_BHTT, *rest = output
    x_BTD = attention.__dict__.pop("stream") + y_BTD
    return (y_BTD + _branch(attention, x_BTD, attention_BHTT), attention_BHTT, *rest)


def _after_the_sum(attention: nn.Module, args: tuple, output: tuple) -> tuple:
    """BERT: attention returns the normed sum."""
    y_BTD, attention_BHTT, *rest = output
    return (y_BTD + _branch(attention, y_BTD, attention_BHTT), attention_BHTT, *rest)


def _branch(attention: nn.Module, x_BTD: Tensor, attention_BHTT: Tensor | None) -> Tensor:
    if attention_BHTT is None:
        raise TargetError("attention gave no probabilities to build edges from; set_attn_implementation('eager')")
    if attention_BHTT.shape[-1] != x_BTD.shape[1]:
        raise TargetError(
            f"attention sees {attention_BHTT.shape[-1]} tokens and the layer {x_BTD.shape[1]}: graph networks need all "
            "tokens in one pass, so generate with use_cache=False"
        )
    gin: SparseGIN = getattr(attention, NAME)
    own = gin.down.weight.dtype
    return gin.branch(x_BTD.to(own), attention_BHTT.to(own)).to(x_BTD.dtype)


def _implementation(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _implement(model: nn.Module, name: str) -> None:
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)  # type: ignore[operator]


@method("sparse_gin", paper="arXiv:2501.02393", site="attention", row="P100")
def sparse_gin(
    *, hidden: int = 155, first: float = 0.0, last: float = 0.5, dropout: float = 0.1, seed: int = 0
) -> GraphTuning:
    """Between attention and MLP, let tokens exchange messages along edges of strong attention: x + s·GIN(A, x).

    A = σ(10·(min(Σ_h attention_h, 1) − 0.1)) where that is above 0.6, else 0, so a token hears those to which the
    frozen heads together give 0.14 or more. See `gossamer.nn.SparseGIN` for the network. The scale s starts at `first`
    in the first layer and rises evenly to `last`, so the model changes before the first step; only the networks learn.

    It is no change of a weight, so it cannot be merged: the model keeps the networks, computes attention by "eager",
    and generates without a cache of keys. `sparse_gin(hidden=16).on(model)` returns the handle, whose `parameters()` go
    to the optimizer.

    Args:
        hidden: width of the networks, at least 1; `gossamer.nn.gin.widest` finds it for a number of parameters.
        first, last: s of the first and last layer.
        dropout: in training, of what the networks put out; 0 to 1.
        seed: of the networks' weights.

    Raises:
        BudgetError: hidden or dropout is out of range.

    Example:
        >>> sparse_gin(hidden=16, last=0.3).hidden
        16

    Reference: Buehler, Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers, arXiv:2501.02393.
    Departs from: messages go from each earlier token to later ones. In the official code (by reading) edges are taken
        as (row, column) = (hearer, speaker) where the message passing expects (speaker, hearer), and the causal filter
        after it leaves only those from a token to itself. BERT's layers are served too, with edges both ways, after
        their first norm.
    """
    if hidden < 1 or not 0 <= dropout < 1:
        raise BudgetError(f"sparse_gin needs a width of 1 or more and a dropout below 1, got {hidden} and {dropout}")
    return GraphTuning(hidden, first, last, dropout, seed)
