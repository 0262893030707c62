"""onnxruntime in float32, at its own defaults."""

from benchmarks.engines.files import inputs, one


def prepare(folder, threads):
    from gossamer.deploy.runners import onnxruntime_runner

    run = onnxruntime_runner(folder / "model.onnx", threads)(inputs(folder))
    return lambda: one(run())
