"""oneDNN through torch's own prepacked operator."""

import torch

from benchmarks.decode.solvers._cold import in_turn

SPARSE = False


def prepare(data, threads):
    torch.set_num_threads(threads)
    ops = torch.ops.mkldnn

    def make():
        return ops._reorder_linear_weight(data.w_MK, data.x_TK.shape[0])

    return in_turn(make, data.w_MK.nbytes, lambda w: ops._linear_pointwise(data.x_TK, w, None, "none", [], ""))
