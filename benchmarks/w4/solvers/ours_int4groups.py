"""Our 4-bit groups: what is zero is not stored."""

import torch

from benchmarks.decode.solvers._cold import in_turn

SPARSE = True


def prepare(data, threads):
    from gossamer.formats import Int4Groups
    from gossamer.kernels.dispatch import resolve

    torch.set_num_threads(threads)
    stored, x_TK = Int4Groups.from_dense(data.w_MK), data.x_TK.bfloat16()

    def make():
        return resolve(stored.with_parts({name: part.clone() for name, part in stored.parts().items()}), backend="cpu")

    return in_turn(make, stored.nbytes, lambda plan: plan.run(x_TK))
