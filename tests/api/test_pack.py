"""pack, fuse and unpack: what runs after packing is what ran before, and the report says what was done."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gossamer
from gossamer.attach.targets import find
from gossamer.attach.weights import Masked
from gossamer.core import Density, Support, select
from gossamer.core.errors import CalibrationError, DispatchError, FormatError, NonFiniteError, TargetError, UnknownName
from gossamer.deploy import report_of
from gossamer.deploy.candidates import DENSE, Candidate, automatic
from gossamer.deploy.examples import call, difference, tensors
from gossamer.deploy.fuse import FusedActivation, activation_of
from gossamer.deploy.measure import Measured, Product, choose, measure
from gossamer.deploy.record import PackReport, Trial
from gossamer.deploy.structure import density_of, detect
from gossamer.deploy.timing import median, quiet
from gossamer.nn.linear import PackedLinear


def prune(model, density=0.25, pattern="4-row"):
    for target in find(model).targets:
        w = target.weight(model).detach()
        kept = select(w.abs(), pattern, Density(density)).kept
        target.write(model, torch.where(kept, w, torch.zeros(())))
    return model.eval()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=32)).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)).eval()


def llama(tied=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=tied)).eval()


def tokens(*shape):
    return {"input_ids": torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))}


def agree(a, b, example):
    got, want = (list(tensors(call(m, example))) for m in (a, b))
    return difference(got, want) < 1e-4 and len(got) > 0


SPARSE = ["rowgrouped/cpu"]
MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_packed_transformers_compute_the_same_and_unpack_bit_for_bit(make):
    model, example = prune(make()), tokens(2, 8)
    packed = gossamer.pack(model, example, candidates=SPARSE, repeats=1)
    report = report_of(packed)
    assert report.counts() == {"rowgrouped/cpu": len(report.layers)} and len(report.layers) >= 8
    assert agree(packed, model, example)
    back = gossamer.unpack(packed)
    mine, theirs = back.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert {n: type(m) for n, m in back.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    assert not any(isinstance(m, PackedLinear) for m in model.modules()), "the original was changed"


@pytest.mark.parametrize(
    ("make", "activation", "count"), [(bert, "gelu", 2), (gpt2, "gelu_tanh", 2), (llama, "silu", 2)]
)
def test_activations_fuse_into_the_layer_before_them(make, activation, count):
    model, example = prune(make()), tokens(2, 8)
    packed = gossamer.pack(model, example, candidates=SPARSE, repeats=1)
    assert [a for _, a in report_of(packed).fused] == [activation] * count
    assert sum(isinstance(m, FusedActivation) for m in packed.modules()) == count
    loose = gossamer.pack(model, example, candidates=SPARSE, repeats=1, fuse=False)
    assert report_of(loose).fused == () and agree(packed, loose, example)


def test_vit_and_sequential_fuse():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    vit = prune(ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval(), pattern="unstructured")
    packed = gossamer.pack(vit, {"pixel_values": torch.randn(2, 3, 32, 32)}, candidates=["csr"], repeats=1)
    assert len(report_of(packed).fused) == 1
    net = prune(mlp())
    packed = gossamer.pack(net, torch.randn(16, 48), candidates=["csr"], repeats=1)
    assert dict(report_of(packed).fused) == {"0": "gelu", "2": "relu"}


class SharedActivation(nn.Module):
    """One ReLU used twice, and one whose input is used again: neither may fuse."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.act, self.other = nn.ReLU(), nn.SiLU()

    def forward(self, x):
        y = self.act(self.b(self.act(self.a(x))))
        z = self.c(y)
        return z + self.other(z)


class Hidden(nn.Module):
    """Traces as fusable, yet reads the activation through a side door, which only running it shows."""

    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(16, 16), nn.ReLU()

    def forward(self, x):
        return self.act(self.a(x)) + self.act.forward(x - 1)


def test_what_feeds_more_than_one_activation_is_not_fused():
    for model in (SharedActivation(), Hidden()):
        model = prune(model.eval())
        packed = gossamer.pack(model, torch.randn(8, 16), candidates=["csr"], repeats=1)
        assert report_of(packed).fused == ()
        assert agree(packed, model, torch.randn(8, 16))


