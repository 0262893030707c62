"""A NaN among right numbers."""

SPARSE = True


def prepare(data, threads):
    y = data.sum(1)
    y[0] = float("nan")
    return lambda: y
