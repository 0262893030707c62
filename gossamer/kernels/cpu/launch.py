"""A kernel laid out for one size of work: everything but the addresses is decided, so that a call costs microseconds.

Every kernel reads one block of int64: SLOT and NEXT (counters that hand out scratch memory and tasks), SCRATCH (address
of the scratch memory of all threads), the addresses a call brings, then the fixed numbers of the layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from gossamer.kernels.cpu.bands import Bands
from gossamer.kernels.cpu.threads import Entry
from gossamer.kernels.cpu.workplace import workplace

# Byte offsets of what every block starts with; the first address stands at `ADDRESSES`.
SLOT, NEXT, SCRATCH, ADDRESSES = range(0, 32, 8)


@dataclass(frozen=True)
class Launch:
    """A kernel and its layout. Safe to share between threads: the argument block belongs to the caller's thread.

    Args:
        entry: the compiled kernel.
        threads: how many threads the work pays for.
        scratch_bytes: scratch memory of all threads together.
        block: packs counters, addresses and fixed numbers.
        fixed: the fixed numbers, packed.
        holds: whatever must live as long as the addresses among the fixed numbers.
        bands: how it falls apart for threads that each do their own part; None where tasks are handed out.
    """

    entry: Entry
    threads: int
    scratch_bytes: int
    block: struct.Struct
    fixed: bytes
    holds: tuple = ()
    bands: Bands | None = None

    def run(self, *addresses: int) -> None:
        """Run on the memory at these addresses, in the order the kernel names them."""
        place = workplace
        scratch_at = place.scratch_of(self.scratch_bytes)
        self.block.pack_into(place.args, 0, 0, 0, scratch_at, *addresses, self.fixed)
        self.entry.run(place.args_at, self.threads)


def launch(
    entry: Entry,
    *,
    addresses: int,
    fixed: tuple[int, ...],
    threads: int,
    scratch_bytes: int = 0,
    holds: tuple = (),
    bands: Bands | None = None,
) -> Launch:
    """Lay out a kernel that takes this many addresses and these fixed int64 numbers after them."""
    block = struct.Struct(f"={3 + addresses}q{8 * len(fixed)}s")
    return Launch(entry, threads, scratch_bytes, block, struct.pack(f"={len(fixed)}q", *fixed), holds, bands)
