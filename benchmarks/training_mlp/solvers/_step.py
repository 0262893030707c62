"""What solvers share: a step to be timed, a first step to be checked, bytes to be counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.harness.contract import Prepared
from benchmarks.training_mlp import network


def prepared(
    data: network.Start,
    threads: int,
    build: Callable[[network.Start], nn.Sequential],
    *,
    after: Callable[[nn.Sequential], None] = lambda net: None,
    extra: Callable[[nn.Sequential], Iterable[Tensor]] = lambda net: (),
    fused: bool = True,
) -> Prepared:
    """Training of the network that `build` makes; `after` runs between backward and the optimizer's step.

    What is checked is the first step of a second network, made for it and dropped.
    """
    torch.set_num_threads(threads)
    net = build(data)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        network.loss_of(net, data.x_TK, data.y_T).backward()
        after(net)
        optimizer.step()

    def check() -> tuple[Tensor, ...]:
        fresh = build(data)
        loss = network.loss_of(fresh, data.x_TK, data.y_T)
        loss.backward()
        after(fresh)
        return network.gradients(loss, fresh, data)

    return Prepared(run, check, lambda: {"bytes": network.training_bytes(net, optimizer, extra(net))})
