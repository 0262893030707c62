"""Where kernels cannot run: torch computes instead and says why, a backend that was named is an error; and processes
that compile the same kernels at once."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import FunctionCache

from gossamer.kernels.cpu import cache

ROOT = Path(__file__).parents[2]

FALLBACK = """
import torch
from torch import nn
import gossamer
from gossamer.core.errors import DispatchError
from gossamer.formats import CSR
from gossamer.kernels import explain, resolve
torch.manual_seed(0)
w = torch.randn(32, 48) * (torch.rand(32, 48) < 0.3)
x = torch.randn(5, 48)
plan = resolve(CSR.from_dense(w))
assert plan.backend == "unpack", plan.kernel
assert "refused  cpu/spmm: its compiler does not work here" in explain(plan), explain(plan)
assert torch.allclose(plan.run(x), x @ w.T, atol=1e-5)
def refuses(run):
    try:
        run()
    except DispatchError as error:
        assert "compiler" in str(error), error
        return str(error)
    raise AssertionError("no error")
refuses(lambda: resolve(CSR.from_dense(w), backend="cpu"))
net = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
gossamer.prune(net, "magnitude", density=0.2)
assert "layer by layer" in refuses(lambda: gossamer.compile(net, x))
refuses(lambda: gossamer.pack(net, x, candidates=["csr/cpu"]))
refuses(lambda: gossamer.spgemm(w.to_sparse_csr(), w.T.to_sparse_csr()))
packed = gossamer.pack(net, x, repeats=1)
assert torch.allclose(packed(x), net(x), atol=1e-5)
report = gossamer.report_of(packed)
assert {"dense"} == {layer.format for layer in report.layers}
assert any("compiler" in (t.refused or "") for layer in report.layers for t in layer.trials)
from gossamer.nn import SparseLinear
sparse = SparseLinear(48, 16, density=0.1)
sparse(x).sum().backward()
assert sparse.values.grad is not None
from gossamer.core.errors import MissingDependency
from gossamer.kernels import warm_up
try:
    warm_up("spgemm")
    raise AssertionError("no error")
except MissingDependency as error:
    assert "reinstall numba" in str(error)
from gossamer.cli.doctor import examine
told = {f.what: f for f in examine()}
assert told["kernel compiler"].status == "broken" and "unpack" in told["kernel compiler"].advice
print("fell back")
"""


def child(code, folder, words="", **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GOSSAMER_CACHE_DIR": str(folder), **env}
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)


def broken_package(folder, name):
    """A package of this name that fails at import, found before the real one."""
    package = folder / "broken" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("built for another numpy")')
    return f"{package.parent}{os.pathsep}{ROOT}"


@pytest.mark.parametrize("way", ["numba", "llvmlite", "switched off"])
def test_without_a_compiler_torch_computes_and_says_why(way, tmp_path):
    env = {"NUMBA_DISABLE_JIT": "1"} if way == "switched off" else {"PYTHONPATH": broken_package(tmp_path, way)}
    done = child(FALLBACK, tmp_path, **env)
    assert done.returncode == 0 and "fell back" in done.stdout, done.stderr[-3000:]


WITHOUT_OPENMP = """
import torch
from gossamer.kernels.cpu import threads
threads._mapped_openmp = lambda: None
import gossamer
from torch import nn
from gossamer.kernels.cpu.spmm import spmm
from gossamer.kernels.cpu.spmm_panels import aligned_panels, spmm_panels
from gossamer.formats import CSR
from gossamer.kernels.lowering import lower
assert threads.runner_name() == "Python threads" and threads.team_size_at() == 0 == threads.thread_number_at()
torch.set_num_threads(2)
torch.manual_seed(0)
w = torch.randn(256, 512) * (torch.rand(256, 512) < 0.3)
weight, x = lower(CSR.from_dense(w)), torch.randn(300, 512)
assert (spmm(weight, x) - x @ w.T).abs().max() < 1e-3
panels = aligned_panels(4, 512, 64).normal_()
for _ in range(20):
    y = spmm_panels(weight, panels)
    assert (y - torch.einsum("mk,pkw->pmw", w, panels)).abs().max() < 1e-3
net = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 512)).eval()
gossamer.prune(net, "magnitude", density=0.2)
fast = gossamer.compile(net, x)
assert (fast(x) - net(x)).abs().max() < 1e-4
from gossamer.cli.doctor import _threads
assert "Python threads" in next(_threads()).found
print("python threads")
"""


def test_without_openmp_python_threads_run_every_kernel(tmp_path):
    done = child(WITHOUT_OPENMP, tmp_path, OMP_NUM_THREADS="2")
    assert done.returncode == 0 and "python threads" in done.stdout, done.stderr[-3000:]


COMPILING = """
import sys
import torch
from gossamer.formats import CSR, RowGrouped
from gossamer.kernels.cpu.spmm import spmm
from gossamer.kernels.lowering import lower
torch.manual_seed(0)
x = torch.randn(50, 96)
for g in map(int, sys.argv[1:]):
    w = (torch.randn(64, 96) * (torch.rand(64 // g, 96) < 0.3).repeat_interleave(g, 0))
    weight = lower(CSR.from_dense(w) if g == 1 else RowGrouped.from_dense(w, g=g))
    assert (spmm(weight, x) - x @ w.T).abs().max() < 1e-4, g
print("right")
"""


def test_processes_that_compile_at_once_share_one_cache(tmp_path):
    """Each in another order, so that they store different kernels under one index at the same time."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GOSSAMER_CACHE_DIR": str(tmp_path)}
    orders = ("1248", "4821", "8142")
    some = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILING, *order], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for order in orders
    ]
    ends = [one.communicate() for one in some]
    assert all(said == b"right\n" for said, _ in ends), ends
    later = child(f"import logging; logging.basicConfig(level=logging.INFO)\n{COMPILING}", tmp_path, "1248")
    assert later.returncode == 0 and "compiling" not in later.stderr, later.stderr[-2000:]


def test_damaged_kernels_are_compiled_again(tmp_path):
    assert child(COMPILING, tmp_path, "1").returncode == 0
    for ending in (".nbc", ".nbi"):
        files = [file for file in tmp_path.rglob("*") if file.suffix == ending]
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        again = child(COMPILING, tmp_path, "1")
        assert again.returncode == 0 and again.stdout == "right\n", again.stderr[-2000:]
        assert "damaged" in again.stderr


def nothing(pointer):
    pass


def test_a_disk_that_is_full_leaves_other_kernels_alone(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    forgotten = []
    monkeypatch.setattr(FunctionCache, "save_overload", full)
    monkeypatch.setattr(cache, "_forget", forgotten.append)
    with pytest.raises(OSError, match="No space left"):
        cache.compile_kernel(nothing, "empty")
    assert not forgotten


def test_forgetting_leaves_no_code_that_a_new_index_could_name(monkeypatch, tmp_path):
    (tmp_path / "panels_1").mkdir()
    for name in ("a.nbi", "a.1.nbc", "a.2.nbc"):
        (tmp_path / "panels_1" / name).write_bytes(b"0")
    monkeypatch.setattr(cache, "kernel_dir", lambda: tmp_path)
    cache._forget(EOFError())
    assert not list((tmp_path / "panels_1").iterdir())


def test_kernels_compile_in_nothing_from_outside_the_folder_that_names_their_cache():
    """`abi_version` hashes this folder; what a kernel took from elsewhere would be served stale."""
    for path in Path(cache.__file__).parent.glob("*.py"):
        text = path.read_text()
        if not any(word in text for word in ("llvmlite", "from numba", "compile_kernel")):
            continue
        taken = {node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        ours = {module for module in taken if module.startswith("gossamer")}
        outside = {module for module in ours if not module.startswith(("gossamer.kernels.cpu", "gossamer.core."))}
        assert not outside, f"{path.name} takes from {outside}"
