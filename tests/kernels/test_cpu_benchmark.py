"""The SpMM benchmark: our solvers compute its stacks, and a wrong answer never yields a speed-up."""

import pytest
import torch

from benchmarks.spmm import solvers
from benchmarks.spmm.run import Case, speedups
from benchmarks.spmm.stacks import NAMES, exact, stack
from benchmarks.spmm.worker import TOLERANCE


def case(solver, zeros, ms, *, ok=True):
    made = Case(solver, "mlp", zeros, 1)
    for _ in range(3):
        made.take({"median_ms": ms, "error": 0.0 if ok else 1.0, "kept_flops": 1e6, "ok": ok})
    return made


def test_a_speedup_is_the_ratio_of_medians_to_the_fastest_right_engine():
    cases = [case("ours_grouped4", 0.9, 1.0), case("openvino_fp32", 0.9, 6.0), case("torch_onednn", 0.9, 8.0)]
    gain = speedups(cases)[0]
    assert gain["over_best_dense"] == 6.0 and gain["best_dense_engine"] == "openvino_fp32"


def test_wrong_numbers_on_either_side_give_no_speedup():
    wrong_ours = [case("ours_grouped4", 0.9, 1.0, ok=False), case("openvino_fp32", 0.9, 6.0)]
    assert speedups(wrong_ours)[0]["over_best_dense"] is None and "wrong numbers" in speedups(wrong_ours)[0]["refused"]
    wrong_peer = [case("ours_grouped4", 0.9, 1.0), case("torch_csr", 0.9, 6.0, ok=False)]
    assert speedups(wrong_peer)[0]["over_torch_csr"] is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", solvers.OURS)
def test_our_solvers_compute_the_stacks(solver, name):
    module = solvers.load(solver)
    if name not in getattr(module, "STACKS", NAMES):
        pytest.skip(f"{solver} is for {module.STACKS} only")
    small = stack(name, 0.9, module.TIED)
    truth = exact(small)
    got = module.prepare(small, torch.get_num_threads())()
    assert float((got.double() - truth).abs().max() / truth.abs().max()) <= TOLERANCE


def test_grouped_weights_share_columns_and_keep_what_was_asked():
    for layer in stack("mlp", 0.8, 4).layers:
        kept = (layer.w_MK != 0).view(-1, 4, layer.w_MK.shape[1])
        assert bool((kept == kept[:, :1]).all()) and float(kept.double().mean()) == pytest.approx(0.2, abs=0.01)
