"""DeepSparse 1.8.0: the whole stack as one graph, compiled for a fixed batch and number of cores."""

SPARSE, ENVIRONMENT = True, "deepsparse"


def prepare(files, threads):
    import numpy as np
    from deepsparse import Engine

    x = np.load(files / "x.npy")
    engine = Engine(str(files / "model.onnx"), batch_size=x.shape[0], num_cores=threads)
    return lambda: engine.run([x])[0]
