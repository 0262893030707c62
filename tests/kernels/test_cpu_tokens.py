"""Token panels: conversions, embeddings and elementwise work against plain torch, exactly where nothing is rounded."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from token_panels import poisoned_like, to_panels, to_rows
from torch.nn import functional

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import elementwise as elementwise_module
from gossamer.kernels.cpu import embed as embed_module
from gossamer.kernels.cpu import tokens as tokens_module
from gossamer.kernels.cpu.elementwise import elementwise, plan_elementwise, plan_rotary, rotary, rotary_table
from gossamer.kernels.cpu.embed import embed, plan_embed
from gossamer.kernels.cpu.tokens import (
    empty_panels,
    panels_to_rows,
    plan_panels_to_rows,
    plan_rows_to_panels,
    rows_to_panels,
)

LENGTHS = [(1, 1), (3, 1), (1, 7), (2, 16), (3, 17), (1, 65), (3, 65), (2, 130)]
ATOL = 3e-6


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    for module in (elementwise_module, embed_module, tokens_module):
        monkeypatch.setattr(module, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 5, 16, 45])
@pytest.mark.parametrize(("batch", "seq"), LENGTHS)
def test_rows_to_panels_and_back_is_exact(batch, seq, features, threads):
    x = draw(batch, seq, features)
    panels = rows_to_panels(x)
    assert torch.equal(panels, to_panels(x).nan_to_num(0.0))
    assert torch.equal(panels_to_rows(to_panels(x), batch, seq), x)


def test_plain_rows_are_one_sequence():
    x = draw(70, 9)
    assert torch.equal(panels_to_rows(rows_to_panels(x), 1, 70)[0], x)


def test_wide_rows_are_read_and_written_in_place():
    x = torch.full((3, 17, 20), torch.nan)
    x[..., 4:13] = draw(3, 17, 9)
    panels, around = poisoned_like(empty_panels(3, 17, 9))
    plan_rows_to_panels(3, 17, 9, row=20).run(x.data_ptr() + 16, panels.data_ptr())
    assert torch.equal(to_rows(panels, 3, 17), x[..., 4:13]) and all(side.isnan().all() for side in around)
    y, around = poisoned_like(x)
    plan_panels_to_rows(3, 17, 9, row=20).run(panels.data_ptr(), y.data_ptr() + 16)
    assert torch.equal(y[..., 4:13], x[..., 4:13])
    assert y[..., :4].isnan().all() and y[..., 13:].isnan().all() and all(side.isnan().all() for side in around)


@pytest.mark.parametrize("features", [5, 48])
@pytest.mark.parametrize(("batch", "seq"), LENGTHS)
def test_embeddings_are_summed_in_order(batch, seq, features, threads):
    words, positions, kinds = draw(11, features), draw(140, features, seed=1), draw(2, features, seed=2)
    ids = torch.randint(11, (batch, seq), generator=torch.Generator().manual_seed(3))
    kind = ids % 2
    exact = words[ids] + positions[:seq] + kinds[kind]
    panels = embed((ids, words), (None, positions), (kind, kinds))
    assert torch.equal(to_rows(panels, batch, seq), exact)
    assert torch.equal(panels.nan_to_num(7.0), to_panels(exact).nan_to_num(0.0))
    assert torch.equal(to_rows(embed((ids, words)), batch, seq), words[ids])


def test_sequences_may_share_ids():
    words, positions, ids = draw(11, 8), draw(30, 8, seed=1), torch.arange(6).repeat(3, 1)
    shared, y = torch.arange(10, 16), empty_panels(3, 6, 8)
    bad = torch.zeros(1, dtype=torch.int64)
    plan = plan_embed(3, 6, 8, (11, 30), ids_apart=(6, 0))
    at = [tensor.data_ptr() for tensor in (ids, words, shared, positions)]
    plan.run(*at, 0, 0, y.data_ptr(), bad.data_ptr())
    assert torch.equal(to_rows(y, 3, 6), words[ids] + positions[shared]) and int(bad) == 0


def test_ids_outside_a_table_are_refused():
    words = draw(11, 8)
    for wrong in (11, -1, 2**62):
        with pytest.raises(FormatError, match="1 ids lie outside"):
            embed((torch.tensor([[0, wrong, 3]]), words))
    with pytest.raises(FormatError, match="2 ids lie outside"):
        embed((torch.zeros(2, 12, dtype=torch.int64), words), (None, draw(11, 8)))


EXACT = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hard_swish": functional.hardswish,
}


@pytest.mark.parametrize("activation", EXACT)
def test_elementwise_forms(activation, threads):
    act = EXACT[activation]
    for shape in ((1, 1, 64), (3, 37, 64), (2, 300, 64), (2, 5, 208)):
        x, z = draw(*shape), draw(*shape, seed=1)
        wide, other = x.double(), z.double()
        cases = {
            "alone": (None, act(wide)),
            "add": (z, act(wide + other)),
            "multiply": (z, act(wide) * other),
            "scale": (0.7, act(wide * 0.7)),
        }
        for form, (second, exact) in cases.items():
            got = elementwise(x, second, form=form, activation=activation)
            assert float((got - exact).abs().max()) < ATOL, (form, shape)


def test_gate_and_up_are_halves_of_one_product(threads):
    fused = draw(3, 2 * 33, 64)
    y, around = poisoned_like(torch.empty(3, 40, 64))
    plan = plan_elementwise(
        3, 33, form="multiply", activation="silu", within=(66, 66, 40), offsets=(0, 33, 7), threads=threads
    )
    plan.run(fused.data_ptr(), fused.data_ptr(), y.data_ptr())
    torch.testing.assert_close(y[:, 7:], functional.silu(fused[:, :33]) * fused[:, 33:], atol=ATOL, rtol=0)
    assert y[:, :7].isnan().all() and all(side.isnan().all() for side in around)


def test_y_may_be_an_operand():
    x, z = draw(2, 9, 64), draw(2, 9, 64, seed=1)
    for out in (x.clone(), z.clone()):
        first, second = (out, z) if torch.equal(out, x) else (x, out)
        assert torch.equal(elementwise(first, second, form="add", out=out), x + z)


@pytest.mark.parametrize(("batch", "seq"), LENGTHS)
def test_rotary_turns_halves_as_llama_does(batch, seq, threads):
    heads, half = 3, 5
    x, angle = draw(batch, seq, heads * 2 * half), draw(seq, half, seed=1)
    cos, sin = angle.cos(), angle.sin()
    panels = to_panels(x)
    y = rotary(panels, cos, sin, batch, heads)
    split = x.double().view(batch, seq, heads, 2 * half)
    turned = torch.cat((-split[..., half:], split[..., :half]), -1)
    c, s = (torch.cat((t, t), -1).double()[:, None] for t in (cos, sin))
    exact = (split * c + turned * s).view(batch, seq, -1)
    assert float((to_rows(y, batch, seq) - exact).abs().max()) < ATOL
    assert torch.equal(to_rows(rotary(panels, cos, sin, batch, heads, out=panels), batch, seq), to_rows(y, batch, seq))


def test_rotary_inside_a_fused_product():
    x, angle = to_panels(draw(2, 20, 24)), draw(20, 4, seed=1)
    cos, sin = rotary_table(angle.cos()), rotary_table(angle.sin())
    y = x.clone()
    plan_rotary(2, 20, 2, 8, features=(24, 24), offsets=(3, 3)).run(
        y.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()
    )
    part = rotary(x[:, 3:19].contiguous(), angle.cos(), angle.sin(), 2, 2)
    rows, before = to_rows(y, 2, 20), to_rows(x, 2, 20)
    assert torch.equal(rows[..., 3:19], to_rows(part, 2, 20))
    assert torch.equal(rows[..., :3], before[..., :3]) and torch.equal(rows[..., 19:], before[..., 19:])


def test_concurrent_calls_agree(threads):
    x, ids, words = draw(3, 65, 40), torch.arange(195).view(3, 65) % 11, draw(11, 40)
    work = lambda _: (rows_to_panels(x), embed((ids, words)), elementwise(rows_to_panels(x), activation="gelu"))
    first = work(0)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(first, results))


def test_nothing_to_do():
    assert rows_to_panels(torch.empty(0, 5, 8)).shape == (0, 8, 64)
    assert panels_to_rows(torch.empty(1, 0, 64), 1, 5).shape == (1, 5, 0)
    assert elementwise(torch.empty(0, 4, 64)).shape == (0, 4, 64)
    assert embed((torch.empty(0, 4, dtype=torch.int64), draw(3, 8))).shape == (0, 8, 64)


def test_errors_say_what_to_do():
    x, words = torch.randn(2, 8, 64), draw(3, 8)
    with pytest.raises(FormatError, match="x must be"):
        panels_to_rows(x, 2, 65)
    with pytest.raises(UnknownName, match="form"):
        elementwise(x, form="divide")
    with pytest.raises(FormatError, match="takes panels"):
        elementwise(x, 2.0, form="add")
    with pytest.raises(FormatError, match="takes a number"):
        elementwise(x, x, form="scale")
    with pytest.raises(FormatError, match="takes no second operand"):
        elementwise(x, x)
    with pytest.raises(FormatError, match="multiple of 16"):
        elementwise(torch.randn(2, 8, 20))
    with pytest.raises(FormatError, match="z needs features 5 to 12, got panels of 8"):
        plan_elementwise(2, 8, form="add", offsets=(0, 5, 0))
    with pytest.raises(FormatError, match="int64"):
        embed((torch.zeros(2, 3, dtype=torch.int32), words))
    with pytest.raises(FormatError, match="one to 3 tables"):
        plan_embed(1, 1, 8, (1, 1, 1, 1))
    with pytest.raises(FormatError, match="odd head"):
        plan_rotary(1, 1, 1, 7)
