"""MiniLM with real weights, 128 tokens, linear layers of all blocks pruned in groups of four rows."""

import torch

from benchmarks.harness import Case
from benchmarks.networks import Network

NAME, TITLE = "encoder", "MiniLM encoder, 128 tokens, groups of four rows, float32"
TOLERANCE = 1e-3
TOKENS, BATCHES, ZEROS = 128, (1, 8), (0.0, 0.5, 0.7, 0.8, 0.9)
CASES = [
    Case(f"batch{b}-{z}", {"batch": b, "density": round(1 - z, 2)}, quick=b == 1 and z in (0.0, 0.8))
    for b in BATCHES
    for z in ZEROS
]
GROUPS = {
    "best dense engine": ("torch_eager", "torch_compile", "onnxruntime_fp32", "openvino_fp32", "deepsparse_dense"),
    "DeepSparse": ("deepsparse_fp32",),
}
PANEL = ("batch",)


def dense_case(case):
    """Dense engines run the network as it was trained."""
    return f"batch{case.labels['batch']}-0.0"


def build(case):
    from gossamer import prune
    from gossamer.data import load_model

    model = load_model("minilm")
    model.pooler = None  # embeddings are means of the last hidden state
    if case.labels["density"] < 1:
        prune(model, "magnitude", density=case.labels["density"], pattern="([o] {4}) [i]")
    draw = torch.Generator().manual_seed(7)
    ids_BT = torch.randint(1000, model.config.vocab_size, (case.labels["batch"], TOKENS), generator=draw)
    return Network(model, {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)})


def exact(case, data):
    return data.exact()


def export(case, data, folder):
    data.export(folder)
