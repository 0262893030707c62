"""Right, and slow."""

import time

SPARSE = False


def prepare(data, threads):
    def run():
        time.sleep(0.004)
        return data.sum(1)

    return run
