"""What each of two processes does for `test_distributed.py`: train under DDP and FSDP2, and write what it holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.core.ranks import mean_over_ranks

STEPS, CUT = 8, 3
RUN = {"density": 0.25, "total_steps": STEPS, "every": 2}
METHODS = {
    "rigl": RUN,
    "set": RUN,
    "set unfired": {**RUN, "grow": "unfired"},
    "rigl momentum": {**RUN, "grow": "momentum"},
    "g2gnet": {**RUN, "groups": 4, "fraction": 0.3},
    "static": {"density": 0.25},
    "gradual_magnitude": RUN,
    "topkast": {"density": 0.25, "every": 2},
    "sr_ste": {"pattern": "2:4", "pull": 0.1},
    "bdwp": {"pattern": "2:4", "pull": 0.1},
    "decaying_mask": {"pattern": "2:4", "total_steps": STEPS},
}
SHARDED = tuple(m for m in METHODS if m != "topkast")  # which says that it cannot
SOFT = ("topkast", "sr_ste", "bdwp", "decaying_mask")  # pruned weights live on, in the others they are zero
HARD = tuple(m for m in METHODS if m not in SOFT)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def attached(model: nn.Module, method: str, optimizer: object):
    return gossamer.attach(model, method.split()[0], optimizer=optimizer, **METHODS[method])


def batch(step: int, rank: int, ranks: int) -> torch.Tensor:
    """This rank's share of the step's eight samples."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]


def train(model, optimizer, handle, steps, rank: int = 0, ranks: int = 1) -> None:
    """Two micro-batches a step."""
    for step in steps:
        optimizer.zero_grad()
        for x in batch(step, rank, ranks).chunk(2):
            ((model(x) - x[:, :4]).square().mean() / 2).backward()
        optimizer.step()
        handle.step()


def held(handle) -> dict[str, object]:
    """Supports, and the largest thing that is not zero where all must be: weights, gradients, momenta."""
    local = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    worst = 0.0
    for name, support in handle.supports().items():
        w = handle.model.get_submodule(name).parametrizations.weight.original
        slots = [s for s in handle.optimizer.state[w].values() if s.shape == w.shape]
        off = [local(x.detach())[~support.kept].abs().max().item() for x in (w, *slots)]
        worst = max(worst, *off)
    return {"supports": {n: s.kept.clone() for n, s in handle.supports().items()}, "worst": worst}


def alone(method: str) -> dict[str, object]:
    """One process with all samples."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attached(model, method, optimizer)
    train(model, optimizer, handle, range(STEPS))
    return held(handle)


def fresh_slots(handle, before: dict[str, torch.Tensor]) -> float:
    """The largest momentum of links that have just come in."""
    worst = 0.0
    for name, support in handle.supports().items():
        w = handle.model.get_submodule(name).parametrizations.weight.original
        came = support.kept & ~before[name]
        for slot in handle.optimizer.state[w].values():
            if slot.shape == w.shape and came.any():
                full = slot.full_tensor() if hasattr(slot, "full_tensor") else slot
                worst = max(worst, full[came].abs().max().item())
    return worst


def _ddp(method: str, rank: int, ranks: int) -> dict[str, object]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attached(model, method, optimizer)
    wrapped, fresh = DistributedDataParallel(model), 0.0
    for step in range(STEPS):
        before = {n: s.kept.clone() for n, s in handle.supports().items()}
        train(wrapped, optimizer, handle, range(step, step + 1), rank, ranks)
        fresh = max(fresh, fresh_slots(handle, before))
    return {**held(handle), "fresh": fresh}


def _sharded(method: str):
    model = net()
    handle = attached(model, method, "later")
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle.follow(optimizer)
    return model, optimizer, handle


def _fsdp(method: str, rank: int, ranks: int, folder: Path) -> dict[str, object]:
    model, optimizer, handle = _sharded(method)
    train(model, optimizer, handle, range(CUT), rank, ranks)
    state = lambda m, o, h: dict(zip(("model", "optimizer"), get_state_dict(m, o))) | {"handle": h.state_dict()}
    dcp.save(state(model, optimizer, handle), checkpoint_id=folder / f"dcp-{method}")
    fresh = 0.0
    for step in range(CUT, STEPS):
        before = {n: s.kept.clone() for n, s in handle.supports().items()}
        train(model, optimizer, handle, range(step, step + 1), rank, ranks)
        fresh = max(fresh, fresh_slots(handle, before))
    again = _sharded(method)
    loaded = state(*again)
    dcp.load(loaded, checkpoint_id=folder / f"dcp-{method}")
    set_state_dict(*again[:2], model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    again[2].load_state_dict(loaded["handle"])
    train(*again, range(CUT, STEPS), rank, ranks)
    return {**held(handle), "fresh": fresh, "resumed": held(again[2])["supports"]}


def _refusals() -> dict[str, str]:
    """What FSDP2 cannot do, in words."""
    model = net()
    fully_shard(model)
    said = {}
    try:
        gossamer.attach(model, "static", density=0.5)
    except GossamerError as error:
        said["attach"] = str(error)
    try:
        gossamer.attach(net(), "static", density=0.5, backend="sparse")
    except GossamerError as error:
        said["sparse"] = str(error)
    handle = _sharded("static")[2]
    try:
        handle.remove()
    except GossamerError as error:
        said["remove"] = str(error)
    return said


def run(rank: int, ranks: int, folder: str) -> None:
    """Everything, written to `folder/rank.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    found = {f"ddp {m}": _ddp(m, rank, ranks) for m in METHODS}
    found |= {f"fsdp {m}": _fsdp(m, rank, ranks, Path(folder)) for m in SHARDED}
    found["refused"] = _refusals()
    held = {n: torch.zeros(2) for n in "abcd"}
    mine = {"a": torch.ones(2), "bc"[rank]: torch.full((2,), 4.0)}
    found["union"] = mean_over_ranks(mine, held)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads at times outlive the interpreter (torch 2.13) and abort a process that has done all
