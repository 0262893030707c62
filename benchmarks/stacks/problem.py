"""Three stacks of layers with weights pruned at random: alone, or in groups of four rows."""

import numpy as np

from benchmarks.harness import Case
from benchmarks.stacks.solvers._graph import onnx_bytes
from benchmarks.stacks.stacks import NAMES, ZEROS, exact_output, stack

NAME, TITLE = "stacks", "Stacks of 1x1 and 3x3 convolutions and of linear layers, float32"
# Float32 through six to eight layers: this much of the largest output may be rounding.
TOLERANCE = 1e-4
TIED = {"unstructured": 1, "rows by 4": 4}
CASES = [
    Case(f"{n}-{p.replace(' ', '-')}-{z}", {"stack": n, "pattern": p, "density": round(1 - z, 2)}, quick=z == 0.9)
    for n in NAMES
    for p in TIED
    for z in ZEROS
]
GROUPS = {
    "best dense engine": (
        "torch_eager",
        "torch_onednn",
        "torch_compile",
        "onnxruntime_fp32",
        "openvino_fp32",
        "litert_fp32",
    ),
    "DeepSparse": ("deepsparse_fp32",),
    "torch CSR": ("torch_csr",),
    "scipy CSR": ("scipy_csr",),
}
PANEL = ("stack", "pattern")


def dense_case(case):
    """Dense engines multiply zeros like any numbers: they are timed once per stack."""
    return f"{case.labels['stack']}-unstructured-0.9"


def build(case):
    return stack(case.labels["stack"], round(1 - case.labels["density"], 2), TIED[case.labels["pattern"]])


def exact(case, data):
    return exact_output(data)


def work(case, data):
    return {"flops": data.kept_flops}


def export(case, data, folder):
    np.savez(folder / "inputs.npz", x=data.x.numpy())
    for name in ("model.onnx", "model-old.onnx"):
        (folder / name).write_bytes(onnx_bytes(data))
    layers = enumerate(data.layers)
    parts = {f"w{i}": (a.w_MCHW if a.kernel else a.w_MK).numpy() for i, a in layers}
    parts |= {f"b{i}": a.bias_M.numpy() for i, a in enumerate(data.layers)}
    parts |= {f"relu{i}": np.array(a.activation == "relu") for i, a in enumerate(data.layers)}
    np.savez(folder / "layers.npz", x=data.x.numpy(), **parts)
