"""Adapters: laws that hold for every method of site "delta", and what the base refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import gossamer
from gossamer.attach.delta import Adapter, Delta
from gossamer.attach.low_rank import LowRank
from gossamer.core import methods
from gossamer.core.errors import FileDamaged, TargetError, UnknownName
from tests.oracles.adapters import OPTIONS, Block, batch, blocks, train

METHODS = tuple(methods(site="delta"))
NEARLY = ("sparse_spectral",)  # a weight is not bit for bit the product of its factors
every = pytest.mark.parametrize("method", METHODS)


def adapted(method: str, dtype: torch.dtype = torch.float32, **more: object):
    model = blocks(dtype)
    return model, gossamer.adapt(model, method, **{**OPTIONS.get(method, {}), **more})


@every
def test_every_method_is_documented(method):
    found = gossamer.get_method(method, site="delta")
    text = found.build.__doc__ or ""
    assert found.summary.endswith(".") and found.paper and "Reference:" in text and "Example:" in text
    with pytest.raises(UnknownName, match="did you mean 'seed'"):
        gossamer.adapt(blocks(), method, sed=1)


@every
def test_nothing_changes_before_the_first_step(method):
    model, _ = adapted(method)
    exact = 0 if method not in NEARLY else 1e-5
    torch.testing.assert_close(model(batch(model)), blocks()(batch(model)), atol=exact, rtol=exact)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_the_same_model_and_unmerge_the_same_bits(method, dtype):
    model, adapters = adapted(method, dtype)
    before = {n: p.clone() for n, p in model.named_parameters() if "deltas" not in n}
    train(model, adapters.parameters(), after=adapters.step)
    learnt = model(batch(model))
    assert (learnt != blocks(dtype)(batch(model))).any()
    report = adapters.merge(zeros="fill")
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(batch(model)), learnt, atol=tolerance, rtol=tolerance)
    assert adapters.merged and {r.layer for r in report} == {n for n, _ in adapters.layers()}
    with pytest.raises(TargetError, match="call unmerge"):
        adapters.step()
    adapters.unmerge()
    after = dict(model.named_parameters())
    assert all((after[n].view(torch.int8) == b.view(torch.int8)).all() for n, b in before.items())
    assert (model(batch(model)) == learnt).all()


@every
def test_saved_and_loaded_is_the_same_model(method, tmp_path):
    model, adapters = adapted(method, also=["1.up_proj.bias"])
    train(model, adapters.parameters(), after=adapters.step)
    learnt = model(batch(model))
    adapters.save(tmp_path)
    again = blocks()
    loaded = gossamer.load_adapter(again, tmp_path, name="mine")
    assert (again(batch(again)) == learnt).all() and loaded.names == ("mine",)
    assert loaded.trainable == adapters.trainable
    # It goes on where the first one stands.
    for m, a in ((model, adapters), (again, loaded)):
        train(m, a.parameters(), after=a.step)
    assert (again(batch(again)) == model(batch(model))).all()


@every
def test_model_state_goes_round(method):
    model, adapters = adapted(method)
    train(model, adapters.parameters(), after=adapters.step)
    other, _ = adapted(method)
    other.load_state_dict(model.state_dict())
    assert (other(batch(other)) == model(batch(model))).all()
    assert (copy.deepcopy(model)(batch(model)) == model(batch(model))).all()


@every
def test_switching_and_removing(method):
    model, adapters = adapted(method)
    adapters.add(method, name="b", **OPTIONS.get(method, {}))
    plain = blocks()(batch(model))
    outputs = {}
    for name in ("default", "b"):
        adapters.use(name)
        train(model, adapters.parameters(), steps=2 if name == "b" else 3, after=adapters.step)
        outputs[name] = model(batch(model))
    for name, expected in outputs.items():
        adapters.use(name)
        assert (model(batch(model)) == expected).all()
    adapters.use(None)
    assert (model(batch(model)) == plain).all() and adapters.trainable == 0
    adapters.drop("default")
    assert adapters.names == ("b",)
    adapters.remove()
    assert type(model[0].down_proj) is nn.Linear and model.state_dict().keys() == blocks().state_dict().keys()
    assert all(p.requires_grad for p in model.parameters()) and (model(batch(model)) == plain).all()


@every
def test_autocast_and_compiled_graphs(method):
    model, adapters = adapted(method)
    train(model, adapters.parameters(), after=adapters.step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch(model))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 or y.dtype == torch.float32
    torch.testing.assert_close(y.float(), model(batch(model)), atol=0.1, rtol=0.1)
    gradients = [p.grad.clone() for p in adapters.parameters() if p.grad is not None]  # some take turns
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    for p in adapters.parameters():
        p.grad = None
    fast = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(fast(batch(model)), model(batch(model)))


@every
def test_zeros_of_a_pruned_model_stay_where_they_are_asked_to(method):
    model = blocks()
    gossamer.prune(model, "magnitude", density=0.5)
    zeros = {n: p == 0 for n, p in model.named_parameters() if n.endswith("weight")}
    adapters = gossamer.adapt(model, method, keep_zeros=True, **OPTIONS.get(method, {}))
    train(model, adapters.parameters(), after=adapters.step)
    learnt = model(batch(model))
    adapters.merge()
    torch.testing.assert_close(model(batch(model)), learnt, atol=1e-5, rtol=1e-5)
    assert all((p[zeros[n]] == 0).all() for n, p in model.named_parameters() if n in zeros)


def test_filled_zeros_are_refused_cut_or_counted():
    model = blocks()
    gossamer.prune(model, "magnitude", density=0.5)
    adapters = gossamer.adapt(model, "s2ft", density=0.5)
    train(model, adapters.parameters())
    before = {n: p.clone() for n, p in model.named_parameters() if "deltas" not in n}
    with pytest.raises(TargetError, match="would fill"):
        adapters.merge()
    assert not adapters.merged and all((model.get_parameter(n) == p).all() for n, p in before.items())
    assert all(r.zeros_after >= r.zeros_before for r in adapters.merge(zeros="keep"))
    adapters.unmerge()
    assert all(r.zeros_after < r.zeros_before for r in adapters.merge(zeros="fill"))


def test_tied_layers_learn_once():
    model = blocks()
    model[1].down_proj.weight = model[0].down_proj.weight
    adapters = gossamer.adapt(model, "s2ft", density=0.25)
    assert adapters.trainable == 8 * 4 and len(list(adapters.layers())) == 2
    train(model, adapters.parameters())
    learnt = model(batch(model))
    adapters.merge()
    torch.testing.assert_close(model(batch(model)), learnt)
    adapters.unmerge()
    assert (model(batch(model)) == learnt).all()
    adapters.remove()
    assert model[1].down_proj.weight is model[0].down_proj.weight


def test_other_kinds_of_layers():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), nn.Unflatten(-1, (6, 1)), nn.Conv1d(6, 4, 1), nn.Flatten())
    x = torch.randn(5, 8)
    plain = model(x)
    adapters = gossamer.adapt(model, "s2ft", density=0.5, targets=["0", "2"])
    assert [tuple(p.shape) for p in adapters.parameters()] == [(6, 4), (4, 3, 1)]
    (model(x) - 1).square().mean().backward()
    assert (model(x) == plain).all() and all(p.grad.any() for p in adapters.parameters())
    with torch.no_grad():
        for p in adapters.parameters():
            p.normal_()
    learnt = model(x)
    adapters.merge()
    torch.testing.assert_close(model(x), learnt)


def test_what_learns_besides():
    model, adapters = adapted("s2ft", also=["1.up_proj.*"])
    assert model[1].up_proj.weight.requires_grad and not model[0].up_proj.weight.requires_grad
    train(model, adapters.parameters())
    assert (model[1].up_proj.weight != blocks()[1].up_proj.weight).any()
    with pytest.raises(TargetError, match="matches none"):
        gossamer.adapt(blocks(), "s2ft", also=["classifier.*"])


class Halved(Delta):
    """For the base's own tests: half of the weight, and a penalty."""

    kind = "halved"

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def change(self, w):
        return self.values * w

    def penalty(self, w):
        return self.values.square()


