"""Dispatch: the right kernel, its reasons, and every product against the dense one."""

import logging
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.nn.functional import linear

from gossamer.core.errors import DispatchError, UnknownName
from gossamer.formats import CSR, NM, Bitmask, Block, Dense, RowGrouped, TileBitmask
from gossamer.kernels import BACKENDS, KERNELS, dense, explain, kernel, resolve, sparse
from gossamer.kernels.reference import ACTIVATIONS, spmm_reference

# One table: worst allowed error per dtype, relative and absolute, for sums of about a hundred products.
CLOSE = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
BUILDS = {
    "dense": Dense.from_dense,
    "csr": CSR.from_dense,
    "bitmask": Bitmask.from_dense,
    "tilebitmask": TileBitmask.from_dense,
    "nm": NM.from_dense,
    "rows2": lambda w: RowGrouped.from_dense(w, g=2),
    "rows4": RowGrouped.from_dense,
    "rows3": lambda w: RowGrouped.from_dense(w, g=3),
    "block4x8": Block.from_dense,
    "block8x3": lambda w: Block.from_dense(w, a=8, b=3),
}
SHAPES = [(1, 4), (37, 52), (5, 300)]


def weight(rows, cols, dtype=torch.float32, seed=0):
    """2:4 sparse, so that every format holds it, with an all-zero row."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=rng) / cols**0.5
    rank = torch.rand(rows, cols // 4, 4, generator=rng).argsort(-1).argsort(-1)
    w = torch.where((rank < 2).view(rows, cols), w, torch.zeros(()))
    if rows > 1:
        w[rows // 2] = 0
    return w.to(dtype)


def tokens(count, cols, dtype=torch.float32, seed=1):
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_twin(w, x, bias, activation):
    z = linear(x.double(), w.double(), None if bias is None else bias.double())
    return ACTIVATIONS[activation](z)


def plans(fmt):
    """Every kernel that serves this weight."""
    for backend in BACKENDS:
        try:
            yield resolve(fmt, backend=backend)
        except DispatchError:
            continue


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", BUILDS)
def test_every_kernel_against_the_dense_product(name, dtype):
    for rows, cols in SHAPES:
        w, bias = weight(rows, cols, dtype), tokens(1, rows, dtype, seed=2)[0]
        for plan in plans(BUILDS[name](w)):
            for count in (0, 1, 7, 9, 257):
                x = tokens(count, cols, dtype)
                y = plan.run(x, bias, "none")
                assert y.dtype == dtype and y.shape == (count, rows) and y.is_contiguous(), plan.kernel
                torch.testing.assert_close(y.double(), dense_twin(w, x, bias, "none"), **CLOSE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BUILDS)
def test_activations(name, activation):
    w, bias = weight(37, 52), tokens(1, 37, seed=2)[0]
    for plan in plans(BUILDS[name](w)):
        for count in (1, 40):
            x = 3 * tokens(count, 52)
            for b in (bias, None):
                got = plan.run(x, b, activation).double()
                torch.testing.assert_close(got, dense_twin(w, x, b, activation), **CLOSE[torch.float32])


@pytest.mark.parametrize("name", BUILDS)
def test_poison_stays_in_its_own_token(name):
    w = weight(37, 52)
    for plan in plans(BUILDS[name](w)):
        for poison in (torch.nan, torch.inf):
            for count in (3, 8, 20):
                x = tokens(count, 52)
                x[1, 5], x[2, 51] = poison, poison
                y = plan.run(x, None, "none")
                clean = [0, *range(3, count)]
                torch.testing.assert_close(
                    y[clean].double(), dense_twin(w, x[clean], None, "none"), **CLOSE[torch.float32]
                )
                touched = w[:, 5] != 0
                assert not y[1, touched].isfinite().any(), f"{plan.kernel} lost {poison}"


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (5, 0), (0, 0)])
def test_empty_matrices(name, rows, cols):
    bias = torch.arange(float(rows))
    for plan in plans(BUILDS[name](torch.zeros(rows, cols))):
        for count in (0, 1, 3):
            y = plan.run(torch.zeros(count, cols), bias, "none")
            torch.testing.assert_close(y, bias.expand(count, rows), msg=plan.kernel)


def test_large_scratch_is_walked_in_steps(monkeypatch):
    from gossamer.kernels.reference import products

    w, x = weight(64, 128), tokens(9, 128)
    monkeypatch.setattr(products, "SCRATCH", 4000)
    for name in BUILDS:
        torch.testing.assert_close(spmm_reference(BUILDS[name](w), x), x @ w.t(), rtol=1e-5, atol=1e-5)


def test_preference():
    w = weight(64, 128)
    assert resolve(Dense.from_dense(w)).backend in ("onednn", "dense")
    for name in ("csr", "nm", "rows4", "block4x8"):
        assert resolve(BUILDS[name](w)).kernel == "cpu/spmm"
        narrow = name in ("csr", "rows4")
        assert resolve(BUILDS[name](w.bfloat16())).kernel == ("cpu/narrow" if narrow else "unpack/linear")
    assert resolve(BUILDS["rows3"](w)).kernel == "unpack/linear"
    assert resolve(Bitmask.from_dense(w), tokens=9).kernel == "unpack/linear"


def test_bitmask_decodes_where_the_processor_can():
    reason = sparse.cannot_run_here("bitmask_float32", "decode")
    plan = resolve(Bitmask.from_dense(weight(64, 128)))
    assert plan.kernel == ("cpu/decode" if reason is None else "unpack/linear")


def test_a_named_backend_that_cannot_serve_is_an_error_with_reasons():
    w = weight(64, 128)
    with pytest.raises(DispatchError, match="multiplies float32 only"):
        resolve(CSR.from_dense(w.half()), backend="cpu")
    with pytest.raises(DispatchError, match="groups 1, 2, 4 or 8 rows, the weight groups 3"):
        resolve(BUILDS["rows3"](w), backend="cpu")
    with pytest.raises(DispatchError, match="up to 8 tokens at once, the call has 9; take csr"):
        resolve(Bitmask.from_dense(w), backend="cpu", tokens=9)
    with pytest.raises(DispatchError, match="serves Dense; the weight is csr"):
        resolve(CSR.from_dense(w), backend="onednn")
    with pytest.raises(DispatchError, match="activations are on cuda"):
        resolve(CSR.from_dense(w), backend="cpu", device="cuda")
    with pytest.raises(DispatchError, match="convert one of them"):
        resolve(CSR.from_dense(w), dtype=torch.float16)
    with pytest.raises(UnknownName, match="onednn"):
        resolve(CSR.from_dense(w), backend="onednm")


def test_automatic_choice_logs_and_keeps_every_refusal(caplog):
    with caplog.at_level(logging.INFO, logger="gossamer"):
        plan = resolve(CSR.from_dense(weight(8, 16).bfloat16()))
    refused = {refusal.kernel: refusal.reason for refusal in plan.refusals}
    assert set(refused) | {plan.kernel, *plan.others} == {known.label for known in KERNELS}
    for label, reason in refused.items():
        assert any(label in line and reason in line for line in caplog.messages)
        assert label in explain(plan) and reason in explain(plan)
    assert "spmm multiplies float32 only" in refused["cpu/spmm"]


def test_onednn_steps_aside_when_its_trial_fails(monkeypatch):
    def wrong(x, packed, bias, attribute, scalars, algorithm):
        return torch.zeros(x.shape[0], bias.shape[0])

    stand_in = type("Ops", (), {"_reorder_linear_weight": lambda *_: None, "_linear_pointwise": staticmethod(wrong)})
    dense.onednn_refusal.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", stand_in(), raising=False)
    plan = resolve(Dense.from_dense(weight(8, 16)))
    monkeypatch.undo()
    dense.onednn_refusal.cache_clear()
    assert plan.kernel == "dense/linear"
    assert any("off by" in refusal.reason for refusal in plan.refusals if refusal.kernel == "onednn/linear")


def test_a_missing_compiler_is_a_reason_not_a_crash(monkeypatch):
    def absent(name):
        raise ImportError("no numba here")

    monkeypatch.setattr(sparse, "import_module", absent)
    plan = resolve(CSR.from_dense(weight(8, 16)))
    assert plan.kernel == "unpack/linear"
    assert any("no numba here" in refusal.reason for refusal in plan.refusals)
    with pytest.raises(DispatchError, match="no numba here"):
        resolve(CSR.from_dense(weight(8, 16)), backend="cpu")


def test_registering_twice_is_refused():
    with pytest.raises(DispatchError, match="registered twice"):
        kernel("linear", CSR, name="spmm", backend="cpu")(sparse.Spmm)
    with pytest.raises(UnknownName, match="cpu"):
        kernel("linear", CSR, name="spmm", backend="cpuu")


def test_plans_are_frozen_and_count_their_own_bytes():
    w = weight(64, 128)
    plan = resolve(CSR.from_dense(w), backend="unpack")
    with pytest.raises(FrozenInstanceError):
        plan.backend = "cpu"
    assert plan.extra_nbytes == 0
    grouped = resolve(RowGrouped.from_dense(w), backend="cpu")
    assert grouped.extra_nbytes == grouped.runner.stream.starts_BG.nbytes, "indices and values are shared"
    widened = resolve(NM.from_dense(w), backend="cpu")
    assert widened.extra_nbytes == widened.runner.stream.starts_BG.nbytes + 2 * 64 * 64
