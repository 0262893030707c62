"""OpenVINO, on exactly the threads asked for; "f32" is forced, for it would round to bf16 by itself."""

from benchmarks.engines.files import inputs, one


def prepare(folder, threads, precision="f32"):
    from gossamer.deploy.runners import openvino_runner

    run = openvino_runner(folder / "model.onnx", threads, precision=precision)(inputs(folder))
    return lambda: one(run())
