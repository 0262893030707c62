"""The Triton kernels against the plain torch twins: in Triton's interpreter on CPU tensors, on a GPU if there is one.

The interpreter is chosen when Triton is imported, so the products run in a child: this file run as a script.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gossamer.core.errors import DispatchError
from gossamer.formats import NM, Bitmask, Block
from gossamer.kernels import resolve
from gossamer.kernels.reference import spmm_reference

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
SHAPES, COUNTS = [(1, 4), (13, 52), (3, 1300)], (0, 1, 11)
BUILDS = {
    "bitmask": Bitmask.from_dense,
    "2:4": NM.from_dense,
    "6:8": lambda w: NM.from_dense(w, n=6, m=8) if w.shape[1] % 8 == 0 else NM.from_dense(w),
    "4x8": Block.from_dense,
    "5x3": lambda w: Block.from_dense(w, a=5, b=3),
    "32x16": lambda w: Block.from_dense(w, a=32, b=16),
}


def weight(rows, cols, dtype):
    """2:4 sparse, so that every format holds it, with an all-zero row."""
    draw = torch.Generator().manual_seed(0)
    rank = torch.rand(rows, cols // 4, 4, generator=draw).argsort(-1).argsort(-1)
    w = torch.where((rank < 2).view(rows, cols), torch.randn(rows, cols, generator=draw) / cols**0.5, 0.0)
    if rows > 1:
        w[rows // 2] = 0
    return w.to(dtype)


def surrounded(x):
    """The same numbers with NaN before and behind them in memory."""
    whole = torch.full((x.numel() + 128,), torch.nan, dtype=x.dtype, device=x.device)
    whole[64 : 64 + x.numel()] = x.reshape(-1)
    return whole[64 : 64 + x.numel()].view(x.shape)


def check(device, dtypes, tolerance):
    for dtype in dtypes:
        for rows, cols in SHAPES:
            w = weight(rows, cols, dtype).to(device)
            for name, build in BUILDS.items():
                fmt = build(w)
                plan, bias = resolve(fmt, backend="triton"), torch.arange(rows, dtype=dtype, device=device) / rows
                for count in COUNTS:
                    draw = torch.Generator().manual_seed(count)
                    x = surrounded(torch.randn(count, cols, generator=draw).to(dtype).to(device))
                    y, truth = plan.run(x, bias, "gelu"), spmm_reference(fmt, x, bias, "gelu")
                    assert y.dtype == dtype and y.shape == truth.shape
                    assert torch.allclose(y.double(), truth.double(), rtol=tolerance, atol=tolerance), (name, dtype)


@needs_triton
def test_products_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gossamer.kernels.triton import bitmask, block, nm

def build(fn, types, **constants):
    places = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    signature = dict(zip(fn.arg_names, types.split())) | dict.fromkeys(constants, "constexpr")
    assert compile(ASTSource(fn, signature, places), target=GPUTarget("cuda", 90, 32)).asm["cubin"]

for f in ("fp32", "bf16"):
    build(bitmask._rows, f"*u8 *i32 *{f} *{f} *fp32 i32 i32 i32 i32", TOKENS=1, STEP=1024)
    build(nm._rows, f"*{f} *u8 *{f} *fp32 i32 i32 i32 i32 i32", N=2, GROUP=4, BITS=2, TOKENS=8, STEP=1024)
    for a, b, tokens, dot in ((32, 16, 64, True), (4, 8, 16, False)):
        sizes = {"A": a, "B": b, "A_PAD": a, "B_PAD": b, "TOKENS": tokens, "DOT": dot}
        build(block._block_row, f"*i32 *i32 *{f} *{f} *fp32 i32 i32 i32", **sizes)
"""


@needs_triton
def test_machine_code_comes_out_without_a_gpu(tmp_path):
    """For compute capability 9.0; the interpreter accepts what the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    # Triton reads the source of kernels from files.
    script = tmp_path / "build.py"
    script.write_text(COMPILE)
    child = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_on_the_gpu():
    check("cuda", (torch.float32,), 1e-4)
    check("cuda", (torch.bfloat16, torch.float16), 2e-2)


@pytest.mark.parametrize("name", BUILDS)
def test_refused_on_the_cpu_with_a_reason(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DispatchError, match="Triton kernels run on GPUs"):
        resolve(BUILDS[name](weight(8, 16, torch.float32)), backend="triton")


def test_what_triton_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    w = weight(200, 400, torch.float32)
    with pytest.raises(DispatchError, match="blocks of up to 4096"):
        resolve(Block.from_dense(w, a=100, b=100), backend="triton")
    with pytest.raises(DispatchError, match="float32, bfloat16 and float16"):
        resolve(Bitmask.from_dense(w.double()), backend="triton")


if __name__ == "__main__":
    check("cpu", (torch.float32,), 2e-5)
    check("cpu", (torch.float16,), 5e-3)
