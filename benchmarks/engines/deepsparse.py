"""DeepSparse 1.8.0: the network compiled for a fixed batch and number of cores, at its own defaults."""

from benchmarks.engines.files import inputs, one


def prepare(folder, threads):
    from deepsparse import Engine

    given = list(inputs(folder).values())
    engine = Engine(str(folder / "model-old.onnx"), batch_size=given[0].shape[0], num_cores=threads)
    return lambda: one(engine.run(given))
