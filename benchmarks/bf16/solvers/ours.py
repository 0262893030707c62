"""Our groups of four rows in bfloat16, activations resident in bfloat16 panels (not for 3x3 convolutions)."""

import torch

SPARSE = True


def runs(case):
    return case.labels["stack"] != "conv3x3"


def prepare(stack, threads):
    from gossamer.formats import RowGrouped
    from gossamer.kernels.cpu.narrow import narrow
    from gossamer.kernels.cpu.spmm_panels import plan_panels
    from gossamer.kernels.cpu.tokens import WIDTH, plan_panels_to_rows, plan_rows_to_panels

    torch.set_num_threads(threads)
    tokens = stack.x.dim() == 2
    used = WIDTH if tokens else stack.x[0, 0].numel()
    panels, width = (stack.x.shape[0] // WIDTH, WIDTH) if tokens else (1, -(-used // 32) * 32)
    x_float = torch.zeros(panels, stack.layers[0].w_MK.shape[1], width)
    held, steps = [x_float.bfloat16()], []
    for layer in stack.layers:
        mask_MK = layer.w_MK != 0
        weight = narrow(RowGrouped.from_dense(layer.w_MK.bfloat16(), mask_MK, g=4))
        dtype = torch.float32 if layer is stack.layers[-1] else torch.bfloat16
        held.append(torch.zeros(panels, weight.rows, width, dtype=dtype))
        plan = plan_panels(
            weight, panels=panels, width=width, used=used, activation=layer.activation, out_dtype=dtype, threads=threads
        )
        steps.append((plan, held[-2], held[-1], layer.bias_M))
    first, last = held[0], held[-1]

    def through():
        for plan, x, y, bias in steps:
            plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())

    def images():
        first[..., :used].copy_(stack.x.flatten(2))
        through()
        return last[..., :used].reshape(1, -1, *stack.x.shape[2:])

    there = plan_rows_to_panels(1, stack.x.shape[0], x_float.shape[1], threads=threads) if tokens else None
    back = plan_panels_to_rows(1, stack.x.shape[0], last.shape[1], threads=threads) if tokens else None

    def sequence():
        there.run(stack.x.data_ptr(), x_float.data_ptr())
        first.copy_(x_float)
        through()
        y = torch.empty(stack.x.shape[0], last.shape[1])
        back.run(last.data_ptr(), y.data_ptr())
        return y

    return sequence if tokens else images
