"""One way of pruning in a process whose memory is limited, and what /proc said about it.

The libraries are loaded first, by a toy run of the same kind. Then RLIMIT_DATA is set to what the process has by then
(VmData) and an allowance: the system counts heap, anonymous and private writable mapped memory against it, and refuses
more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import gossamer
from gossamer.attach.spool import Spool

VOCABULARY = 256
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=VOCABULARY, num_attention_heads=4)


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def batches(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (1, length), generator=generator)} for _ in range(count)]


def limited(
    way: str, folder: Path, *, method: str, allowance: int, count: int, length: int, keep: int
) -> dict[str, object]:
    """Prune `folder/dense`: "whole" = load, prune; "on disk"; "on disk, spooled" with `keep` bytes of activations."""
    gossamer.prune(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOY)), method, data=batches(1, 8))
    most, done = [0], threading.Event()
    threading.Thread(target=_watch, args=(most, done), daemon=True).start()
    libraries, resident = status("VmData"), status("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (libraries + allowance,) * 2)
    began, found = time.perf_counter(), {}
    try:
        found = _prune(way, folder, method, batches(count, length), keep)
    except (RuntimeError, MemoryError, OSError) as failed:
        found = {"failed": f"{type(failed).__name__}: {str(failed).splitlines()[0][:160]}"}
    done.set()
    found |= {
        "way": way,
        "seconds": time.perf_counter() - began,
        "limit": libraries + allowance,
        "libraries": libraries,
    }
    grown = status("VmHWM") - resident
    return {**found, "most_vmdata": most[0], "vmhwm": status("VmHWM"), "grown": grown, "enforced": _refused(allowance)}


def _prune(way: str, folder: Path, method: str, data: list[dict[str, torch.Tensor]], keep: int) -> dict[str, object]:
    if way == "whole":
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "dense", dtype="auto")
        return {"density": gossamer.prune(model, method, density=0.5, data=data).density}
    spool = Spool(folder / "spool", keep=keep) if "spooled" in way else None
    out = folder / way.replace(", ", "-").replace(" ", "-")
    report = gossamer.prune_files(folder / "dense", out, method, density=0.5, data=data, spool=spool)
    return {"density": report.density, "spooled": spool.written if spool else 0}


def _refused(allowance: int) -> bool:
    """True if the system refuses the allowance once more."""
    try:
        torch.ones(2 * allowance, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def _watch(most: list[int], done: threading.Event) -> None:
    while not done.wait(0.02):
        most[0] = max(most[0], status("VmData"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    print(json.dumps(limited(given.pop("way"), Path(given.pop("folder")), **given)), flush=True)
    os._exit(0)  # threads that could not be started under the limit would be waited for
