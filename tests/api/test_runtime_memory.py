"""What compiled networks write into and keep: float32 whatever torch's defaults are, plans within their bytes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_runtime import CLOSE, Block, Encoder, encoder_call, thin
from torch import nn

import gossamer
from gossamer.deploy.timing import torch_threads
from gossamer.kernels.dense import onednn_refusal
from gossamer.runtime.shelf import Shelf


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_torchs_default_dtype_has_no_say(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Half of the weights are kept: where products are dense is measured, and so both ways run.
    models = [(thin(Encoder(), 0.5), encoder_call(2, 9)), (thin(Block(), 0.5), {"x": torch.randn(2, 3, 32, 32)})]
    wanted = [model(**call) for model, call in models]
    torch.set_default_dtype(dtype)
    try:
        got = [gossamer.compile(model, call)(**call) for model, call in models]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, wanted, **CLOSE)


def put(shelf: Shelf, key: str, *sizes: int) -> list:
    plans = [SimpleNamespace(nbytes=size) for size in sizes]
    for plan in plans:
        shelf.put(key, plan)
    return plans


def test_plans_at_rest_keep_to_their_bytes() -> None:
    shelf = Shelf(each=4, keys=3, nbytes=100)
    plans = put(shelf, "a", 60, 30, 60)
    assert len(shelf) == 2 and shelf.nbytes == 90 and shelf.take("a") is plans[2]
    put(shelf, "b", 500)
    assert len(shelf) == 1 and shelf.nbytes == 500, "the last one stays, however large"
    put(shelf, "c", 10, 10)
    assert len(shelf) == 2 and shelf.nbytes == 20 and shelf.take("a") is None and shelf.take("b") is None
    for key in "defg":
        put(shelf, key, 10)
    assert len(shelf) == 3 and shelf.nbytes == 30 and shelf.take("d") is None


@torch.no_grad()
def test_plans_count_their_tables() -> None:
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * torch.arange(1000.0).cos()[:, None]

    fast = gossamer.compile(Scaled(8, 8).eval(), torch.randn(2, 1000, 8))
    ((plan,),) = fast._shelf._plans.values()
    assert plan.nbytes - plan.arena.nbytes - plan.scratch.nbytes >= 4000 and fast._shelf.nbytes == plan.nbytes


@pytest.mark.skipif(onednn_refusal(torch.float32) is not None, reason="nothing is measured without a dense rival")
@torch.no_grad()
def test_dense_products_are_measured_for_the_positions_there_are() -> None:
    with torch_threads(1):  # with more, plans for one thread are measured as well
        fast = gossamer.compile(nn.Linear(12, 12).eval(), torch.randn(8, 64, 12))
        fast(torch.randn(32, 1, 12))  # as many panels, by filling up
    (weights,) = fast._weights.values()
    assert len(weights._fastest) == 2