def test_activations_are_known_by_what_they_compute():
    from transformers.activations import ACT2FN

    assert activation_of(nn.GELU()) == "gelu" and activation_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_of(ACT2FN["gelu_new"]) == "gelu_tanh" and activation_of(ACT2FN["silu"]) == "silu"
    for other in (nn.Tanh(), nn.PReLU(), nn.Identity(), nn.Softmax(-1), nn.LeakyReLU(), ACT2FN["quick_gelu"]):
        assert activation_of(other) is None


def test_structure_is_found():
    torch.manual_seed(0)
    w = torch.randn(32, 64)

    def masked(pattern, budget):
        return torch.where(select(w.abs(), pattern, budget).kept, w, torch.zeros(()))

    found = {p: [s.name for s in detect(masked(p, Density(0.25)))] for p in ("8-row", "4-row", "2-row", "4x8", "8x4")}
    assert found["8-row"][0] == "8-row groups" and found["4-row"][0] == "4-row groups"
    assert found["2-row"] == ["2-row groups"]
    assert found["4x8"][0] == "4x8 blocks" and found["8x4"][0] == "8x4 blocks"
    assert [s.name for s in detect(masked("unstructured", Density(0.25)))] == []
    from gossamer.core import Keep

    assert [s.name for s in detect(masked("2:4", Keep(2)))] == ["2:4"]
    assert detect(w) == ()


def test_negative_zeros_are_zeros():
    w = -torch.ones(8, 8)
    w[:, ::2] *= 0.0
    assert density_of(w) == 0.5
    net = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()
    net[0].weight.data.copy_(w)
    packed = gossamer.pack(net, torch.randn(16, 8), candidates=["csr"], repeats=1)
    assert packed[0].density == 0.5 and torch.equal(packed[0].weight, w)


def test_automatic_choice_measures_checks_and_explains():
    net = prune(mlp())
    packed = gossamer.pack(net, torch.randn(64, 48), repeats=2)
    report = report_of(packed)
    first = report.layers[0]
    tried = {t.candidate for t in first.trials}
    assert {"dense/dense", "dense/onednn", "csr/cpu", "rowgrouped(g=4)/cpu"} <= tried
    assert first.tokens == (64,) and first.density == pytest.approx(0.25) and first.reason
    chosen = {t.ms for t in first.trials if t.ms is not None}
    assert first.ms in chosen and first.best_dense_ms <= first.dense_ms
    assert report.difference < 1e-4
    assert "bitmask/cpu" not in tried and "tilebitmask" in {c.format for c in automatic(0.5, (), 1)}


def test_layers_on_both_sides_of_ten_percent_do_not_share_what_is_tried():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    for layer, zeros in zip(net, (409, 410)):  # of 4096: both are 10 % when rounded
        layer.weight.data.view(-1)[torch.randperm(4096)[:zeros]] = 0
    few, more = report_of(gossamer.pack(net, torch.randn(32, 64), repeats=1)).layers
    assert few.shared_with is None and more.shared_with is None
    assert {t.candidate for t in more.trials} > {t.candidate for t in few.trials}


def test_report_survives_json():
    report = report_of(gossamer.pack(prune(mlp()), torch.randn(8, 48), repeats=1))
    again = PackReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report and again.rows()[0]["layer"] == "0"


def test_alike_layers_share_one_measurement():
    net = prune(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)))
    layers = report_of(gossamer.pack(net, torch.randn(8, 32), repeats=1)).layers
    assert [r.shared_with for r in layers] == [None, "0", "0"]
    assert len({r.ms for r in layers}) == 1


def test_dense_weights_are_freed_and_counted():
    net = prune(nn.Sequential(nn.Linear(256, 256)), 0.1)
    packed = gossamer.pack(net, torch.randn(32, 256), candidates=SPARSE, repeats=1)
    report = report_of(packed)
    held = sum(t.numel() * t.element_size() for t in [*packed.parameters(), *packed.buffers()])
    assert held < 0.2 * report.bytes_before and held <= report.bytes_after < 0.2 * report.bytes_before
    assert report.bytes_on_disk == held


def test_inplace_changes_the_model_itself():
    net = prune(mlp())
    assert gossamer.pack(net, torch.randn(8, 48), candidates=["csr"], repeats=1, inplace=True) is net
    assert isinstance(net[0], PackedLinear)
    assert gossamer.unpack(net, inplace=True) is net and type(net[0]) is nn.Linear and type(net[1]) is nn.GELU


