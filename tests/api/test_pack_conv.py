"""pack on convolutions: the same results before and after, in any memory layout, saved, unpacked and compiled."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core.errors import DispatchError, TargetError
from gossamer.deploy import report_of
from gossamer.deploy.candidates import TORCH_DENSE, Candidate
from gossamer.deploy.convolutions import Convolved, Images, pixels
from gossamer.deploy.examples import call, difference, tensors
from gossamer.deploy.measure import measure
from gossamer.deploy.record import PackReport
from gossamer.nn import PackedConv2d

LAST = torch.channels_last


class Net(nn.Module):
    """Every kind of convolution in a row: strided, dilated, grouped, depthwise, pixels, padded at the ends."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)
        self.pixels = nn.Conv2d(32, 16, 1)
        self.wide = nn.Conv2d(16, 16, (1, 5), padding="same")
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.act(self.stem(x)))
        return self.head(self.wide(self.pixels(self.depthwise(self.grouped(x)))).mean((2, 3)))


class Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 16, 5, stride=2, padding=2), nn.Conv1d(16, 8, 3, dilation=2)

    def forward(self, x):
        return self.b(self.a(x).relu())


def pruned(make, *, last=False):
    torch.manual_seed(0)
    net = make().eval()
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv1d)):
            rows = m.weight.shape[0]
            kept = (torch.rand(rows // 4, *m.weight.shape[1:]) < 0.4).repeat_interleave(4, 0)
            m.weight.data.masked_fill_(~kept, 0)
    return net.to(memory_format=LAST) if last else net


def images(*, last=False):
    x = torch.randn(2, 3, 17, 21, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=LAST) if last else x


def off(a, b, example):
    return difference(*(list(tensors(call(m, example))) for m in (a, b)))


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("w_last", [False, True])
def test_all_kinds_pack_compute_the_same_and_unpack_bit_for_bit(w_last, x_last):
    model, x = pruned(Net, last=w_last), images(last=x_last)
    packed = gossamer.pack(model, x, candidates=["csr/cpu"], repeats=1)
    report = report_of(packed)
    assert report.counts() == {"csr/cpu": 5} and off(packed, model, x) < 1e-4
    assert report.fused == (("stem", "relu"),)
    assert sum(isinstance(m, PackedConv2d) for m in packed.modules()) == 5
    back = gossamer.unpack(packed)
    mine, theirs = back.state_dict(), model.state_dict()
    assert repr(back) == repr(model) and all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert [p.stride() for p in back.parameters()] == [p.stride() for p in model.parameters()]


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("w_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_results_lie_in_memory_as_torch_leaves_them(kernel, w_last, x_last):
    model = pruned(lambda: nn.Conv2d(3, 8, kernel), last=w_last)
    packed, x = PackedConv2d.from_conv(model, "csr"), images(last=x_last)
    with torch.no_grad():
        y, want = packed(x), model(x)
    assert y.stride() == want.stride() and difference([y], [want]) < 1e-5


def test_lines_pack_too():
    model, x = pruned(Lines), torch.randn(3, 4, 29)
    packed = gossamer.pack(model, x, candidates=["rowgrouped/cpu"], repeats=1)
    assert report_of(packed).counts() == {"rowgrouped/cpu": 2} and off(packed, model, x) < 1e-4
    assert report_of(packed).layers[0].kind == "conv 5 /2 on 3x4x29" and report_of(packed).layers[0].tokens == (45,)
    back = gossamer.unpack(packed)
    assert repr(back) == repr(model) and torch.equal(back.b.weight, model.b.weight)


def test_the_choice_is_measured_against_torch_on_the_recorded_images():
    report = report_of(gossamer.pack(pruned(Net), [images(), images()], repeats=2))
    by_name = {r.name: r for r in report.layers}
    grouped = by_name["grouped"]
    tried = {t.candidate: t.ms for t in grouped.trials}
    assert {"dense/dense", "csr/cpu", "rowgrouped(g=4)/cpu"} <= tried.keys() and "dense/onednn" not in tried
    assert grouped.kind == "conv 3x3 in 2 groups on 2x16x9x11" and grouped.tokens == (198, 198)
    for r in report.layers:
        times = {t.candidate: t.ms for t in r.trials if t.ms is not None}
        assert r.ms in times.values() and r.reason
        assert r.format == "dense" or r.ms <= times["dense/dense"]
    assert PackReport.from_dict(report.to_dict()) == report
    assert "conv" in str(report.rows()[0]["kind"])


@pytest.mark.parametrize(("dense_ms", "runs_as"), [(1.0, "dense/torch"), (3.0, "csr/cpu")])
def test_the_faster_way_is_taken(monkeypatch, dense_ms, runs_as):
    def in_turn(ways, repeats, *, cold=None):
        return {name: [{"dense/dense": dense_ms, "csr/cpu": 2.0}.get(name, 4.0)] for name in ways}

    monkeypatch.setenv("GOSSAMER_TUNING", "0")  # such times are not to be remembered
    monkeypatch.setattr("gossamer.deploy.measure.in_turn", in_turn)
    report = report_of(gossamer.pack(pruned(Net), images(), repeats=1))
    convs = [r for r in report.layers if r.kind != "linear"]
    assert len(convs) == 5 and {f"{r.format}/{r.backend}" for r in convs} == {runs_as}
    assert all(("2.0× slower" if dense_ms == 1.0 else "1.5× faster") in r.reason for r in convs)


def test_a_wrong_convolution_is_refused(monkeypatch):
    forward = PackedConv2d.forward
    monkeypatch.setattr(PackedConv2d, "forward", lambda self, x: forward(self, x) * 1.01)
    conv = pruned(lambda: nn.Conv2d(3, 8, 3))
    found = measure(
        Convolved(conv, "none", (Images((1, 3, 9, 9), False),)), (TORCH_DENSE, Candidate("csr", (), "cpu")), 1
    )
    assert "off torch's convolution's" in {t.candidate: t.refused for t in found.trials}["csr/cpu"]


def test_what_cannot_run_a_convolution_says_why():
    with pytest.raises(DispatchError, match=r"layer 'stem'.*\n.*beyond 1x1"):
        gossamer.pack(pruned(Net), images(), candidates=["tilebitmask"], repeats=1)
    with pytest.raises(DispatchError, match=r"beyond 1x1|float32 only"):
        gossamer.pack(pruned(Net).bfloat16(), images().bfloat16(), candidates=["csr"], repeats=1)
    net = pruned(Net)
    net.stem.padding_mode = "reflect"
    skipped = dict(report_of(gossamer.pack(net, images(), repeats=1)).skipped)
    assert "pads with reflect" in skipped["stem"]
    named = report_of(gossamer.pack(pruned(Net), images(), candidates=["dense/onednn"], repeats=1))
    assert {r.backend for r in named.layers if r.kind != "linear"} == {"torch"}


@pytest.mark.parametrize("last", [False, True])
def test_saved_convolutions_come_back(tmp_path, last):
    model, x = pruned(Net, last=last), images(last=last)
    packed = gossamer.pack(model, x, candidates=["csr/cpu"], repeats=1)
    folder = gossamer.save(packed, tmp_path / "m")
    loaded = gossamer.load(folder, model=Net())
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
    assert report_of(loaded) == report_of(packed)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in packed.modules()]
    back = gossamer.unpack(loaded)
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters()))
    assert back.grouped.weight.stride() == model.grouped.weight.stride()
    other = Net()
    other.grouped = nn.Conv2d(16, 32, 3, padding=0, groups=2, bias=False)
    with pytest.raises(TargetError, match=r"'grouped'.*convolution"):
        gossamer.load(folder, model=other)
    other.grouped = nn.Linear(72, 32)
    with pytest.raises(TargetError, match=r"'grouped'.*got Linear"):
        gossamer.load(folder, model=other)