def test_a_delta_of_the_least_that_is_needed():
    model = blocks()
    halved = Adapter("halved", lambda w, place: Halved(torch.tensor(-0.5)), targets=("*down_proj",))
    adapters = gossamer.adapt(model, halved)
    expected = blocks()
    for block in expected:
        block.down_proj.weight.data *= 0.5
    torch.testing.assert_close(model(batch(model)), expected(batch(model)))
    assert adapters.penalty().item() == 0.5 and float(adapted("s2ft")[1].penalty()) == 0
    with pytest.raises(TargetError, match="cannot be fused"):
        adapters.fuse("twice", {"default": 2.0})
    with pytest.raises(TargetError, match="its options already"):
        gossamer.adapt(blocks(), halved, rank=3)


def test_what_is_refused():
    model, adapters = adapted("s2ft")
    with pytest.raises(TargetError, match="carries adapters already"):
        gossamer.adapt(model, "lora")
    for reads_weights in (
        lambda: gossamer.pack(model, batch(model)),
        lambda: gossamer.save(model, "nowhere"),
        lambda: gossamer.rearrange(model, batch(model)),
        lambda: gossamer.Decoder(model),
    ):
        with pytest.raises(TargetError, match="carry adapters"):
            reads_weights()
    with pytest.raises(UnknownName, match="did you mean 'default'"):
        adapters.use("defautl")
    with pytest.raises(TargetError, match="called 'default' already"):
        adapters.add("lora", name="default")
    with pytest.raises(TargetError, match="plain word"):
        adapters.add("lora", name="a.b")
    with pytest.raises(TargetError, match="is in use"):
        adapters.drop("default")
    adapters.add("lora", name="low", rank=1, targets=["*down_proj"])
    with pytest.raises(TargetError, match="different kinds"):
        adapters.fuse("mixed", {"default": 1.0, "low": 1.0})
    adapters.use({"default": 1.0, "low": 0.5})
    with pytest.raises(TargetError, match="2 adapters are in use"):
        adapters.save("nowhere")
    with pytest.raises(TargetError, match=r"call gossamer\.adapt"):
        gossamer.prune(blocks(), "s2ft")
    with pytest.raises(TargetError, match=r"call gossamer\.prune"):
        gossamer.adapt(blocks(), "wanda")


