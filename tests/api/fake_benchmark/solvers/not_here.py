"""Knows that it cannot run here."""

SPARSE = True


def why_not():
    return "needs a machine of another kind"


def prepare(data, threads):
    return lambda: None
