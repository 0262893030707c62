"""Right at first, wrong once it has run for a while."""

SPARSE = True


def prepare(data, threads):
    calls = []

    def run():
        calls.append(1)
        return data.sum(1) + (len(calls) > 12)

    return run
