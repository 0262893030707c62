"""What our solvers share: groups of four rows, activations resident in panels between layers."""

import torch

from gossamer.formats import RowGrouped
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.narrow_conv import Bordered, narrow_convolution, plan_narrow_convolution
from gossamer.kernels.cpu.quantise import plan_quantise
from gossamer.kernels.cpu.spmm_panels import plan_panels
from gossamer.kernels.cpu.tokens import WIDTH, plan_panels_to_rows, plan_rows_to_panels


def in_bfloat16(weight, x, *, panels, width, used, out_dtype, activation, threads, bias):
    """A layer on bfloat16 panels: its output, and what a run does."""
    w = narrow(weight)
    y = torch.zeros(panels, w.rows, width, dtype=out_dtype)
    plan = plan_panels(
        w, panels=panels, width=width, used=used, activation=activation, out_dtype=out_dtype, threads=threads
    )
    return y, lambda: plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())


def in_8_bits(weight, x, *, panels, width, used, out_dtype, activation, threads, bias):
    """A layer on float32 panels that are quantised before it."""
    w = narrow(weight, torch.int8)
    y = torch.zeros(panels, w.rows, width)
    codes, scales = torch.zeros(panels, w.cols, width, dtype=torch.uint8), torch.zeros(panels, width)
    quantise = plan_quantise(panels=panels, features=w.cols, width=width, used=used, threads=threads)
    plan = plan_panels(w, panels=panels, width=width, used=used, activation=activation, threads=threads)

    def run():
        quantise.run(x.data_ptr(), codes.data_ptr(), scales.data_ptr())
        plan.run(codes.data_ptr(), y.data_ptr(), bias.data_ptr(), scales.data_ptr())

    return y, run


def convolutions(stack, threads):
    """3x3 convolutions in bfloat16 on images with their border in place."""
    torch.set_num_threads(threads)
    place = Bordered(*stack.x.shape[2:], 1)
    first = last = place.empty(stack.x.shape[1])
    steps = []
    for layer in stack.layers:
        weight = RowGrouped.from_dense(layer.w_MK.bfloat16(), layer.w_MK != 0, g=4)
        dtype = torch.float32 if layer is stack.layers[-1] else torch.bfloat16
        plan = plan_narrow_convolution(
            narrow_convolution(weight, place), place, activation=layer.activation, out_dtype=dtype, threads=threads
        )
        steps.append((plan, last, place.empty(weight.rows, dtype), layer.bias_M))
        last = steps[-1][2]

    def run():
        place.pixels(first).copy_(stack.x[0])
        for plan, x, y, bias in steps:
            plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
        return place.pixels(last).contiguous()[None]

    return run


def prepare(stack, threads, layer_in, dtype):
    """Everything laid out once; a run brings the input into panels, goes through the layers and out again."""
    torch.set_num_threads(threads)
    tokens = stack.x.dim() == 2
    used = WIDTH if tokens else stack.x[0, 0].numel()
    line = 32 if dtype == torch.bfloat16 else 64  # positions of a cache line
    panels, width = (stack.x.shape[0] // WIDTH, WIDTH) if tokens else (1, -(-used // line) * line)
    x_float = torch.zeros(panels, stack.layers[0].w_MK.shape[1], width)
    first = last = x_float.to(dtype)
    runs = []
    for layer in stack.layers:
        weight = RowGrouped.from_dense(layer.w_MK.to(dtype), layer.w_MK != 0, g=4)
        out_dtype = torch.float32 if layer is stack.layers[-1] else dtype
        last, run = layer_in(
            weight, last, panels=panels, width=width, used=used, out_dtype=out_dtype, activation=layer.activation,
            threads=threads, bias=layer.bias_M,
        )  # fmt: skip
        runs.append(run)

    def images():
        first[..., :used].copy_(stack.x.flatten(2))
        for run in runs:
            run()
        return last[..., :used].reshape(1, -1, *stack.x.shape[2:])

    there = plan_rows_to_panels(1, stack.x.shape[0], x_float.shape[1], threads=threads) if tokens else None
    back = plan_panels_to_rows(1, stack.x.shape[0], last.shape[1], threads=threads) if tokens else None

    def sequence():
        there.run(stack.x.data_ptr(), x_float.data_ptr())
        first.copy_(x_float)
        for run in runs:
            run()
        y = torch.empty(stack.x.shape[0], last.shape[1])
        back.run(last.data_ptr(), y.data_ptr())
        return y

    return sequence if tokens else images
