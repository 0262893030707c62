"""backend="sparse": the supports, losses and slots of the masked path, with nothing stored but what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import Pattern, get_method
from gossamer.core.errors import FileDamaged, TargetError, UnknownName
from gossamer.nn import SparseLinear

MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1),
}
METHODS = {
    "static": {},
    "set": {"total_steps": 12, "every": 2},
    "rigl": {"total_steps": 12, "every": 2},
    "gradual_magnitude": {"total_steps": 8, "every": 2, "start_density": 0.5},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))


def start(method: str, backend: str, make: str = "sgd", **options):
    model = net()
    opt = MAKERS[make](model.parameters())
    options = {"density": 0.05, "skip": ["4"], "backend": backend, **METHODS[method], **options}
    return model, opt, gossamer.attach(model, method, optimizer=opt, **options)


def train(model, opt, handle, steps, parts: int = 1) -> list[float]:
    losses = []
    for step in steps:
        opt.zero_grad()
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        for part in x.chunk(parts):
            loss = (model(part) - part[:, :8]).square().mean() / parts
            loss.backward()
        opt.step()
        handle.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("method", METHODS)
def test_supports_losses_and_slots_are_those_of_the_masked_path(method, make, parts):
    masked, sparse = start(method, "masked", make), start(method, "sparse", make)
    for step in range(12):
        steps = range(step, step + 1)
        torch.testing.assert_close(train(*sparse, steps, parts), train(*masked, steps, parts), rtol=1e-4, atol=1e-6)
        want, got = masked[2].supports(), sparse[2].supports()
        assert all(torch.equal(want[n].kept, got[n].kept) for n in want)
    assert [r.kept for r in masked[2].report()] == [r.kept for r in sparse[2].report()]
    assert masked[2].report().flops == sparse[2].report().flops
    assert method == "static" or sparse[2].report().sad == masked[2].report().sad > 0
    for name, support in got.items():
        layer = sparse[0].get_submodule(name)
        assert isinstance(layer, SparseLinear) and layer.values.numel() == support.count
        original = masked[0].get_submodule(name).parametrizations.weight.original
        want, got_ = masked[1].state[original], sparse[1].state[layer.values]
        for slot in (k for k, v in want.items() if v.shape == original.shape):
            torch.testing.assert_close(got_[slot], want[slot][support.kept], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_compiled_and_scaled_training_moves_the_same_links(method):
    plain, compiled, scaled = (start(method, "sparse") for _ in range(3))
    want = train(*plain, range(8))
    torch._dynamo.reset()
    assert train(torch.compile(compiled[0], backend="aot_eager"), *compiled[1:], range(8)) == pytest.approx(want)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        scaled[1].zero_grad()
        x = torch.randn(16, 40, generator=torch.Generator().manual_seed(step))
        scaler.scale((scaled[0](x) - x[:, :8]).square().mean()).backward()
        scaler.step(scaled[1])
        scaler.update()
        scaled[2].step()
    for _, _, handle in (compiled, scaled):
        assert all(torch.equal(s.kept, plain[2].supports()[n].kept) for n, s in handle.supports().items())


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_exact(method, tmp_path):
    whole = start(method, "sparse", "adamw")
    train(*whole, range(5))
    torch.save([part.state_dict() for part in whole], tmp_path / "state.pt")
    train(*whole, range(5, 12))
    again = start(method, "sparse", "adamw")
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*again, range(5, 12))
    for a, b in zip(whole[0].state_dict().values(), again[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert whole[2].report() == again[2].report()


def test_a_state_of_the_other_backend_is_refused():
    masked, sparse = start("set", "masked")[2], start("set", "sparse")[2]
    for handle, state in ((masked, sparse.state_dict()), (sparse, masked.state_dict())):
        with pytest.raises(FileDamaged, match="stores weights another way"):
            handle.load_state_dict(state)
    earlier = {k: v for k, v in masked.state_dict().items() if k != "backend"}  # states did not say so once
    masked.load_state_dict(earlier)


def test_removing_gives_linear_layers_back_that_train_on_as_masked_ones_would():
    masked, sparse = start("set", "masked"), start("set", "sparse")
    for model, opt, handle in (masked, sparse):
        train(model, opt, handle, range(5))
        handle.remove()
    assert all(isinstance(sparse[0][i], nn.Linear) for i in (0, 2)) and not sparse[2].held
    torch.testing.assert_close(dict(sparse[0].named_parameters()), dict(masked[0].named_parameters()))
    keep = type("keep", (), {"step": lambda self: None})()
    torch.testing.assert_close(train(*sparse[:2], keep, range(3)), train(*masked[:2], keep, range(3)))


def test_momenta_from_before_attaching_are_taken_along():
    found = []
    for backend in ("masked", "sparse"):
        model = net()
        opt = MAKERS["adamw"](model.parameters())
        train(model, opt, type("none", (), {"step": lambda self: None})(), range(2))
        handle = gossamer.attach(model, "magnitude", density=0.1, optimizer=opt, skip=["4"], backend=backend)
        found.append(train(model, opt, handle, range(2, 6)))
    torch.testing.assert_close(*found)


def test_what_cannot_be_sparse_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 8))
    refused = {"backend": "sparse", "density": 0.1}
    with pytest.raises(TargetError, match="'0' is a Conv2d"):
        gossamer.attach(model, "static", **refused)
    with pytest.raises(TargetError, match="the whole model"):
        gossamer.attach(nn.Linear(8, 8), "static", **refused)
    with pytest.raises(TargetError, match="bfloat16"):
        gossamer.attach(nn.Sequential(nn.Linear(8, 8).bfloat16()), "static", **refused)
    with pytest.raises(TargetError, match="optimizer="):
        gossamer.attach(model, "gradual_magnitude", targets=["2"], total_steps=9, **refused)
    two_way = replace(get_method("magnitude")(density=0.5), backward=Pattern("[o i]"))
    with pytest.raises(TargetError, match="second support"):
        gossamer.attach(model, two_way, targets=["2"], backend="sparse")
    with pytest.raises(TargetError, match="lets pruned weights learn"):
        gossamer.attach(model, "sr_ste", pull=0.0, targets=["2"], backend="sparse")
    with pytest.raises(UnknownName, match="sparse"):
        gossamer.attach(model, "static", density=0.1, backend="sparsse")
    assert type(model[2]) is nn.Linear
    handle = gossamer.attach(
        net(), "gradual_magnitude", density=0.1, total_steps=9, every=1, optimizer="later", backend="sparse"
    )
    with pytest.raises(TargetError, match=r"handle\.follow"):
        handle.step()
    with pytest.raises(TargetError, match="optimizer='later'"):  # one built before would train nothing here
        gossamer.attach(model, "static", targets=["2"], **refused)
    later = {**refused, "optimizer": "later"}
    handle = gossamer.attach(model, "static", targets=["2"], **later)
    assert type(model[2]) is SparseLinear and type(model[3]) is nn.Linear
    with pytest.raises(TargetError, match=r"new parameters.*handle\.follow"):
        handle.step()
    with pytest.raises(TargetError, match="'2' is held already"):
        gossamer.attach(model, "static", targets=["2"], **later)
    gossamer.attach(model, "static", targets=["3"], skip=["2"], **later)
    with pytest.raises(TargetError, match="'2' is held already"):
        gossamer.attach(model, "static", skip=["0"], **later)


class Called(nn.Module):
    """One sample without a batch axis, and inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.first(x).tanh())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 6)])
def test_the_dense_gradient_is_the_masked_one_in_full_precision(shape, kind):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=kind)
    found = {}
    for backend in ("masked", "sparse"):
        model = Called().to(kind)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        how = {"density": 0.5, "total_steps": 4, "every": 1, "backend": backend}
        handle = gossamer.attach(model, "rigl", optimizer=opt, **how)
        model(x).square().sum().backward()
        found[backend] = handle._gradients.take()
    torch.testing.assert_close(found["sparse"], found["masked"])
