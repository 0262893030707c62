"""prune: in place, exact, resumable, and clear about what it cannot do."""

from __future__ import annotations

import copy
import inspect
import math
import sys

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.attach import Journal
from gossamer.core.errors import (
    BudgetError,
    CalibrationError,
    FileDamaged,
    GossamerError,
    NonFiniteError,
    PatternError,
    TargetError,
    UnknownName,
)
from gossamer.recipes.prune import prune


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)


def batches(n: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(20, 16, generator=g).to(dtype) for _ in range(n)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt", "global_magnitude"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_densities_are_exact_and_reported_as_they_are(method: str, density: float) -> None:
    model = net()
    report = prune(model, method, density=density, data=batches())
    for line in report.layers:
        assert line.kept == int((model.get_submodule(line.name).weight != 0).sum())
    total = sum(math.prod(r.shape) for r in report.layers)
    slack = sum(r.shape[0] for r in report.layers)  # per-row rounding, half an entry a row
    assert abs(sum(r.kept for r in report.layers) - density * total) <= slack


def test_sparsity_is_the_other_way_to_say_density() -> None:
    a, b = net(), net()
    prune(a, "magnitude", sparsity=0.8)
    prune(b, "magnitude", density=0.2)
    assert all(torch.equal(x, weights(b)[n]) for n, x in weights(a).items())
    with pytest.raises(TargetError, match="give one of the two"):
        prune(a, "magnitude", sparsity=0.8, density=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_types_stay_half(method: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    report = prune(model, method, pattern="2:4", data=batches(dtype=dtype))
    assert report.density == 0.5
    assert all(w.dtype == dtype and bool(w.isfinite().all()) for w in weights(model).values())


def test_allocation_keeps_the_models_count_exact() -> None:
    model = net()
    report = prune(model, "magnitude", density=0.2, allocation="erk")
    assert report.density == pytest.approx(0.2, abs=1e-3)
    assert len({round(r.density, 2) for r in report.layers}) > 1


def test_measured_sensitivity_gives_more_to_layers_that_suffer_more_and_lowers_the_error() -> None:
    model = net()
    # All that the first layer says stands in one input: cutting it is cheap. The others spread theirs.
    model[0].weight.data[:, 1:] *= 0.01
    even, measured = copy.deepcopy(model), copy.deepcopy(model)
    prune(even, "wanda", density=0.4, data=batches())
    report = prune(measured, "wanda", density=0.4, data=batches(), allocation="sensitivity")
    by_name = {r.name: r.density for r in report.layers}
    assert report.density == pytest.approx(0.4, abs=0.02)
    assert by_name["0"] < 0.4 < max(by_name["2"], by_name["4"])
    x = torch.cat(batches())
    errors = [(m(x) - model(x)).square().mean().item() for m in (even, measured)]
    assert errors[1] < errors[0]


def test_allocations_that_cannot_be_are_refused() -> None:
    with pytest.raises(CalibrationError, match="pass data="):
        prune(net(), "magnitude", density=0.4, allocation="sensitivity")
    with pytest.raises(BudgetError, match="fixes it"):
        prune(net(), "magnitude", pattern="2:4", allocation="erk")
    with pytest.raises(TargetError, match="no density for 2, 4"):
        prune(net(), "magnitude", density=0.4, allocation={"0": 0.3})


def test_layers_that_do_not_fit_are_all_named_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 6), nn.Linear(6, 10))
    before = weights(model)
    with pytest.raises(PatternError, match=r"(?s)2 of 3 layers.*1 \(6, 32\).*multiple of 4.*2 \(10, 6\)"):
        prune(model, "magnitude", density=0.5, pattern="4-row")
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    report = prune(model, "magnitude", density=0.5, pattern="4-row", skip=["1", "2"])
    assert [r.name for r in report.layers] == ["0"]
    assert dict(report.skipped) == {"1": "excluded by name", "2": "excluded by name"}


def test_bad_weights_and_meta_models_are_named_before_anything_changes() -> None:
    model = net()
    before = weights(model)
    model[2].weight.data[3, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="layer '2'"):
        prune(model, "magnitude", density=0.5)
    assert torch.equal(model[0].weight, before["0"])
    with pytest.raises(TargetError, match="meta device"):
        prune(net().to("meta"), "magnitude", density=0.5)


def test_user_errors() -> None:
    with pytest.raises(UnknownName, match="did you mean 'wanda'"):
        prune(net(), "wnda", density=0.5)
    with pytest.raises(UnknownName, match=r"no option .dampin.*damping"):
        prune(net(), "sparsegpt", density=0.5, data=batches(), dampin=0.1)
    with pytest.raises(CalibrationError, match="pass data="):
        prune(net(), "wanda", density=0.5)
    with pytest.raises(UnknownName, match="allocation"):
        prune(net(), "magnitude", density=0.5, allocation="erkk")


def test_frozen_transposed_and_odd_layers() -> None:
    model = nn.Sequential(nn.Linear(7, 1), nn.Linear(1, 5), nn.Linear(5, 0))
    model[1].weight = nn.Parameter(torch.randn(1, 5).t(), requires_grad=False)
    prune(model, "sparsegpt", density=0.5, data=[torch.randn(9, 7)])
    assert not model[1].weight.requires_grad
    assert int((model[0].weight != 0).sum()) == 4
    assert model(torch.randn(2, 7)).shape == (2, 0)


def test_conv_and_gpt2_layers_prune_like_the_linear_layers_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    prune(gpt2, "wanda", pattern="2:4", data=[ids])
    groups = gpt2.h[0].mlp.c_fc.weight.t().reshape(-1, 4)  # stored [in, out]; inputs compete
    assert bool(((groups != 0).sum(1) == 2).all())
    conv = nn.Sequential(nn.Conv2d(4, 8, 3))
    report = prune(conv, "sparsegpt", density=0.25, data=[torch.randn(2, 4, 9, 9)])
    assert report.density == 0.25


class Killed(Exception):
    """Stands for kill −9: it leaves through the middle of a run."""


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_killed_run_goes_on_from_the_last_finished_layer(method: str, tmp_path) -> None:
    whole, torn = net(), net()
    prune(whole, method, density=0.4, data=batches())

    def die(name: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        prune(torn, method, density=0.4, data=batches(), workdir=tmp_path, progress=die)
    again = net()  # a fresh process has the dense model
    report = prune(again, method, density=0.4, data=batches(), workdir=tmp_path)
    assert [r.resumed for r in report.layers] == [True, True, False]
    for name, w in weights(whole).items():
        assert torch.equal(w, weights(again)[name])


class Stack(nn.Module):
    """Two residual blocks of two layers in a list, as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        part = lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        self.blocks = nn.ModuleList([part(), part()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("offload", [False, True])
def test_a_run_killed_within_a_block_measures_the_block_as_it_was(offload: bool, tmp_path) -> None:
    whole, other = Stack(), Stack()
    prune(whole, "wanda", density=0.4, data=batches())
    prune(other, "wanda", density=0.4, data=batches(), sequential="layer")
    assert any(not torch.equal(w, weights(other)[n]) for n, w in weights(whole).items())

    def die(name: str, done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        prune(Stack(), "wanda", density=0.4, data=batches(), workdir=tmp_path, offload=offload, progress=die)
    again = Stack()
    report = prune(again, "wanda", density=0.4, data=batches(), workdir=tmp_path, offload=offload)
    assert [r.resumed for r in report.layers] == [True, True, True, False]
    for name, w in weights(whole).items():
        assert torch.equal(w, weights(again)[name])
    with pytest.raises(TargetError):
        prune(Stack(), "wanda", density=0.4, data=batches(), workdir=tmp_path, sequential="layer")


def test_a_workdir_of_another_run_is_refused_and_a_damaged_layer_is_named(tmp_path) -> None:
    prune(net(), "magnitude", density=0.4, workdir=tmp_path)
    with pytest.raises(TargetError, match="holds a run"):
        prune(net(), "magnitude", density=0.5, workdir=tmp_path)
    file = tmp_path / "2.pruned.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileDamaged, match=r"2\.pruned.*delete it"):
        prune(net(), "magnitude", density=0.4, workdir=tmp_path)


def test_a_flipped_bit_in_a_finished_layer_is_seen(tmp_path) -> None:
    prune(net(), "magnitude", density=0.4, workdir=tmp_path)
    file = tmp_path / "2.pruned.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 4
    file.write_bytes(raw)
    with pytest.raises(FileDamaged, match="checksum differs"):
        prune(net(), "magnitude", density=0.4, workdir=tmp_path)
    (tmp_path / "journal.json").write_text("{")
    with pytest.raises(FileDamaged, match="not JSON"):
        prune(net(), "magnitude", density=0.4, workdir=tmp_path)


def test_a_workdir_is_not_mistaken_for_that_of_other_weights_options_or_data(tmp_path) -> None:
    prune(net(), "sparsegpt", density=0.4, data=batches(), workdir=tmp_path)
    other = net()
    other[0].weight.data.add_(1.0)
    with pytest.raises(TargetError, match="other weights"):
        prune(other, "sparsegpt", density=0.4, data=batches(), workdir=tmp_path)
    with pytest.raises(TargetError, match="holds a run with options"):
        prune(net(), "sparsegpt", density=0.4, data=batches(), workdir=tmp_path, damping=0.1)
    with pytest.raises(TargetError, match="holds a run with data"):
        prune(net(), "sparsegpt", density=0.4, data=batches(2), workdir=tmp_path)


def test_a_measured_allocation_is_kept_for_the_run_that_goes_on(tmp_path) -> None:
    arguments = dict(density=0.4, data=batches(), allocation="sensitivity", workdir=tmp_path)
    first = prune(net(), "wanda", **arguments)
    again = prune(net(), "wanda", **arguments)
    assert all(r.resumed for r in again.layers)
    assert [r.kept for r in again.layers] == [r.kept for r in first.layers]


def test_what_would_be_ignored_is_refused() -> None:
    with pytest.raises(TargetError, match="takes no statistics"):
        prune(net(), "magnitude", density=0.5, sequential="block")
    with pytest.raises(UnknownName, match="'layer' or 'block', got 'blocks'"):
        prune(net(), "wanda", density=0.5, sequential="blocks", data=batches())
    sparsifier = gossamer.get_method("magnitude")(density=0.5)
    with pytest.raises(TargetError, match="damping would be ignored"):
        prune(net(), sparsifier, damping=3)
    with pytest.raises(TargetError, match="pattern would be ignored"):
        prune(net(), sparsifier, pattern="2:4")
    with pytest.raises(TargetError, match=r"gossamer\.attach"):
        prune(net(), "gradual_magnitude", density=0.1, total_steps=10)
    with pytest.raises(TargetError, match="compete in one pool"):
        prune(net(), "global_magnitude", density=0.1, allocation="erk")


def test_no_option_of_a_method_has_the_name_of_an_argument_of_prune() -> None:
    taken = set(inspect.signature(prune).parameters) - {"density", "pattern"}
    for name, method in gossamer.core.registry.methods().items():
        assert not taken & set(inspect.signature(method.build).parameters), name


def test_a_model_that_carries_masks_is_refused() -> None:
    model = net()
    handle = gossamer.attach(model, "magnitude", density=0.9)
    with pytest.raises(TargetError, match=r"handle\.remove"):
        prune(model, "magnitude", density=0.1)
    handle.remove()
    assert prune(model, "magnitude", density=0.1).density == pytest.approx(0.1, abs=0.01)


def test_layers_without_column_statistics_stay_dense_and_are_listed() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding="same"))
    report = prune(model, "wanda", density=0.5, data=[torch.randn(2, 4, 9, 9)])
    assert [r.name for r in report.layers] == ["1"]
    assert "grouped convolution" in dict(report.skipped)["0"] and "'same'" in dict(report.skipped)["2"]
    assert bool((model[0].weight != 0).all())
    assert len(prune(model, "magnitude", density=0.5).layers) == 3


def test_an_empty_layer_does_not_upset_a_measured_allocation() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0))
    assert prune(model, "wanda", density=0.5, data=[torch.randn(9, 8)], allocation="sensitivity").density == 0.5


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    journal = Journal(tmp_path, {})
    monkeypatch.setattr(sys.modules["gossamer.attach.journal"], "save_file", full)
    with pytest.raises(GossamerError, match=r"No space.*make room"):
        journal.write("a", torch.ones(3))
    assert [f.name for f in tmp_path.iterdir()] == ["journal.json"]


def test_offloaded_weights_live_on_disk_and_give_the_same_result(tmp_path) -> None:
    near, far = net(), net()
    prune(near, "sparsegpt", density=0.4, data=batches())
    prune(far, "sparsegpt", density=0.4, data=batches(), workdir=tmp_path, offload=True)
    for name, w in weights(near).items():
        assert torch.equal(w, weights(far)[name])
    assert not list(tmp_path.glob("*.dense.*"))
    x = batches()[0]
    torch.testing.assert_close(near(x), far(x))
    with pytest.raises(TargetError, match="pass workdir="):
        prune(net(), "magnitude", density=0.4, offload=True)


def test_top_level_names_are_the_verbs() -> None:
    model = net()
    report = gossamer.prune(copy.deepcopy(model), "magnitude", pattern="2:4")
    assert report.to_dict()["density"] == 0.5
    assert callable(gossamer.attach)