def test_a_bare_convolution_is_packed_saved_and_loaded(tmp_path):
    conv, x = pruned(lambda: nn.Conv2d(3, 8, 3)), images()
    packed = gossamer.pack(conv, x, candidates=["csr"], repeats=1)
    assert isinstance(packed, PackedConv2d) and torch.equal(gossamer.unpack(packed).weight, conv.weight)
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"), model=nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))


def test_packed_convolutions_are_compiled():
    model, x = pruned(Net), images()
    packed = gossamer.pack(model, x, candidates=["csr/cpu"], repeats=1)
    with torch.no_grad():
        torch.testing.assert_close(gossamer.compile(packed, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_output_pixels_are_counted_as_torch_counts_them():
    for conv, shape in ((nn.Conv2d(3, 4, 3, stride=2), (2, 3, 9, 11)), (nn.Conv1d(3, 4, 3, padding="same"), (3, 7))):
        assert pixels(conv, shape) == conv(torch.zeros(shape)).numel() // 4


def test_packed_convolutions_train_their_bias():
    packed = PackedConv2d.from_conv(pruned(lambda: nn.Conv2d(3, 8, 3), last=True), "csr")
    packed(images()).sum().backward()
    assert functional.l1_loss(packed.linear.bias.grad, torch.full((8,), 2.0 * 15 * 19)) == 0
