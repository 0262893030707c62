"""What a method adds to a training step: time per step beside the dense step, and bytes per weight.

Run: python -m benchmarks.training_step.run [--repeat 8] [--batch 32] [--threads 1 2] [--quick]
Shapes: one block of ViT-small (197 tokens of 384) and the last stage of ResNet-18 (512 channels on 7 x 7 images);
beside them, outside the rule, a linear layer of 2048 x 2048 with 4 positions per sample: many weights, little work.
A method's steps are interleaved with dense ones. The rule, fixed beforehand: a step takes at most 1.1 times the
dense one. A run that was stopped goes on with the methods that are missing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import gossamer
from benchmarks.harness.partial import fingerprint
from benchmarks.results import table, write_results
from gossamer.core.files import cache_root, whole_file

RULE = 1.1
HEADS = ("shape", "threads", "method", "dense step, ms", "with the method, ms", "ratio", "bytes per weight")
EVERY = 100  # steps between changes of a support that the times are for
CYCLE = 4  # steps between them here
DYNAMIC = {"density": 0.1, "total_steps": 1000, "every": CYCLE}
NOTES = (
    "SGD with momentum; bytes per weight: weights, gradients and masks, without the optimizer's slot (dense: 8).",
    f"set, rigl, gradual_magnitude, topkast: supports change every {EVERY} steps (their default), amortised; here they "
    f"do in every {CYCLE}th: plain + (sum of {CYCLE} - {CYCLE} plain) / {EVERY}, plain being the two in the middle.",
    "gradual_magnitude, each step: a choice among all weights of a layer in every step; nobody needs that.",
)
METHODS: dict[str, dict[str, object]] = {
    "static": {"density": 0.1},
    "gradual_magnitude": DYNAMIC,
    "gradual_magnitude, each step": {**DYNAMIC, "every": 1},
    "set": DYNAMIC,
    "rigl": DYNAMIC,
    "sr_ste": {"pattern": "2:4"},
    "decaying_mask": {"pattern": "2:4", "total_steps": 1000},
    "decaying_structure": {"pattern": "2:4", "total_steps": 1000},
    "bdwp": {"pattern": "2:8"},
    "topkast": {"density": 0.1, "every": CYCLE},
}
PARTS = cache_root() / "benchmarks" / "training_step.partial.json"


class Block(nn.Module):
    """One block of ViT-small."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(384) for _ in range(2))
        self.qkv, self.out = nn.Linear(384, 1152), nn.Linear(384, 384)
        self.up, self.down = nn.Linear(384, 1536), nn.Linear(1536, 384)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x_BTC)).unflatten(2, (3, 6, 64)).permute(2, 0, 3, 1, 4)
        x_BTC = x_BTC + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_BTC + self.down(functional.gelu(self.up(self.norms[1](x_BTC))))


def stage() -> nn.Module:
    """The two convolutions of ResNet-18's last basic block."""
    conv = lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False)
    return nn.Sequential(conv(), nn.BatchNorm2d(512), nn.ReLU(), conv(), nn.BatchNorm2d(512))


def linear() -> nn.Module:
    """One wide layer."""
    return nn.Sequential(nn.Linear(2048, 2048))


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18 stage": (stage, (512, 7, 7)),
    "linear 2048": (linear, (4, 2048)),
    "ViT-small block": (Block, (197, 384)),
}
OUTSIDE = "linear 2048"  # of the rule


@dataclass(frozen=True)
class Line:
    """One row of the table. Times are medians in milliseconds."""

    shape: str
    threads: int
    method: str
    dense_ms: float
    method_ms: float
    bytes_per_weight: float

    @property
    def ratio(self) -> float:
        return self.method_ms / self.dense_ms


