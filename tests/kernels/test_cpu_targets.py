"""The same source on other processors: compiled for each, and its assembly looked at for vector multiply-adds."""

import os
import platform
import re
import subprocess
import sys

import pytest

CHILD = """
import sys
from gossamer.kernels.cpu import resident
library = resident.kernel(int(sys.argv[1]), 2, 0).kernel._library
print(library.get_llvm_str() if sys.argv[2] == "ir" else library.get_asm_str())
"""
RUN = """
import torch
from gossamer.kernels.cpu.spmm_panels import aligned_panels, spmm_panels
from gossamer.kernels.cpu.stream import stream
from gossamer.kernels.reference import ACTIVATIONS
w = torch.randn(45, 700) * (torch.rand(45, 700) < 0.3)
row, column = w.nonzero(as_tuple=True)
starts = torch.zeros(46, dtype=torch.int32)
starts[1:] = torch.bincount(row, minlength=45).cumsum(0)
weight = stream(1, 45, 700, starts, column.to(torch.uint16), w[row, column])
x, added = aligned_panels(2, 700, 112).normal_(), aligned_panels(2, 45, 112).normal_()
for name, exact in ACTIVATIONS.items():
    y = spmm_panels(weight, x, None, name, added, used=100)[..., :100]
    want = exact(torch.einsum("mk,pkw->pmw", w.double(), x.double()) + added)[..., :100]
    assert (y - want).abs().max() < 1e-4, name
"""
ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")


def child(processor, folder, code, *words):
    """Run code in a process that thinks it runs on this processor, with a cache of its own."""
    env = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "GOSSAMER_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def for_arm(ir):
    """Assembly of a module for an ARM server core with NEON."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    ir = re.sub(r'target (datalayout|triple) = "[^"]*"', "", ir)
    ir = re.sub(r'"(target-cpu|target-features|tune-cpu)"="[^"]*"', "", ir)
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    return target.create_target_machine(cpu="neoverse-n1", opt=3).emit_assembly(binding.parse_assembly(ir))


@ON_X86
@pytest.mark.parametrize("g", ["1", "4"])
def test_neon_multiplies_and_adds_vectors(g, tmp_path):
    assembly = for_arm(child("nehalem", tmp_path, CHILD, g, "ir"))
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", assembly)) >= 32
    assert not re.search(r"\bfmadd\s+s\d+", assembly), "a sum was taken one lane at a time"


@ON_X86
@pytest.mark.parametrize("g", ["1", "4"])
def test_avx2_multiplies_and_adds_vectors(g, tmp_path):
    assembly = child("haswell", tmp_path, CHILD, g, "assembly")
    assert len(re.findall(r"\bvfmadd\d+ps\b.*%ymm", assembly)) >= 32 and "%zmm" not in assembly


@ON_X86
def test_avx2_gives_the_same_answers(tmp_path):
    child("haswell", tmp_path, RUN)
