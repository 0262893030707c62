"""Argument block and scratch memory of one calling thread, so that callers never share any."""

from __future__ import annotations

import ctypes
import threading

import torch

_FIELDS = 64


class _Workplace(threading.local):
    def __init__(self):
        self.args = (ctypes.c_int64 * _FIELDS)()
        self.args_at = ctypes.addressof(self.args)
        self.scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self.scratch_at = self.scratch_bytes = 0

    def scratch_of(self, wanted: int) -> int:
        """Address of at least `wanted` bytes on a 64-byte boundary; grown when needed and kept for the next call."""
        if wanted > self.scratch_bytes:
            self.scratch = torch.empty(wanted // 4 + 17, dtype=torch.float32, device="cpu")
            self.scratch_at = -(-self.scratch.data_ptr() // 64) * 64
            self.scratch_bytes = wanted
        return self.scratch_at


workplace = _Workplace()