@pytest.mark.parametrize(
    ("model", "target", "why"),
    [
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), "a.out_proj", "not called"),
        (lambda: nn.ModuleDict({"a": nn.TransformerEncoderLayer(8, 2, 8)}), "a.linear1", "not called"),
        (lambda: nn.ModuleDict({"a": nn.LSTM(8, 8)}), "a.weight_hh_l0", "recurrent"),
    ],
)
def test_layers_that_would_not_see_a_change(model, target, why):
    with pytest.raises(TargetError, match=why):
        gossamer.adapt(model(), "lora", targets=[target])


def test_a_head_tied_to_an_embedding_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False), "fc": nn.Linear(8, 8)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(TargetError, match="shares its weight with an embedding"):
        gossamer.adapt(model, "lora", targets=["head"])


def test_files_that_are_damaged_or_do_not_fit(tmp_path):
    adapted("s2ft")[1].save(tmp_path)
    wide = nn.Sequential(Block(16), Block(16))
    with pytest.raises(TargetError, match=r"does not fit layer '0\.down_proj'"):
        gossamer.load_adapter(wide, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"sha256": "0"}))
    with pytest.raises(FileDamaged, match="is not the file"):
        gossamer.load_adapter(blocks(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(TargetError, match="type 'IA3'"):
        gossamer.load_adapter(blocks(), tmp_path)
    with pytest.raises(FileDamaged, match="no readable adapter"):
        gossamer.load_adapter(blocks(), tmp_path / "nothing")


def test_lora_is_what_it_says_and_starts_anew_in_each_layer():
    model, adapters = adapted("lora", alpha=6)
    with torch.no_grad():
        for delta in adapters.deltas().values():
            delta.B.normal_()
    one, two = (adapters.deltas("default")[n] for n in ("0.up_proj", "1.up_proj"))
    assert isinstance(one, LowRank) and (one.A != two.A).any() and one.A.abs().max() <= 8**-0.5
    x = batch(model)
    expected = x @ (model[0].up_proj.weight + 3 * one.B @ one.A).T + model[0].up_proj.bias
    torch.testing.assert_close(model[0].up_proj(x), expected)
    adapters.fuse("twice", {"default": 2.0})
    adapters.use("twice")
    torch.testing.assert_close(model[0].up_proj(x), expected + x @ (3 * one.B @ one.A).T)
