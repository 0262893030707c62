"""ONNX: the pruned graph keeps its zeros, in either form, and onnxruntime agrees with torch."""

import pytest
import torch
from torch import nn

import gossamer
from gossamer.deploy.sparse_onnx import leave_out_zeros

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def bert(density):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=16)).eval()
    gossamer.prune(model, "magnitude", density=density)
    return model


EXAMPLE = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}


def matrices(file):
    """Kept entries and shapes of all initializers with two axes, dense or sparse."""
    graph = onnx.load(file).graph
    dense = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    found = [(int((a != 0).sum()), tuple(sorted(a.shape))) for a in dense if a.ndim == 2 and a.dtype.kind == "f"]
    return found + [(s.values.dims[0], tuple(sorted(s.dims))) for s in graph.sparse_initializer]


def linear(model):
    return [
        (int((m.weight != 0).sum()), tuple(sorted(m.weight.shape))) for m in model.modules() if type(m) is nn.Linear
    ]


def onnxruntime(file):
    run = pytest.importorskip("onnxruntime").InferenceSession(str(file)).run
    return torch.from_numpy(run(None, {name: x.numpy() for name, x in EXAMPLE.items()})[0])


def size(folder):
    return sum(f.stat().st_size for f in folder.iterdir())


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_zeros_stay_and_answers_too(density, tmp_path):
    model = bert(density)
    with torch.no_grad():
        want = model(**EXAMPLE)[0]
    for form in ("dense", "sparse"):
        (tmp_path / form).mkdir()
        file = gossamer.export_onnx(model, EXAMPLE, tmp_path / form / "m.onnx", sparse=form == "sparse")
        onnx.checker.check_model(str(file), full_check=form == "dense")
        kept = matrices(file)
        assert all(kept.count(entry) >= linear(model).count(entry) for entry in linear(model))
        torch.testing.assert_close(onnxruntime(file), want, atol=1e-5, rtol=1e-4)
    # At a half, places cost more than zeros, and nothing changes.
    assert (size(tmp_path / "sparse") < size(tmp_path / "dense")) == (density == 0.1)
    assert bool(onnx.load(tmp_path / "sparse" / "m.onnx").graph.sparse_initializer) == (density == 0.1)
    assert leave_out_zeros(tmp_path / "sparse" / "m.onnx") == 0


def test_packed_models_are_exported_as_what_they_came_from(tmp_path):
    model = bert(0.2)
    packed = gossamer.pack(model, EXAMPLE, candidates=["csr/cpu"], repeats=1)
    layers = [type(m) for m in packed.modules()]
    file = gossamer.export_onnx(packed, EXAMPLE, tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(onnxruntime(file), model(**EXAMPLE)[0], atol=1e-5, rtol=1e-4)
    assert [type(m) for m in packed.modules()] == layers
