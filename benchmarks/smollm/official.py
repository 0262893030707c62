"""The official Wanda and SparseGPT procedures, as their repositories run them, for comparison at equal tokens.

Block by block: catch the first block's inputs; in each block collect every layer's statistics with the whole block
still dense; prune all of its layers; run it again so that the next block sees the pruned one. SparseGPT's block mask
is the official threshold; Wanda sorts each row and cuts the lowest int(columns · sparsity).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.oracles.sparsegpt_naive import naive_sparsegpt


class _Caught(Exception):
    pass


def prune_blocks(model: nn.Module, windows: Tensor, prune_layer: Callable[[nn.Linear, Tensor], Tensor]) -> None:
    """Prune a Llama-style model in place; `prune_layer(layer, gram) -> new weight`."""
    blocks, (inputs, kwargs) = model.model.layers, _catch(model, windows)
    for block in blocks:
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums = {n: [torch.zeros(m.in_features, m.in_features), 0] for n, m in layers.items()}
        hooks = [m.register_forward_pre_hook(_adder(sums[n])) for n, m in layers.items()]
        for x in inputs:
            block(x, **kwargs)
        for hook in hooks:
            hook.remove()
        for n, m in layers.items():
            gram, tokens = sums[n]
            m.weight.data = prune_layer(m, gram / tokens)
        inputs = [_first(block(x, **kwargs)) for x in inputs]


def sparsegpt_layer(layer: nn.Linear, gram: Tensor) -> Tensor:
    """50 % by the official threshold, damping 1 %, blocks of 128."""
    return naive_sparsegpt(layer.weight.data, 2 * gram, density=0.5, threshold=True)


def wanda_layer(layer: nn.Linear, gram: Tensor) -> Tensor:
    """|w|·‖x‖, the lowest half of every row."""
    w = layer.weight.data
    order = (w.abs() * gram.diagonal().sqrt()).sort(dim=-1, stable=True).indices[:, : int(w.shape[1] * 0.5)]
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
        try:
            model(input_ids=ids[None], use_cache=False)
        except _Caught:
            continue
    hook.remove()
    return caught, kwargs


def _adder(sums: list) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        sums[0] += x.T @ x
        sums[1] += len(x)

    return add
