"""Kernel patterns on 3x3 convolutions of ResNet-18 and MobileNetV2 (depthwise): layers, timed as `pack` times them.

python -m benchmarks.kernel_patterns.run [--threads 1] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from benchmarks.results import table, write_results
from gossamer.core import Density, get_method, select
from gossamer.deploy.candidates import TORCH_DENSE, automatic
from gossamer.deploy.convolutions import Convolved, Images
from gossamer.deploy.measure import measure
from gossamer.deploy.structure import detect

# Channels, size of the image, stride.
LAYERS = ((64, 56, 1), (128, 28, 1), (256, 14, 1), (512, 7, 1), (128, 28, 2))
DEPTHWISE = ((144, 56, 1), (384, 14, 1))
SUPPORTS = {
    "single weights": "[o i h w]",
    "8 patterns of 4 taps": None,
    "columns of a kernel": "[o i] {h} [w]",
    "whole kernels": "[o i] {h w}",
    "whole kernels of 4 filters": "([o] {4}) [i] {h w}",
}
SPARSE = ("csr/cpu", "kernelpatterns(taps=9)/cpu", "rowgrouped(g=2)/cpu", "rowgrouped(g=4)/cpu")
HEADS = ["layer", "kept", "support", "dense (torch)", "csr", "kernel patterns", "2-row", "4-row", "kept GF/s"]


@dataclass(frozen=True)
class Line:
    """One layer with one support.

    Args:
        ms: milliseconds of every way that can run it.
        gflops: kept operations a second of the fastest, in thousands of millions.
    """

    layer: str
    density: float
    support: str
    ms: dict[str, float]
    gflops: float


def line(
    channels: int, size: int, stride: int, support: str, density: float, repeats: int, depthwise: bool = False
) -> Line:
    torch.manual_seed(0)
    groups = channels if depthwise else 1
    conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=groups, bias=False)
    w = conv.weight.data
    if (pattern := SUPPORTS[support]) is None:
        conv.weight.data = get_method("kernel_patterns")(density=density).apply(w, {})[0]
    else:
        conv.weight.data = torch.where(select(w.abs(), pattern, Density(density)).kept, w, 0.0)
    flat = conv.weight.detach().flatten(1)
    work = Convolved(conv, "none", (Images((1, channels, size, size), False),))
    found = measure(work, automatic(density, detect(flat, 9), size * size, (TORCH_DENSE,)), repeats)
    ms = {t.candidate: t.ms for t in found.trials if t.ms is not None}
    pixels = (size // stride) ** 2
    best = min(time for name, time in ms.items() if name != str(TORCH_DENSE))
    name = f"{channels}, {size}x{size}" + f", stride {stride}" * (stride > 1) + ", depthwise" * depthwise
    return Line(name, density, support, ms, 2e-6 * int(flat.count_nonzero()) * pixels / best)


def _row(r: Line) -> list[str]:
    times = [r.ms.get(name) for name in (str(TORCH_DENSE), *SPARSE)]
    return [
        r.layer,
        f"{r.density:.2g}",
        r.support,
        *("–" if t is None else f"{t:.3f}" for t in times),
        f"{r.gflops:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = [(*layer, s, d, options.repeats) for layer in LAYERS for d in options.densities for s in SUPPORTS]
    work += [(*layer, s, 4 / 9, options.repeats, True) for layer in DEPTHWISE for s in [*SUPPORTS][:2]]
    lines = []
    for one in work:
        lines.append(line(*one))
        print(*_row(lines[-1]), sep=" | ", flush=True)
    if options.write:
        notes = [f"ms of whole layers, {options.threads} thread(s), batch 1, random weights; as `pack` measures."]
        record = {"threads": options.threads, "lines": [asdict(r) for r in lines]}
        page = write_results(f"kernel_patterns-{options.threads}", record, HEADS, [*map(_row, lines)], notes)
        print(table(HEADS, [*map(_row, lines)]), *notes, f"written to {page}", sep="\n")


if __name__ == "__main__":
    main()
