"""Our product over a tile bitmask."""

import torch

from benchmarks.decode.solvers._cold import in_turn

SPARSE = True


def prepare(data, threads):
    from gossamer.formats import TileBitmask
    from gossamer.kernels.dispatch import resolve

    torch.set_num_threads(threads)
    stored = TileBitmask.from_dense(data.w_MK)

    def make():
        return resolve(stored.with_parts({name: part.clone() for name, part in stored.parts().items()}), backend="cpu")

    return in_turn(make, stored.nbytes, lambda plan: plan.run(data.x_TK))
