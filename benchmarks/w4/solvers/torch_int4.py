"""torch's 4-bit product for CPUs, bfloat16 inputs."""

import torch

from benchmarks.decode.solvers._cold import in_turn
from benchmarks.w4.problem import SHARED, codes

SPARSE = False


def prepare(data, threads):
    torch.set_num_threads(threads)
    found, scale, zero = codes(data.w_MK)
    # It computes (code - 8) * scale + shift.
    values = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()
    packed, x_TK = torch.ops.aten._convert_weight_to_int4pack_for_cpu(found.int(), 1), data.x_TK.bfloat16()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    nbytes = packed.nbytes + values.nbytes
    return in_turn(lambda: (packed.clone(), values.clone()), nbytes, lambda w: multiply(x_TK, w[0], SHARED, w[1]))
