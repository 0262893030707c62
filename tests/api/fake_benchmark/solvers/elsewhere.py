"""Wants an environment that nobody described."""

SPARSE, ENVIRONMENT = True, "nowhere"


def prepare(files, threads):
    return lambda: None
