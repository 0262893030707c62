"""warmup, cache and what doctor says of them."""

import json

import pytest

from gossamer.cli import doctor
from gossamer.core.errors import UnknownName
from gossamer.kernels import caches, tuning, warm, warm_up
from gossamer.kernels.cpu import target


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
