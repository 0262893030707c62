"""A fine-tuning step of SmolLM2-135M: S2FT beside LoRA (ours and peft's, where it is installed) and all weights.

Equal trainable numbers in each pair: S2FT on the feed-forward output (3 % of its channels, as the paper's Llama-3
script) beside LoRA of rank 4 on q, k, v, up and down (the paper's baseline); S2FT on heads and channels (one head, 2 %,
as its Llama-2 script) beside rank 8, and rank 5 on all linear layers, as is usual too. Every way takes the same batch,
one after the other, in every round; the fastest step of each counts, for a busy machine only adds time.

    python -m benchmarks.finetuning.run [--bfloat16] [--rounds 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import gossamer
from benchmarks.results import write_results
from gossamer.data import load_model

LORA = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
BATCH, TOKENS = 2, 256


@dataclass
class Row:
    """One way: numbers that learn; bytes of gradients and moments, and kept between the passes; seconds of a step."""

    way: str
    learns: int
    state_bytes: int
    kept_bytes: int
    seconds: float


@contextmanager
def adapted(model: nn.Module, method: str, **options: object) -> Iterator[list[Tensor]]:
    handle = gossamer.adapt(model, method, **options)
    yield list(handle.parameters())
    handle.remove()


@contextmanager
def by_peft(model: nn.Module, rank: int, targets: str | list[str]) -> Iterator[list[Tensor]]:
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    yield [p for p in wrapped.parameters() if p.requires_grad]
    wrapped.unload()
    model.requires_grad_(True)


@contextmanager
def whole(model: nn.Module) -> Iterator[list[Tensor]]:
    yield list(model.parameters())


def ways(model: nn.Module) -> dict[str, Callable]:
    lora = lambda rank: adapted(model, "lora", rank=rank, targets=[f"*{name}" for name in LORA])
    found = {
        "S2FT, down": lambda: adapted(model, "s2ft", density=0.03, targets=["*down_proj"]),
        "LoRA 4": lambda: lora(4),
        "LoRA 4, peft": lambda: by_peft(model, 4, list(LORA)),
        "S2FT, heads and down": lambda: adapted(model, "s2ft", density=0.02),
        "LoRA 8": lambda: lora(8),
        "LoRA 8, peft": lambda: by_peft(model, 8, list(LORA)),
        "LoRA 5, peft, all linear layers": lambda: by_peft(model, 5, "all-linear"),
        "all weights": lambda: whole(model),
    }
    there = importlib.util.find_spec("peft") is not None
    return {name: way for name, way in found.items() if there or "peft" not in name}


def step(model: nn.Module, ids_BT: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()


def measured(name: str, model: nn.Module, way: Callable, ids_BT: Tensor) -> Row:
    """One timed step of one way, after one that is not. Training all weights moves them a little; no time changes."""
    with way() as learns:
        optimizer = torch.optim.AdamW(learns, lr=1e-6)
        kept = kept_bytes(model, lambda: step(model, ids_BT, optimizer))
        state = [p.grad for p in learns] + [t for s in optimizer.state.values() for t in s.values()]
        optimizer.zero_grad()
        began = time.perf_counter()
        step(model, ids_BT, optimizer)
        seconds = time.perf_counter() - began
        for p in learns:
            p.grad = None
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        return Row(name, sum(p.numel() for p in learns), size(state), kept, seconds)


def kept_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, without the model's own."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        seen.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for at, t in seen.items() if at not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bfloat16", action="store_true", help="the model's number type; float32 unless given")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bfloat16 else torch.float32
    model = load_model("smollm2-135m").to(dtype).train()
    model.config.use_cache = False
    ids_BT = torch.randint(1000, 40000, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    best: dict[str, Row] = {}
    for _ in range(options.rounds):
        for name, way in ways(model).items():
            row = measured(name, model, way, ids_BT)
            best[name] = min(best.get(name, row), row, key=lambda r: r.seconds)
    write(list(best.values()), "bfloat16" if options.bfloat16 else "float32", options.rounds)


def write(rows: list[Row], dtype: str, rounds: int) -> None:
    heads = ("way", "learns", "gradients and moments MB", "kept between passes MB", "ms per step")
    cells = [
        (
            r.way,
            f"{r.learns:,}",
            f"{r.state_bytes / 1e6:.1f}",
            f"{r.kept_bytes / 1e6:.0f}",
            f"{1e3 * r.seconds:.0f}",
        )
        for r in rows
    ]
    notes = (
        f"{BATCH} × {TOKENS} tokens, {dtype}, AdamW, {torch.get_num_threads()} threads; fastest of {rounds}",
        "kept between passes: what autograd saves in the forward pass, each storage once, without the weights",
    )
    print(write_results(f"finetuning-{dtype}", {"rows": [asdict(r) for r in rows]}, heads, cells, notes).read_text())


if __name__ == "__main__":
    main()