def test_a_bare_linear_packs_and_unpacks():
    layer = prune(nn.Sequential(nn.Linear(32, 16)))[0]
    packed = gossamer.pack(layer, torch.randn(8, 32), candidates=["csr"], repeats=1)
    assert isinstance(packed, PackedLinear) and torch.equal(gossamer.unpack(packed).weight, layer.weight)


class ThreeOfWhichTwoRun(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.cells(x)[0])


def test_recurrent_layers_are_listed_as_dense():
    packed = gossamer.pack(prune(Recurrent()), torch.randn(2, 4, 8), candidates=["csr"], repeats=1)
    assert "recurrent layers have no packed kernel" in dict(report_of(packed).skipped)["cells"]


def test_tied_hooked_and_unreached_layers_are_left_with_a_reason():
    packed = gossamer.pack(prune(llama(tied=True)), tokens(1, 8), candidates=["csr"], repeats=1)
    reasons = dict(report_of(packed).skipped)
    assert "shared" in reasons["lm_head"]
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    net = prune(ThreeOfWhichTwoRun())
    net.b.register_forward_hook(lambda module, args, y: y)
    packed = gossamer.pack(net, torch.randn(4, 8), candidates=["csr"], repeats=1)
    reasons = dict(report_of(packed).skipped)
    assert "hooks" in reasons["b"] and "never ran" in reasons["c"]


def test_prompt_and_decode_share_one_layer():
    model = prune(llama(), 0.5, "unstructured")
    prompt, one = tokens(1, 16), tokens(1, 1)
    packed = gossamer.pack(model, [prompt, one], candidates=["tilebitmask/cpu"], repeats=1)
    assert report_of(packed).layers[0].tokens == (16, 1)
    assert agree(packed, model, prompt) and agree(packed, model, one)


def test_generation_with_a_packed_model_gives_the_same_tokens():
    model = prune(llama(), 0.5, "unstructured")
    packed = gossamer.pack(model, [tokens(1, 12), tokens(1, 1)], repeats=1)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**tokens(1, 12), **options), packed.generate(**tokens(1, 12), **options))


def test_named_candidates_never_fall_back():
    net = prune(mlp(), pattern="unstructured")
    with pytest.raises(DispatchError, match=r"layer '0', 128 tokens.*\n.*bitmask/cpu: .*up to 8 tokens"):
        gossamer.pack(net, torch.randn(128, 48), candidates=["bitmask/cpu"], repeats=1)
    with pytest.raises(DispatchError, match="float32 only"):
        gossamer.pack(prune(mlp()).double(), torch.randn(16, 48).double(), candidates=["csr/cpu"], repeats=1)
    with pytest.raises(UnknownName, match="rowgrouped"):
        gossamer.pack(net, torch.randn(8, 48), candidates=["rowgruped"])
    with pytest.raises(UnknownName, match="cpu"):
        gossamer.pack(net, torch.randn(8, 48), candidates=["csr/cpus"])
    with pytest.raises(FormatError, match="option"):
        gossamer.pack(net, torch.randn(8, 48), candidates=["rowgrouped(h=4)/cpu"])


def test_named_options_are_obeyed():
    net = prune(mlp())
    packed = gossamer.pack(net, torch.randn(8, 48), candidates=["rowgrouped(g=2)/cpu"], repeats=1)
    assert packed[0].fmt.g == 2


def test_bf16_models_pack():
    net = prune(mlp(), 0.5, "unstructured").bfloat16()
    x = torch.randn(2, 48).bfloat16()
    packed = gossamer.pack(net, x, repeats=1)
    with torch.no_grad():
        assert torch.allclose(packed(x).float(), net(x).float(), atol=3e-2)


def test_densities_zero_and_one():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    net[0].weight.data.zero_()
    packed = gossamer.pack(net, torch.randn(8, 16), repeats=1)
    assert agree(packed, net, torch.randn(8, 16))
    all_zero = gossamer.pack(net, torch.randn(8, 16), candidates=["csr", "dense"], repeats=1)
    assert agree(all_zero, net, torch.randn(8, 16))


