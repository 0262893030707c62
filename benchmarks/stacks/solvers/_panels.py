"""Our products with activations resident in panels or planes between layers, as the whole-network runtime has them."""

from __future__ import annotations

import torch

from benchmarks.stacks.solvers._ours import to_stream
from benchmarks.stacks.stacks import Stack
from gossamer.kernels.cpu.conv import plan_conv
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.spmm_panels import aligned_panels, plan_panels
from gossamer.kernels.cpu.tokens import WIDTH, plan_panels_to_rows, plan_rows_to_panels
from gossamer.kernels.cpu.window import Window


def convolutions(stack: Stack, threads: int, g: int):
    """3x3 convolutions from plane to plane; the first reads the input where it is."""
    torch.set_num_threads(threads)
    high, wide = stack.x.shape[2:]
    near, strides = Window((3, 3), padding=(1, 1, 1, 1)), (high * wide, high * wide)
    x, steps = stack.x, []
    for layer in stack.layers:
        weight = to_stream(layer, g)
        plan = plan_conv(weight, 1, high, wide, near, activation=layer.activation, threads=threads, strides=strides)
        steps.append((plan, x, layer.bias_M))
        x = torch.empty(1, weight.rows, high, wide)

    def run():
        held = [at for _, at, _ in steps] + [torch.empty_like(x)]
        for (plan, at, bias), to in zip(steps, held[1:]):
            plan.run(at.data_ptr(), to.data_ptr(), bias.data_ptr())
        return held[-1]

    return run


def prepare(stack: Stack, threads: int, g: int):
    """Everything laid out once; a run brings the input into panels, goes through the layers and out again."""
    if stack.name == "conv3x3":
        return convolutions(stack, threads, g)
    torch.set_num_threads(threads)
    tokens = stack.x.dim() == 2
    used = WIDTH if tokens else stack.x[0, 0].numel()
    panels, width = (stack.x.shape[0] // WIDTH, WIDTH) if tokens else (1, plane_stride(used))
    held = [aligned_panels(panels, stack.layers[0].w_MK.shape[1], width).zero_()]
    steps = []
    for layer in stack.layers:
        weight = to_stream(layer, g)
        held.append(held[-2] if len(held) > 2 and held[-2].shape[1] == weight.rows else None)
        held[-1] = aligned_panels(panels, weight.rows, width).zero_() if held[-1] is None else held[-1]
        plan = plan_panels(
            weight, panels=panels, width=width, used=used, activation=layer.activation, threads=threads
        )  # fmt: skip
        steps.append((plan, held[-2], held[-1], layer.bias_M))
    first, last = held[0], held[-1]

    def through():
        for plan, x, y, bias in steps:
            plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())

    def images():
        first[..., :used].copy_(stack.x.flatten(2))
        through()
        return last[..., :used].reshape(1, -1, *stack.x.shape[2:])

    rows, cols = last.shape[1], first.shape[1]
    there = plan_rows_to_panels(1, stack.x.shape[0], cols, threads=threads) if tokens else None
    back = plan_panels_to_rows(1, stack.x.shape[0], rows, threads=threads) if tokens else None

    def sequence():
        there.run(stack.x.data_ptr(), first.data_ptr())
        through()
        y = torch.empty(stack.x.shape[0], rows)
        back.run(last.data_ptr(), y.data_ptr())
        return y

    return sequence if tokens else images
