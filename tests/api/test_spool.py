"""Activations on disk: the same bits, less memory, and nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.attach.spool import Spool
from gossamer.core.errors import TargetError

transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    torch.manual_seed(0)
    size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(64, (2, 40), generator=g)} for _ in range(4)]


@pytest.mark.parametrize(("method", "sequential"), [("sparsegpt", "layer"), ("wanda", "block")])
@pytest.mark.parametrize("keep", [0, 60_000])
def test_spooled_is_in_memory_to_the_bit(method: str, sequential: str, keep: int, tmp_path: Path) -> None:
    near, far = llama(), llama()
    how = dict(density=0.5, data=batches(), sequential=sequential)
    gossamer.prune(near, method, **how)
    spool = Spool(tmp_path, keep=keep, least=1)
    gossamer.prune(far, method, **how, spool=spool)
    assert spool.written > 0
    assert all(torch.equal(w, far.state_dict()[n]) for n, w in near.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    assert all(bool(w.isfinite().all()) for w in far.state_dict().values())


class Remembers(nn.Module):
    """Keeps a table that all passes share and change, and takes views of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.table = nn.Linear(64, 64), nn.Linear(64, 64), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.zeros(64, 64)
        half = x[:, :32]
        x = self.first(x)
        self.table[0] += x[0].sum()
        x = self.second(x + self.table.t()[0]) + half.repeat(1, 2)
        return x.relu_()


def test_memory_that_passes_share_view_and_change_survives(tmp_path: Path) -> None:
    near = Remembers()
    far = copy.deepcopy(near)
    data = [torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    for model, spool in ((near, None), (far, Spool(tmp_path, keep=0, least=1))):
        gossamer.prune(model, "sparsegpt", density=0.5, data=data, spool=spool)
    assert torch.equal(near.table, far.table) and bool(near.table.any())
    assert torch.equal(near.second.weight, far.second.weight)


def test_memory_stays_within_what_is_kept(tmp_path: Path) -> None:
    spool, most = Spool(tmp_path, keep=300_000, least=1), []
    x = torch.randn(100, 100)
    with spool:
        held = []
        for i in range(40):
            with spool.passing():
                held.append(x * i)  # 40 kB each
            most.append(sum(t.untyped_storage().nbytes() for t in held))
        assert all(torch.equal(t, x * i) for i, t in enumerate(held))
    assert max(most) <= 300_000 + 80_000
    assert sum(t.untyped_storage().nbytes() for t in held) == 1_600_000  # all back at the end


def test_where_nothing_is_streamed_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="streams no batches"):
        gossamer.prune(llama(), "magnitude", density=0.5, spool=tmp_path)
