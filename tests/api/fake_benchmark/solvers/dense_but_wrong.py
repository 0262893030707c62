"""Fast and wrong: must never be the engine that others are compared with."""

SPARSE = False


def prepare(data, threads):
    return lambda: 2 * data.sum(1)