def stepper(shape: str, batch: int, method: str | None) -> tuple[Callable[[], None], nn.Module]:
    """One training step with SGD and momentum, dense or with a method."""
    build, size = SHAPES[shape]
    torch.manual_seed(0)
    model = copy.deepcopy(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = gossamer.attach(model, method.split(",")[0], optimizer=optimizer, **METHODS[method]) if method else None
    x = torch.randn(batch, *size)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if handle is not None:
            handle.step()

    return step, model


def held(model: nn.Module) -> float:
    """Bytes per weight of what stays between steps beside the optimizer's slots: weights, gradients, masks."""
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    masks = sum(b.nbytes for n, b in model.named_buffers() if "parametrizations" in n)
    return (sum(2 * p.nbytes for p in model.parameters() if p.ndim > 1) + masks) / weights


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def measure(shape: str, threads: int, method: str, batch: int, repeat: int) -> Line:
    torch.set_num_threads(threads)
    dense, _ = stepper(shape, batch, None)
    sparse, model = stepper(shape, batch, method)
    times: dict[Callable[[], None], list[float]] = {dense: [], sparse: []}
    for _ in range(CYCLE):
        dense(), sparse()
    for _ in range(-(-repeat // CYCLE) * CYCLE):
        for run in (dense, sparse):
            times[run].append(timed(run))
    spent = times[sparse]
    step = statistics.median(spent)
    if METHODS[method].get("every") == CYCLE:  # the last of a cycle changes the support, the next one feels it
        plain = statistics.median(spent[1::CYCLE] + spent[2::CYCLE])
        cycle = sum(statistics.median(spent[phase::CYCLE]) for phase in range(CYCLE))
        step = plain + (cycle - CYCLE * plain) / EVERY
    return Line(shape, threads, method, statistics.median(times[dense]), step, held(model))


def finished(setting: dict[str, object]) -> list[Line]:
    """What a run of this very code with the same setting left when it was stopped."""
    if not PARTS.exists() or (found := json.loads(PARTS.read_text()))["setting"] != setting:
        return []
    return [Line(**line) for line in found["lines"]] if found.get("source") == fingerprint() else []


def verdict(lines: list[Line]) -> str:
    """The rule and whether it held, named row by row where it did not."""
    ruled = [r for r in lines if r.shape != OUTSIDE]
    broken = [f"{r.shape}, {r.threads} threads, {r.method}: {r.ratio:.2f}" for r in ruled if r.ratio > RULE]
    held = f"broken by {'; '.join(broken)}" if broken else "held by every row of the two networks"
    return f"The rule, fixed beforehand: a step takes at most {RULE} times the dense one. It is {held}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="two steps at batch 2; writes no results")
    options = parser.parse_args()
    if options.quick:
        options.repeat, options.batch, options.threads = 2, 2, [1]
    setting = {"batch": options.batch, "repeat": options.repeat, "torch": torch.__version__}
    lines = [] if options.quick else finished(setting)
    done = {(r.shape, r.threads, r.method) for r in lines}
    for row in itertools.product(SHAPES, options.threads, METHODS):
        if row not in done:
            lines.append(measure(*row, options.batch, options.repeat))
            print(f"{', '.join(map(str, row))}: {lines[-1].ratio:.3f}", flush=True)
            if not options.quick:
                with whole_file(PARTS) as draft:
                    held = {"setting": setting, "source": fingerprint(), "lines": [asdict(r) for r in lines]}
                    draft.write_text(json.dumps(held))
    rows = [
        [
            r.shape,
            str(r.threads),
            r.method,
            f"{r.dense_ms:.1f}",
            f"{r.method_ms:.1f}",
            f"{r.ratio:.3f}",
            f"{r.bytes_per_weight:.2f}",
        ]
        for r in lines
    ]
    notes = [verdict(lines), *(f"{name}: {value}" for name, value in setting.items()), *NOTES]
    print(table(HEADS, rows), *notes, sep="\n")
    if not options.quick:
        record = {**setting, "rule": RULE, "lines": [{**asdict(r), "ratio": r.ratio} for r in lines]}
        print(f"written to {write_results('training_step', record, HEADS, rows, notes)}")
        PARTS.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
