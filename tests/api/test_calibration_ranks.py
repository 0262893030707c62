"""Two processes with half of the batches each prune as one process with all of them, and fine-tune in shards."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import gossamer
from gossamer.attach import hold
from gossamer.core.errors import TargetError

transformers = pytest.importorskip("transformers")

RANKS = 2
METHODS = {"sparsegpt": "layer", "wanda": "block", "dsnot": "block"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.twin, self.b = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)) * self.twin(x)) + self.experts[which](x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, which: int) -> Tensor:
        for block in self.blocks:
            x = block(x, which)
        return x


def batches() -> list[tuple[Tensor, int]]:
    """The first half goes to one rank and takes expert 0; of the second half one batch takes expert 1; none takes 2."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 16, generator=g), which) for n, which in ((30, 0), (17, 0), (25, 1), (40, 0))]


def pruned(method: str, data: list[tuple[Tensor, int]], **how: object) -> tuple[dict[str, Tensor], object]:
    model = Net()
    report = gossamer.prune(model, method, density=0.5, data=data, sequential=METHODS[method], **how)
    return {n: w.clone() for n, w in model.state_dict().items()}, report


def llama() -> nn.Module:
    """A causal model, pruned by half."""
    torch.manual_seed(0)
    size = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    gossamer.prune(model, "magnitude", density=0.5)
    return model


def fine_tuned(ranks: range, shard: bool) -> dict[str, Tensor]:
    """Weights after three steps on these ranks' tokens, zeros held, each block sharded or nothing."""
    model = llama()
    handle = hold(model)
    for layer in (*model.model.layers, model) if shard else ():
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle.follow(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        for rank in ranks:
            ids = torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))
            (model(input_ids=ids, labels=ids).loss / len(ranks)).backward()
        optimizer.step()
        handle.step()
    whole = lambda w: w.full_tensor() if hasattr(w, "full_tensor") else w
    return {n: whole(w.detach()) for n, w in model.named_parameters()}


def work(rank: int, folder: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    half = batches()[2 * rank : 2 * rank + 2]
    found = {m: pruned(m, half, process_group=dist.group.WORLD) for m in METHODS}
    saved = {m: (weights, [n for n, _ in report.skipped]) for m, (weights, report) in found.items()}
    saved["fine-tuned"] = fine_tuned(range(rank, rank + 1), shard=True)
    torch.save(saved, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as in ranks.py


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    running = torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS, join=False)
    try:
        while not running.join(timeout=60):
            pass
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_prune_alike_and_as_one_process_with_all_batches(found, method: str) -> None:
    want, report = pruned(method, batches())
    (first, skipped), (second, _) = (f[method] for f in found)
    for name, w in want.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name] != 0, w != 0)
        torch.testing.assert_close(first[name], w, rtol=1e-4, atol=1e-5)
    assert skipped == [n for n, _ in report.skipped] == ["blocks.0.experts.2", "blocks.1.experts.2"]
    alone, _ = pruned(method, batches()[:2])
    assert any(not torch.equal(alone[n] != 0, w != 0) for n, w in want.items())  # half of the batches is not enough


def test_a_pruned_causal_model_is_fine_tuned_in_shards_with_its_zeros(found) -> None:
    want, before = fine_tuned(range(RANKS), shard=False), llama().state_dict()
    for mine in (f["fine-tuned"] for f in found):
        for name, w in want.items():
            torch.testing.assert_close(mine[name], w, rtol=1e-3, atol=1e-4)
            was = before[name.replace("parametrizations.", "").replace(".original", "")]
            assert bool((mine[name][was == 0] == 0).all())
            assert not torch.equal(mine[name], was)


def test_what_ranks_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="keep no workdir"):
        gossamer.prune(Net(), "wanda", data=batches(), process_group="any", workdir=tmp_path)
    with pytest.raises(TargetError, match="streams no batches"):
        gossamer.prune(Net(), "magnitude", process_group="any")
