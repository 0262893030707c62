"""Never answers."""

import time

SPARSE = True


def runs(case):
    return case.id == "8-0.5"


def prepare(data, threads):
    time.sleep(600)
