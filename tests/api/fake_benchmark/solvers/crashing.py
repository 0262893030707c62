"""Takes its process down on the first size, and computes the second."""

import os
import signal

SPARSE = True


def prepare(data, threads):
    if len(data) == 8:
        os.kill(os.getpid(), signal.SIGSEGV)
    return lambda: data.sum(1)
