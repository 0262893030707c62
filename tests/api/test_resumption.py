"""Every method that trains, in every way people train: exact counts, zeros that stay, and exact resumption."""

from __future__ import annotations

import pytest
import torch
from training_ways import STEPS, WAYS, Training, begin, training_methods

from gossamer.core.shrink import hard

METHODS = tuple(training_methods())


def same(a: object, b: object) -> bool:
    """Equal bit for bit, through mappings and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def test_the_methods_that_train_are_found():
    assert {"rigl", "set", "static", "gradual_magnitude", "global_magnitude", "snip"} <= set(METHODS)
    assert not {"wanda", "sparsegpt"} & set(METHODS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(method, way, tmp_path):
    torch.manual_seed(1)
    whole = WAYS[way](method)
    at = 5
    whole.run(range(at))
    torch.save(whole.state(), tmp_path / "state.pt")
    whole.run(range(at, STEPS))
    end = whole.state()
    again = WAYS[way](method)
    torch.manual_seed(99)  # whatever the new process drew
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    again.run(range(at, STEPS))
    assert same(end, again.state())
    assert whole.handle.report() == again.handle.report()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_may_stop_after_any_step(method):
    whole, states = begin(method), []
    for step in range(STEPS):
        whole.run(range(step, step + 1))
        states.append(_copied(whole))
    for step in range(STEPS - 1):
        again = begin(method)
        again.load(states[step])
        again.run(range(step + 1, step + 2))
        assert same(states[step + 1], again.state()), f"stopped after step {step + 1}"


def _copied(run: Training) -> dict[str, object]:
    clone = lambda x: x.clone() if isinstance(x, torch.Tensor) else x
    return torch.utils._pytree.tree_map(clone, run.state())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_pruned_is_zero_in_every_way_of_training(method, way):
    run = WAYS[way](method)
    if run.handle.sparsifier.shrink is not hard or run.handle.sparsifier.explore:
        pytest.skip(f"{method} lets pruned weights learn on")
    for step in range(6):
        before = {n: s.kept.clone() for n, s in run.handle.supports().items()}
        run.run(range(step, step + 1))
        for name, support in run.handle.supports().items():
            layer = run.model.get_submodule(name)
            w = layer.parametrizations.weight.original
            assert not w[~support.kept].any() and not w.grad[~before[name]].any()
            slots = [s for s in run.optimizer.state[w].values() if s.shape == w.shape]
            assert slots and not any(s[~support.kept].any() for s in slots)
            if run.mean is not None:
                assert not run.mean.module.get_submodule(name).weight[~support.kept].any()
