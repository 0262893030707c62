"""Layouts of zeros in files against what compressed-tensors writes, and against damage.

The expected parts were printed by compressed-tensors 0.14.0.1 (its last release with sparse formats), in an environment
of its own: `BaseCompressor.load_from_registry(name, config=...).compress({"a.weight": w})` on the matrices below.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FileDamaged, FormatError
from gossamer.formats.layouts import BITMASK, SPARSE_24_BITMASK, SPARSE_BITMASK

NAME = "a.weight"
ANY = torch.tensor([[0.0, 2, 0, -4, 0, 0, 0, 0, 1.5, 0], [0.0] * 10, [1.0, 2, 3, 0, 5, 6, 7, 8, 0, -9]])
FOURS = torch.tensor([[0.0, 2, 0, -4, 0.5, 0, 0, 3], [1, 0, -1, 0, 0, 7, 8, 0], [0, 1, 2, 0, 3, 0, 0, 4]]).bfloat16()
PRINTED = {
    SPARSE_BITMASK: {
        "a.shape": [3, 10],
        "a.compressed": [2.0, -4.0, 1.5, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0, -9.0],
        "a.bitmask": [[10, 1], [0, 0], [247, 2]],
        "a.row_offsets": [0, 3, 3],
    },
    SPARSE_24_BITMASK: {
        "a.shape": [[3], [8]],
        "a.compressed": [[2.0, -4.0, 0.5, 3.0], [1.0, -1.0, 7.0, 8.0], [1.0, 2.0, 3.0, 4.0]],
        "a.bitmask": [[154], [101], [150]],
    },
}
DTYPES = {"compressed": None, "bitmask": torch.uint8, "shape": torch.int64, "row_offsets": torch.int64}
ALL = (BITMASK, SPARSE_BITMASK, SPARSE_24_BITMASK)
named = pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.name)


def fitting(layout):
    return FOURS if layout is SPARSE_24_BITMASK else ANY


@pytest.mark.parametrize("layout", PRINTED, ids=lambda layout: layout.name)
def test_the_parts_are_those_of_compressed_tensors(layout):
    w = fitting(layout)
    parts = layout.parts(NAME, w)
    assert {name: part.tolist() for name, part in parts.items()} == PRINTED[layout]
    for name, part in parts.items():
        assert part.dtype is (DTYPES[name.split(".")[1]] or w.dtype)


@given(rows=st.integers(1, 7), cols=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(rows, cols, density, seed):
    lots = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    w = torch.where(lots < density, lots - 0.5, 0.0).bfloat16()
    for layout in (BITMASK, SPARSE_BITMASK):
        assert torch.equal(layout.weight(NAME, layout.parts(NAME, w)), w)
    fours = torch.nn.functional.pad(w, (0, -cols % 4)).view(-1, 4)
    two = torch.where(fours.abs() >= fours.abs().sort(1).values[:, 2:3], fours, 0).view(rows, -1)
    if int((two.view(-1, 4) != 0).sum(1).max()) <= 2:
        assert torch.equal(SPARSE_24_BITMASK.weight(NAME, SPARSE_24_BITMASK.parts(NAME, two)), two)


def test_any_rank_fits_our_own_layout_and_nan_survives():
    w = torch.zeros(3, 2, 5, 1)
    w[1, 0, 2] = float("nan")
    w[2, 1, 4] = -1.0
    back = BITMASK.weight(NAME, BITMASK.parts(NAME, w))
    assert torch.equal(back.nan_to_num(7), w.nan_to_num(7)) and back.shape == w.shape
    for layout in (SPARSE_BITMASK, SPARSE_24_BITMASK):
        with pytest.raises(FormatError, match=r"a\.weight.*holds matrices"):
            layout.parts(NAME, w)


@named
def test_what_no_layout_holds_is_refused(layout):
    for w in (torch.ones(4, 4, dtype=torch.int64), torch.ones(4), torch.ones(4, 4, device="meta")):
        with pytest.raises(FormatError, match=r"a\.weight"):
            layout.parts(NAME, w)


@pytest.mark.parametrize(("w", "why"), [(torch.ones(2, 6), "columns in fours"), (torch.eye(4) + 1, "100.0% of its")])
def test_two_of_four_refuses_what_it_would_have_to_prune(w, why):
    with pytest.raises(FormatError, match=why):
        SPARSE_24_BITMASK.parts(NAME, w)


def spoil(tensors, ending):
    """A file's tensors with one of them altered."""
    name = next(n for n in tensors if n.endswith(ending))
    t = tensors[name].clone()
    if ending.endswith("bitmask"):
        t.view(-1)[0] ^= 1
    elif ending.endswith("shape"):
        t.view(-1)[0] += 1
    elif ending == "row_offsets":
        t[-1] += 1
    else:
        t = t.flatten()[:-1]
    return tensors | {name: t}


@named
def test_parts_that_disagree_are_refused(layout):
    parts = layout.parts(NAME, fitting(layout))
    for name in parts:
        with pytest.raises(FileDamaged, match=r"a\.weight"):
            layout.weight(NAME, spoil(parts, "row_offsets" if name.endswith("row_offsets") else name))
    assert not layout.holds(NAME, dict(list(parts.items())[1:]))


@pytest.mark.parametrize("layout", [BITMASK, SPARSE_BITMASK], ids=lambda layout: layout.name)
def test_bits_beyond_the_last_column_are_refused(layout):
    parts = layout.parts(NAME, ANY)
    bits = next(name for name in parts if name.endswith("bitmask"))
    parts[bits][0, 1] |= 128
    with pytest.raises(FileDamaged, match=r"beyond column 10|row offsets disagree"):
        layout.weight(NAME, parts)
