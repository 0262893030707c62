"""Several processes: the same supports on every rank as in one process, sharded or not, and after a checkpoint."""

from __future__ import annotations

import pytest
import ranks
import torch
from ranks import HARD, METHODS, SHARDED

RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    running = torch.multiprocessing.spawn(ranks.run, (RANKS, str(folder)), nprocs=RANKS, join=False)
    try:
        while not running.join(timeout=60):
            pass
    finally:
        for process in running.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("way", "method"), [*(("ddp", m) for m in METHODS), *(("fsdp", m) for m in SHARDED)])
def test_every_rank_holds_the_supports_of_one_process(found, way, method):
    want = ranks.alone(method)["supports"]
    for rank in range(RANKS):
        got = found[rank][f"{way} {method}"]["supports"]
        assert all(torch.equal(want[n], got[n]) for n in want)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", HARD)
def test_what_is_pruned_is_zero_and_new_links_start_empty(found, way, method):
    assert all(f[f"{way} {method}"]["worst"] == f[f"{way} {method}"]["fresh"] == 0 for f in found)


@pytest.mark.parametrize("method", SHARDED)
def test_a_distributed_checkpoint_goes_on_with_the_same_supports(found, method):
    for f in found:
        whole, resumed = f[f"fsdp {method}"]["supports"], f[f"fsdp {method}"]["resumed"]
        assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_what_sharding_cannot_do_is_said(found):
    for f in found:
        assert "before fully_shard" in f["refused"]["attach"] and "sharded" in f["refused"]["remove"]
        assert "backend='masked'" in f["refused"]["sparse"]


def test_ranks_that_lack_different_names_take_the_mean_of_all_names(found):
    for f in found:
        assert {n: x.tolist() for n, x in f["union"].items()} == {"a": [1, 1], "b": [2, 2], "c": [2, 2]}