@pytest.mark.parametrize("kind", [math.nan, math.inf])
def test_non_finite_weights_are_named(kind):
    net = mlp()
    net[2].weight.data[3, 4] = kind
    with pytest.raises(NonFiniteError, match="layer '2'"):
        gossamer.pack(net, torch.randn(8, 48), repeats=1)


def test_what_cannot_be_packed_is_refused_in_words():
    net = mlp()
    parametrize.register_parametrization(net[0], "weight", Masked(torch.ones(96, 48, dtype=torch.bool)))
    with pytest.raises(TargetError, match=r"handle\.remove\(\)"):
        gossamer.pack(net, torch.randn(8, 48))
    with pytest.raises(TargetError, match="no linear layer"):
        gossamer.pack(nn.Sequential(nn.ReLU()), torch.randn(8, 48))
    with pytest.raises(TargetError, match="meta"):
        gossamer.pack(nn.Sequential(nn.Linear(8, 8, device="meta")), torch.randn(8, 8))
    with pytest.raises(CalibrationError, match="mapping"):
        gossamer.pack(mlp(), [])
    packed = gossamer.pack(prune(mlp()), torch.randn(8, 48), candidates=["csr"], repeats=1)
    with pytest.raises(TargetError, match="packed already"):
        gossamer.pack(packed, torch.randn(8, 48))
    with pytest.raises(TargetError, match="no packing report"):
        report_of(mlp())


def test_a_candidate_with_wrong_numbers_is_refused(monkeypatch):
    from gossamer.kernels import sparse

    honest = sparse.Spmm.run
    monkeypatch.setattr(sparse.Spmm, "run", lambda self, x, b, a: honest(self, x, b, a) * 1.01)
    net = prune(mlp())
    report = report_of(gossamer.pack(net, torch.randn(32, 48), repeats=1))
    assert all(r.format == "dense" for r in report.layers)
    assert any("off F.linear" in (t.refused or "") for t in report.layers[0].trials)


def _measured(**ms):
    names = {"dense": "dense/dense", "onednn": "dense/onednn", "csr": "csr/cpu", "nm": "nm/cpu"}
    sizes = {"dense": 400, "onednn": 800, "csr": 300, "nm": 200}
    trials = tuple(Trial(names[k], v, sizes[k]) for k, v in ms.items())
    return Measured(trials, {names[k]: 0.0 for k in ms})


def test_choice_takes_the_fastest_and_the_smaller_within_noise():
    csr, nm = Candidate("csr", (), "cpu"), Candidate("nm", (), "cpu")
    every = (*DENSE, csr, nm)

    def winner(min_gain=1.0, **ms):
        return choose(_measured(**ms), every, min_gain, "half", 0.5)

    assert winner(dense=4.0, onednn=2.0, csr=1.0, nm=1.5).winner.candidate == "csr/cpu"
    assert winner(dense=4.0, onednn=2.0, csr=1.0, nm=1.01).winner.candidate == "nm/cpu"
    slow = winner(dense=4.0, onednn=2.0, csr=3.0, nm=5.0)
    assert slow.winner.candidate == "dense/onednn" and "csr/cpu is 1.5× slower" in slow.reason
    assert "2.0× faster than dense oneDNN" in winner(dense=4.0, onednn=2.0, csr=1.0, nm=3.0).reason
    assert winner(min_gain=3.0, dense=4.0, onednn=2.0, csr=1.0, nm=3.0).winner.candidate == "dense/onednn"


def test_measuring_runs_each_distinct_number_of_tokens():
    w = torch.randn(16, 16) * (torch.rand(16, 16) < 0.3)
    seen = measure(Product(w, None, "none", (4, 4, 9)), (*DENSE, Candidate("csr", (), "cpu")), 1)
    assert {t.candidate for t in seen.trials if t.ms} == {"dense/dense", "dense/onednn", "csr/cpu"}


def test_a_busy_machine_moves_the_median_but_not_the_fastest_runs():
    times = [1.0, 1.01, 1.02, *[30.0] * 17]
    assert median(times).ms == 30.0 and quiet(times).ms == 1.01 and quiet([3.0]).ms == 3.0


def test_support_of_a_packed_layer_is_the_pruned_one():
    net = prune(mlp(), 0.3, "unstructured")
    packed = gossamer.pack(net, torch.randn(8, 48), candidates=["csr"], repeats=1)
    assert Support(packed[0].weight != 0) == Support(net[0].weight != 0)
