"""The stacks benchmark: our solvers compute its stacks, and its weights are pruned as it says."""

from importlib import import_module

import pytest
import torch

from benchmarks.stacks.problem import TOLERANCE
from benchmarks.stacks.stacks import NAMES, exact_output, stack


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("solver", "tied"),
    [("ours_unstructured", 1), ("ours_unstructured_panels", 1), ("ours_grouped4", 4), ("ours_grouped4_panels", 4)],
)
def test_our_solvers_compute_the_stacks(solver, tied, name):
    module = import_module(f"benchmarks.stacks.solvers.{solver}")
    small = stack(name, 0.9, tied)
    truth = exact_output(small)
    run = module.prepare(small, torch.get_num_threads())
    for _ in range(2):
        assert float((run().double() - truth).abs().max() / truth.abs().max()) <= TOLERANCE


def test_grouped_weights_share_columns_and_keep_what_was_asked():
    for layer in stack("mlp", 0.8, 4).layers:
        kept = (layer.w_MK != 0).view(-1, 4, layer.w_MK.shape[1])
        assert bool((kept == kept[:, :1]).all()) and float(kept.double().mean()) == pytest.approx(0.2, abs=0.01)
