"""warmup, cache and what doctor says of them."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from gossamer.cli import doctor
from gossamer.core.errors import UnknownName
from gossamer.formats import RowGrouped
from gossamer.kernels import caches, tuning, warm, warm_up
from gossamer.kernels.cpu import spmm_panels, target
from gossamer.kernels.lowering import lower
from gossamer.nn import PackedConv2d, PackedLinear


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of our own; what is compiled already stays where it is."""
    monkeypatch.setattr(caches, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(tuning, "cache_root", lambda: tmp_path)
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    return tmp_path


def fill(folder):
    inner = folder / "kernels" / "cpu" / "panels_1"
    inner.mkdir(parents=True)
    for name in ("a.nbi", "a.1.nbc", "a.2.nbc"):
        (inner / name).write_bytes(b"0" * 100)
    tuning.remember("pack", {"n": 1}, 1.0)


def test_warmup_says_what_is_ready(gossamer):
    held = json.loads(gossamer("warmup", "spgemm", "--json").stdout)
    assert held["compiled"] + held["from_disk"] == len(held["kernels"]) == 7 and held["refused"] == 0
    shown = gossamer("warmup", "spgemm")
    assert shown.exit_code == 0 and "7 kernels are ready" in shown.stdout and "spgemm" in shown.stdout


def test_warmup_refuses_an_unknown_kind_before_any_work(gossamer):
    result = gossamer("warmup", "decodes")
    assert result.exit_code == 3 and "'decode'" in result.stderr


@pytest.mark.parametrize("kind", warm.KINDS)
def test_every_kind_names_its_kernels(kind):
    names = [name for name, _ in warm.KINDS[kind]()]
    assert names and len(set(names)) == len(names)


def test_layers_need_no_kernel_beyond_the_warm_ones(monkeypatch):
    from gossamer.kernels.cpu import conv_kernel, narrow_loops, resident

    monkeypatch.setattr(warm, "GROUPS", (2,))
    monkeypatch.setattr(spmm_panels, "_kernels", {})
    factories = (conv_kernel.kernel, narrow_loops.kernel, resident.kernel)
    for factory in factories:
        factory.cache_clear()
    for kind in ("networks", "images", "bfloat16"):
        for name, bring in warm.KINDS[kind]():
            if "groups of" in name:
                bring()
    made = [factory.cache_info().misses for factory in factories]
    assert made == [8, 4, 2]
    with torch.no_grad():
        for order in (None, torch.arange(7, -1, -1)):
            fmt = partial(RowGrouped.from_dense, g=2, order=order)
            for activation in ("none", "relu", "gelu"):
                layer = nn.Linear(16, 8).bfloat16()
                packed = PackedLinear.from_linear(layer, fmt, backend="cpu", activation=activation)
                packed(torch.ones(3, 16).bfloat16())
            for size, stride in ((17, 1), (14, 2), (8, 1), (7, 2)):
                conv = nn.Conv2d(2, 8, 3, stride, 1)
                PackedConv2d.from_conv(conv, fmt, backend="cpu")(torch.ones(1, 2, size, size))
            weights, panels = lower(fmt(torch.ones(8, 16))), spmm_panels.aligned_panels(1, 16, 64)
            spmm_panels.spmm_panels(weights, panels.zero_(), activation="gelu")
    assert [factory.cache_info().misses for factory in factories] == made


def test_what_this_processor_cannot_run_is_said_and_is_no_error(gossamer, monkeypatch):
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(warm, "_FLOATS", warm._FLOATS[:1])
    from gossamer.kernels.cpu import decode, int4decode, tiledecode

    int4decode.kernel_for.cache_clear(), tiledecode.kernel_for.cache_clear()
    monkeypatch.setattr(decode, "_kernels", {})
    held = json.loads(gossamer("warmup", "int4", "decode", "--json").stdout)
    assert held["refused"] == len(held["kernels"]) == 14
    assert all("AVX-512" in kernel["refused"] for kernel in held["kernels"])


def test_progress_counts_to_the_end():
    seen = []
    done = warm_up("spgemm", progress=lambda name, at, total: seen.append((at, total)))
    assert seen == [(i, len(done)) for i in range(len(done) + 1)]
    with pytest.raises(UnknownName, match="spgemm"):
        warm_up("spgem")


def test_cache_lists_and_clears(gossamer, folder):
    fill(folder)
    listed = {c["name"]: c for c in json.loads(gossamer("cache", "--json").stdout)}
    assert listed["kernels"]["entries"] == 2 and listed["kernels"]["bytes"] == 300
    assert listed["tunings"]["entries"] == 1 and set(listed) == {"kernels", "tunings", "assets"}
    assert json.loads(gossamer("cache", "clear", "tunings", "--json").stdout)["tunings"] > 0
    assert not (folder / "tunings").exists() and (folder / "kernels").exists()
    assert json.loads(gossamer("cache", "clear", "--json").stdout) == {"kernels": 300, "tunings": 0}
    assert gossamer("cache", "clear", "kernel").exit_code == 3
    assert "kernels" in gossamer("cache", "list").stdout


def test_doctor_tells_of_the_caches_and_how_to_clear_them(folder, monkeypatch):
    fill(folder)
    told = {f.what: f for f in doctor._caches()}
    assert "2 functions" in told["cache for compiled kernels"].found
    assert "1 measurements" in told["cache for measured times"].found
    assert "gossamer cache clear tunings" in told["cache for measured times"].advice
    monkeypatch.setenv(tuning.SWITCH, "0")
    assert any(f.found == "not kept" and tuning.SWITCH in f.advice for f in doctor._caches())
