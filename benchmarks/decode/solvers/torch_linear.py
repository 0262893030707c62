"""torch's F.linear."""

import torch
from torch.nn.functional import linear

from benchmarks.decode.solvers._cold import in_turn

SPARSE = False


def prepare(data, threads):
    torch.set_num_threads(threads)
    return in_turn(data.w_MK.clone, data.w_MK.nbytes, lambda w_MK: linear(data.x_TK, w_MK))
