"""gossamer.spgemm_plan: the pattern is known from an earlier product, only values are computed."""

SPARSE = True


def runs(case):
    return case.labels["mask"] == "no"


def prepare(data, threads):
    import torch

    from benchmarks.harness import Prepared
    from benchmarks.spgemm.solvers._entries import entries
    from gossamer import spgemm_plan

    torch.set_num_threads(threads)
    plan = spgemm_plan(data.a, data.b)
    return Prepared(plan.run, lambda: entries(plan.run().copy()))
