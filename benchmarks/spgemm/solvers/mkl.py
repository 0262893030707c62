"""Intel MKL through sparse-dot-mkl: scipy in, scipy out, columns in no order; it knows no masks."""

SPARSE, ENVIRONMENT = True, "mkl"


def runs(case):
    return case.labels["mask"] == "no"


def prepare(files, threads):
    import ctypes
    import sys
    from pathlib import Path

    # The wheel puts its libraries where only a linker's path finds them.
    ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libmkl_rt.so.3"), mode=ctypes.RTLD_GLOBAL)
    from scipy.sparse import csr_matrix, load_npz
    from sparse_dot_mkl import dot_product_mkl

    from benchmarks.harness import Prepared
    from benchmarks.spgemm.solvers._entries import entries

    a, b = (csr_matrix(load_npz(files / f"{name}.npz")) for name in "ab")

    def run():
        return dot_product_mkl(a, b)

    return Prepared(run, lambda: entries(run()))
