"""Right, from files."""

SPARSE, READS_FILES = True, True


def prepare(files, threads):
    import numpy as np

    x = np.load(files / "x.npy")
    return lambda: x.sum(1)
