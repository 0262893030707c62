"""Off by a thousandth."""

SPARSE = True


def prepare(data, threads):
    return lambda: 1.001 * data.sum(1)
