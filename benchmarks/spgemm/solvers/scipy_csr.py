"""scipy: one thread whatever is asked (it has no other); columns in no order; a mask by multiplying afterwards."""

SPARSE = True


def prepare(data, threads):
    from benchmarks.harness import Prepared
    from benchmarks.spgemm.solvers._entries import entries

    def run():
        c = data.a @ data.b
        return c if data.mask is None else c.multiply(data.mask)

    return Prepared(run, lambda: entries(run()))
