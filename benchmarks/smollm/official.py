"""The official Wanda and SparseGPT procedures, as their repositories run them, for comparison at equal tokens.

Block by block: catch the first block's inputs; in each block collect every layer's statistics with the whole block
still dense; prune all of its layers; run it again so that the next block sees the pruned one. SparseGPT's block mask
is the official threshold; Wanda sorts each row and cuts the lowest int(columns · sparsity).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from torch import Tensor, nn

from tests.oracles.sparsegpt_naive import naive_sparsegpt


class _Caught(Exception):
    pass


def prune_blocks(model: nn.Module, windows: Tensor, name: str) -> None:
    """Prune a Llama-style model in place: "wanda" collects squared norms, "sparsegpt" Gram matrices."""
    add, prune_layer = {"wanda": (_add_squares, wanda_layer), "sparsegpt": (_add_gram, sparsegpt_layer)}[name]
    blocks, (inputs, kwargs) = model.model.layers, _catch(model, windows)
    for block in blocks:
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums: dict[str, list] = {n: [0.0, 0] for n in layers}
        hooks = [m.register_forward_pre_hook(_adder(sums[n], add)) for n, m in layers.items()]
        for x in inputs:
            block(x, **kwargs)
        for hook in hooks:
            hook.remove()
        for n, m in layers.items():
            total, tokens = sums[n]
            m.weight.data = prune_layer(m, total / tokens)
        inputs = [_first(block(x, **kwargs)) for x in inputs]


def sparsegpt_layer(layer: nn.Linear, gram: Tensor) -> Tensor:
    """50 % by the official threshold, damping 1 %, blocks of 128."""
    return naive_sparsegpt(layer.weight.data, 2 * gram, density=0.5, threshold=True)


def wanda_layer(layer: nn.Linear, squares: Tensor) -> Tensor:
    """|w|·‖x‖, the lowest half of every row."""
    w = layer.weight.data
    order = (w.abs() * squares.sqrt()).sort(dim=-1, stable=True).indices[:, : int(w.shape[1] * 0.5)]
    return w.scatter(1, order, 0.0)


def _first(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _catch(model: nn.Module, windows: Tensor) -> tuple[list[Tensor], dict[str, object]]:
    caught: list[Tensor] = []
    kwargs: dict[str, object] = {}

    def stop(module: nn.Module, args: tuple[Tensor, ...], given: dict[str, object]) -> None:
        caught.append(args[0] if args else given.pop("hidden_states"))
        kwargs.update(given)
        raise _Caught

    hook = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for ids in windows:
        with suppress(_Caught):  # the first block's arguments are all that is wanted
            model(input_ids=ids[None], use_cache=False)
    hook.remove()
    return caught, kwargs


def _add_squares(total: Tensor | float, x: Tensor) -> Tensor:
    return total + x.square().sum(0)


def _add_gram(total: Tensor | float, x: Tensor) -> Tensor:
    return total + x.T @ x


def _adder(
    sums: list, more: Callable[[Tensor | float, Tensor], Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        sums[0] = more(sums[0], x)
        sums[1] += len(x)

    return add
