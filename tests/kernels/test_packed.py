"""PackedLinear and PackedConv2d as layers: shapes, moves, copies, files, compilers, threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from gossamer.core.errors import DispatchError, FormatError, UnknownName
from gossamer.formats import CSR, NM, Bitmask, Block, Dense, RowGrouped, TileBitmask
from gossamer.nn import PackedConv2d, PackedLinear

BUILDS = {
    "dense": Dense,
    "csr": CSR,
    "bitmask": Bitmask,
    "tilebitmask": TileBitmask,
    "nm": NM,
    "rows4": RowGrouped,
    "block4x1": partial(Block.from_dense, a=4, b=1),
}


def sparse_layer(cols=20, rows=13, bias=True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(5)
    layer = nn.Linear(cols, rows, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, cols, generator=rng))
        if bias:
            layer.bias.copy_(torch.randn(rows, generator=rng))
        rank = torch.rand(rows, cols // 4, 4, generator=rng).argsort(-1).argsort(-1)
        layer.weight.copy_(torch.where((rank < 2).view(rows, cols), layer.weight, torch.zeros(())))
    return layer.to(dtype)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_stands_in_for_a_linear_layer(name):
    layer = sparse_layer()
    packed = PackedLinear.from_linear(layer, BUILDS[name])
    for shape in ((20,), (1, 20), (0, 20), (7, 20), (2, 3, 20), (2, 0, 20), (64, 20)):
        x = torch.randn(shape)
        with torch.no_grad():
            close(packed(x), layer(x))
        close(packed(x), layer(x))
    strided = torch.randn(20, 6).t()
    close(packed(strided), layer(strided))
    assert (packed.in_features, packed.out_features) == (20, 13)
    assert packed.nbytes == packed.fmt.nbytes + 13 * 4
    assert packed.density == pytest.approx(0.5, abs=0.01)
    assert torch.equal(packed.weight, layer.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", BUILDS)
def test_unpacks_bit_for_bit(name, bias):
    layer = sparse_layer(bias=bias).eval()
    dense = PackedLinear.from_linear(layer, BUILDS[name]).unpack()
    assert type(dense) is nn.Linear and not dense.training
    assert dense.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(dense.state_dict()[key], value) for key, value in layer.state_dict().items())


def test_transformers_conv1d_both_ways():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(13, 20)
    packed = PackedLinear.from_linear(conv1d, CSR)
    x = torch.randn(2, 5, 20)
    close(packed(x), conv1d(x))
    back = packed.unpack()
    assert type(back) is type(conv1d) and torch.equal(back.weight, conv1d.weight) and (back.nx, back.nf) == (20, 13)
    close(back(x), conv1d(x))


@pytest.mark.parametrize("name", BUILDS)
def test_state_dict_deepcopy_and_dtype(name):
    layer = sparse_layer()
    packed = PackedLinear.from_linear(layer, BUILDS[name])
    x = torch.randn(3, 20)
    with torch.no_grad():
        before = packed(x)
        clone = copy.deepcopy(packed)
        assert torch.equal(clone(x), before)
        doubled = {key: value * 2 if value.is_floating_point() else value for key, value in packed.state_dict().items()}
        clone.load_state_dict(doubled)
        close(clone(x), 2 * before)
        assert torch.equal(packed(x), before), "a copy shares nothing"
        low = packed.to(torch.bfloat16)
        y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), before, rtol=3e-2, atol=6e-2)


def test_loaded_indices_are_checked_before_a_kernel_reads_them():
    packed = PackedLinear.from_linear(sparse_layer(), CSR)
    state = packed.state_dict()
    state["indices"] = torch.full_like(state["indices"], 60000)
    packed.load_state_dict(state)
    with torch.no_grad(), pytest.raises(FormatError, match="column indices"):
        packed(torch.zeros(1, 20))


def test_wrong_inputs_are_named():
    packed = PackedLinear.from_linear(sparse_layer(), CSR)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            with pytest.raises(FormatError, match="takes 20 input features, got 19"):
                packed(torch.zeros(2, 19))
            with pytest.raises(FormatError, match=r"float16.*convert"):
                packed(torch.zeros(2, 20).half())
            with pytest.raises(FormatError, match="scalar"):
                packed(torch.tensor(1.0))
    with pytest.raises(UnknownName, match="gelu"):
        PackedLinear.from_linear(sparse_layer(), CSR, activation="gelo")
    with pytest.raises(UnknownName, match="bitmask"):
        PackedLinear.from_linear(sparse_layer(), "bitmaks")
    with pytest.raises(FormatError, match="packs nn"):
        PackedLinear.from_linear(nn.ReLU(), CSR)
    with pytest.raises(FormatError, match="the layer's"):
        PackedLinear.from_linear(sparse_layer(), CSR.from_dense(torch.zeros(3, 3)))
    with pytest.raises(FormatError, match="bias must have 3"):
        PackedLinear(CSR.from_dense(torch.zeros(3, 3)), torch.zeros(4))
    with torch.no_grad(), pytest.raises(DispatchError, match="serves Dense"):
        PackedLinear.from_linear(sparse_layer(), CSR, backend="onednn")(torch.zeros(1, 20))


def test_format_may_be_a_name_a_class_a_function_or_stored():
    layer = sparse_layer()
    stored = CSR.from_dense(layer.weight)
    for fmt in ("csr", CSR, CSR.from_dense, stored):
        assert torch.equal(PackedLinear.from_linear(layer, fmt).weight, layer.weight)
    assert PackedLinear.from_linear(layer.weight, CSR).bias is None
    mask = torch.ones(13, 20, dtype=torch.bool)
    assert PackedLinear.from_linear(layer, CSR, support_mask=mask).fmt.nnz == 260


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_fused_activation(activation):
    from gossamer.kernels.reference import activate

    layer = sparse_layer()
    for name in BUILDS:
        packed = PackedLinear.from_linear(layer, BUILDS[name], activation=activation)
        x = torch.randn(9, 20)
        with torch.no_grad():
            close(packed(x), activate(layer(x), activation))
        with pytest.raises(FormatError, match=activation):
            packed.unpack()


@pytest.mark.parametrize("name", BUILDS)
def test_training_on_the_support(name):
    layer = sparse_layer()
    packed = PackedLinear.from_linear(layer, BUILDS[name])
    packed.values.requires_grad_()
    optimizer = torch.optim.SGD([packed.values, packed.bias], lr=0.01)
    x, target = torch.randn(32, 20), torch.randn(32, 13)
    before = packed.weight == 0
    losses = []
    for _ in range(5):
        loss = (packed(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if name in ("csr", "bitmask", "tilebitmask", "nm"):
        assert bool((packed.weight[before] == 0).all()), "what was pruned stays zero"
    with torch.no_grad():
        close(packed(x), torch.nn.functional.linear(x, packed.weight, packed.bias))


@pytest.mark.parametrize("name", BUILDS)
def test_compile_and_export(name):
    packed = PackedLinear.from_linear(sparse_layer(), BUILDS[name])
    x = torch.randn(3, 20)
    with torch.no_grad():
        want = packed(x)
        close(torch.compile(packed, backend="aot_eager", fullgraph=True)(x), want)
        batch = torch.export.Dim("batch")
        exported = torch.export.export(packed, (x,), dynamic_shapes=({0: batch},))
        ops = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert ops == [torch.ops.gossamer.sparse_linear.default]
        close(exported.module()(x), want)
        assert exported.module()(torch.randn(5, 20)).shape == (5, 13)


def test_compiled_training_step():
    packed = PackedLinear.from_linear(sparse_layer(), CSR, activation="gelu")
    packed.values.requires_grad_()
    x = torch.randn(4, 20)
    torch.compile(packed, backend="aot_eager", fullgraph=True)(x).sum().backward()
    compiled = packed.values.grad.clone(), packed.bias.grad.clone()
    packed.values.grad = packed.bias.grad = None
    packed(x).sum().backward()
    close(compiled[0], packed.values.grad)
    close(compiled[1], packed.bias.grad)


@pytest.mark.parametrize("name", BUILDS)
def test_meta_tensors_give_shapes(name):
    packed = PackedLinear.from_linear(sparse_layer(), BUILDS[name]).to("meta")
    assert packed(torch.zeros(2, 20, device="meta")).shape == (2, 13)
    assert "density unknown" in packed.explain()


def test_inside_autocast_and_inference_mode():
    layer = sparse_layer()
    for name in BUILDS:
        packed = PackedLinear.from_linear(layer, BUILDS[name])
        x = torch.randn(3, 20)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = packed(x)
            assert y.dtype == torch.float32
            close(packed(x.bfloat16()), packed(x.bfloat16().float()))
        close(y, layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            close(packed(x), y)
        with torch.inference_mode():
            made_inside = PackedLinear.from_linear(layer, BUILDS[name])
            close(made_inside(x), y)


@pytest.mark.parametrize("name", BUILDS)
def test_threads_get_identical_results(name):
    packed = PackedLinear.from_linear(sparse_layer(cols=200, rows=130), BUILDS[name])
    inputs = [torch.randn(33, 200) for _ in range(4)]

    def run(x):
        with torch.no_grad():
            return [packed(x) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, inputs))
    for x, repeats in zip(inputs, results):
        with torch.no_grad():
            again = packed(x)
        assert all(torch.equal(again, repeat) for repeat in repeats)


def test_explains_itself():
    packed = PackedLinear.from_linear(sparse_layer(), RowGrouped, activation="relu")
    assert "cpu/spmm" in packed.explain() and "onednn/linear: serves Dense" in packed.explain()
    assert "in_features=20, out_features=13, bias=True, format=rowgrouped, g=4, activation=relu" in repr(packed)


@pytest.mark.parametrize("name", BUILDS)
def test_in_place_edits_are_seen(name):
    packed = PackedLinear.from_linear(sparse_layer(bias=False), BUILDS[name])
    x = torch.randn(2, 20)
    with torch.no_grad():
        before = packed(x)
        packed.values.mul_(2)
        close(packed(x), 2 * before)
        packed.values.data.mul_(2)
        packed.replan()
        close(packed(x), 4 * before)


@pytest.mark.parametrize("name", BUILDS)
def test_pointwise_convolution(name):
    conv = nn.Conv2d(20, 13, 1)
    with torch.no_grad():
        conv.weight.copy_(sparse_layer().weight[:, :, None, None])
    packed = PackedConv2d.from_conv(conv, BUILDS[name])
    for shape in ((2, 20, 5, 7), (20, 5, 7), (0, 20, 5, 7), (1, 20, 1, 1)):
        x = torch.randn(shape)
        with torch.no_grad():
            close(packed(x), conv(x))
        close(packed(x), conv(x))
    x = torch.randn(2, 5, 7, 20).movedim(-1, 1)
    with torch.no_grad():
        close(packed(x), conv(x))
    back = packed.unpack()
    assert torch.equal(back.weight, conv.weight) and torch.equal(back.bias, conv.bias)
    with pytest.raises(FormatError, match="takes images"):
        packed(torch.zeros(2, 19, 5, 5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BUILDS)
def test_on_a_gpu(name):
    layer = sparse_layer()
    packed = PackedLinear.from_linear(layer, BUILDS[name])
    x = torch.randn(7, 20)
    with torch.no_grad():
        want = packed(x)
        moved = copy.deepcopy(packed).cuda()
        torch.testing.assert_close(moved(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
        assert moved.plan.backend in ("dense", "unpack")
        rebuilt = PackedLinear.from_linear(layer.cuda(), BUILDS[name])
        assert torch.equal(rebuilt.weight.cpu(), packed.weight)
        with pytest.raises(FormatError, match="convert"):
            packed(x.cuda())
    with pytest.raises(DispatchError, match="activations are on cuda"):
        PackedLinear.from_linear(layer.cuda(), CSR, backend="cpu").plan  # noqa: B018
    moved(x.cuda()).sum().backward()
    assert moved.bias.grad.device.type == "cuda"
