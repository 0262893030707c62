"""`select` against the same masks written by hand with topk + scatter, on tensors of a million entries.

Run: python -m benchmarks.select.run [--repeat 30] [--threads 1] [--device cuda]
The rule, fixed beforehand: each ratio (select / by hand, medians of interleaved runs) is at most 1.3.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.results import table, write_results
from gossamer.core import Budget, Density, Keep, pattern, select

RULE = 1.3
HEADS = ("case", "select, ms", "topk + scatter, ms", "ratio")


@dataclass(frozen=True)
class Line:
    """One row of the table. Times are medians in milliseconds."""

    case: str
    select_ms: float
    by_hand_ms: float

    @property
    def ratio(self) -> float:
        return self.select_ms / self.by_hand_ms


def scatter_top(s_RC: Tensor, k: int) -> Tensor:
    """What one writes by hand: topk, then scatter."""
    return torch.zeros_like(s_RC, dtype=torch.bool).scatter_(1, s_RC.topk(k, dim=1, sorted=False).indices, True)


def cases(s_OI: Tensor) -> dict[str, tuple[Callable[[], Tensor], str, Budget]]:
    rows, columns = s_OI.shape
    size = s_OI.numel()

    def four_rows() -> Tensor:
        units = s_OI.view(rows // 4, 4, columns).sum(1)
        return scatter_top(units, round(columns / 5)).repeat_interleave(4, dim=0)

    return {
        "unstructured, density 0.5": (
            lambda: scatter_top(s_OI.view(1, -1), size // 2).view_as(s_OI),
            "unstructured",
            Density(0.5),
        ),
        "unstructured, density 0.1": (
            lambda: scatter_top(s_OI.view(1, -1), round(size / 10)).view_as(s_OI),
            "unstructured",
            Density(0.1),
        ),
        "row, density 0.5": (lambda: scatter_top(s_OI, columns // 2), "row", Density(0.5)),
        "2:4": (lambda: scatter_top(s_OI.view(-1, 4), 2).view_as(s_OI), "2:4", Keep(2)),
        "4-row, density 0.2": (four_rows, "4-row", Density(0.2)),
    }


def measure(name: str, s_OI: Tensor, repeat: int) -> Line:
    by_hand, spec, budget = cases(s_OI)[name]
    who = pattern(spec)
    ours = lambda: select(s_OI, who, budget).kept
    # Masks may differ among equal scores, which topk breaks at will; their worth and count may not.
    if (s_OI.double() * ours()).sum() != (s_OI.double() * by_hand()).sum() or ours().sum() != by_hand().sum():
        raise SystemExit(f"{name}: the two masks are not worth the same, so their times say nothing")
    times = {ours: [], by_hand: []}
    for _ in range(repeat):
        for run in (ours, by_hand):
            began = time.perf_counter()
            run()
            _wait(s_OI)
            times[run].append(1e3 * (time.perf_counter() - began))
    return Line(name, statistics.median(times[ours]), statistics.median(times[by_hand]))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _device(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def verdict(lines: list[Line]) -> list[str]:
    """The rule and whether it held, named case by case where it did not."""
    broken = [f"{r.case}: {r.ratio:.2f}" for r in lines if r.ratio > RULE]
    held = f"broken by {'; '.join(broken)}" if broken else "held by every case"
    return [f"The rule, fixed beforehand: each ratio is at most {RULE}. It is {held}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    s_OI = torch.randperm(1024 * 1024, generator=torch.Generator().manual_seed(0)).float().view(1024, 1024)
    s_OI = s_OI.to(options.device)
    lines = [measure(name, s_OI, options.repeat) for name in cases(s_OI)]
    rows = [[r.case, f"{r.select_ms:.2f}", f"{r.by_hand_ms:.2f}", f"{r.ratio:.2f}"] for r in lines]
    setting = {"threads": options.threads, "device": _device(options.device), "repeat": options.repeat, "rule": RULE}
    notes = [*verdict(lines), *(f"{name}: {value}" for name, value in setting.items() if name != "rule")]
    record = {**setting, "lines": [{**asdict(r), "ratio": r.ratio} for r in lines]}
    name = f"select-{options.threads}-threads" if options.device == "cpu" else "select-gpu"
    page = write_results(name, record, HEADS, rows, notes)
    print(table(HEADS, rows), *notes, f"written to {page}", sep="\n")


if __name__ == "__main__":
    main()
