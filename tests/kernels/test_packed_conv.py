"""PackedConv2d as a layer: any convolution of torch, packed and unpacked, with and without gradients."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.core.errors import DispatchError, FormatError
from gossamer.formats import CSR, Dense, RowGrouped
from gossamer.nn import PackedConv2d

CONVOLUTIONS = {
    "same": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(8, 16, (2, 5), stride=(3, 1), padding=(0, 2), dilation=(2, 1), bias=False),
    "named same": lambda: nn.Conv2d(8, 16, 4, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(8, 16, 3, padding="valid"),
    "grouped": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "strided pixels": lambda: nn.Conv2d(8, 16, 1, stride=2),
    "pixels": lambda: nn.Conv2d(8, 16, 1),
    "line": lambda: nn.Conv1d(8, 16, 5, stride=2, padding=2),
    "line of same": lambda: nn.Conv1d(8, 16, 4, padding="same"),
    "line of pixels": lambda: nn.Conv1d(8, 16, 1),
}
FORMATS = {
    "csr": CSR,
    "rows": partial(RowGrouped.from_dense, g=4),
    "rows in another order": partial(RowGrouped.from_dense, g=4, order=torch.arange(15, -1, -1)),
    "dense": Dense,
}


def pruned(name, *, tied=4):
    torch.manual_seed(0)
    conv = CONVOLUTIONS[name]()
    with torch.no_grad():
        rows = conv.weight.shape[0]
        kept = (torch.rand(rows // tied, *conv.weight.shape[1:]) < 0.4).repeat_interleave(tied, 0)
        conv.weight.masked_fill_(~kept, 0)
    return conv


def images(conv, *, batch=2):
    size = (13, 19) if isinstance(conv, nn.Conv2d) else (23,)
    return torch.randn(batch, conv.in_channels, *size)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_any_convolution_in_any_format(name, fmt):
    if name == "depthwise" and fmt == "rows in another order":
        pytest.skip("has eight rows")
    conv = pruned(name)
    packed = PackedConv2d.from_conv(conv, FORMATS[fmt])
    x = images(conv)
    with torch.no_grad():
        want = conv(x)
        torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(x[0]), want[0], atol=1e-5, rtol=1e-5)
        assert packed(x[:0]).shape == want[:0].shape
        if isinstance(conv, nn.Conv2d):
            last = x.to(memory_format=torch.channels_last)
            torch.testing.assert_close(packed(last), want, atol=1e-5, rtol=1e-5)
    back = packed.unpack()
    assert repr(back) == repr(conv) and torch.equal(back.weight, conv.weight)
    assert back.bias is None or torch.equal(back.bias, conv.bias)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_reach_input_bias_and_kept_values(name):
    conv = pruned(name)
    packed = PackedConv2d.from_conv(conv, CSR)
    packed.linear.values.requires_grad_()
    x = images(conv).requires_grad_()
    y, want = packed(x), conv(x)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(want)
    got_x, got_values = torch.autograd.grad(y, (x, packed.linear.values), pull)
    want_x, want_w = torch.autograd.grad(want, (x, conv.weight), pull)
    torch.testing.assert_close(got_x, want_x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_values, want_w[conv.weight != 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation, act", [("relu", torch.relu), ("silu", functional.silu)])
def test_activations_are_fused(activation, act):
    conv = pruned("same")
    packed = PackedConv2d.from_conv(conv, CSR, activation=activation)
    x = images(conv)
    want = act(conv(x))
    torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(FormatError, match="fused"):
        packed.unpack()


def test_sparse_kernels_run_where_they_serve(monkeypatch):
    conv = pruned("strided")
    packed = PackedConv2d.from_conv(conv, FORMATS["rows"])
    monkeypatch.setattr(packed, "_dense", None)
    with torch.no_grad():
        packed(images(conv))


CUT = partial(RowGrouped.from_dense, g=8, order=torch.arange(15, -1, -1).roll(1))


@pytest.mark.parametrize(
    ("name", "fmt", "dtype", "why"),
    [("same", CSR, torch.bfloat16, "only float32 streams"), ("grouped", CUT, torch.float32, "different groups")],
)
def test_a_backend_that_was_named_is_never_left_for_torch(name, fmt, dtype, why):
    conv = CONVOLUTIONS[name]().to(dtype)
    x = images(conv).to(dtype)
    named = PackedConv2d.from_conv(conv, fmt, backend="cpu")
    with torch.no_grad():
        with pytest.raises(DispatchError, match=f"'cpu' cannot run this convolution: .*{why}"):
            named(x)
        for backend in (None, "unpack"):
            torch.testing.assert_close(PackedConv2d.from_conv(conv, fmt, backend=backend)(x), conv(x))
    # Gradients are torch's, whatever was named.
    assert named(x.requires_grad_()).shape == conv(x).shape


def test_other_dtypes_are_convolved_densely():
    conv = pruned("same").double()
    packed, x = PackedConv2d.from_conv(conv, CSR), images(conv).double()
    with torch.no_grad():
        torch.testing.assert_close(packed(x), conv(x))


def test_weights_that_change_copies_and_state():
    conv = pruned("same")
    packed, x = PackedConv2d.from_conv(conv, CSR), images(conv)
    other = deepcopy(packed)
    with torch.no_grad():
        before = packed(x)
        packed.linear.bias.zero_(), packed.linear.values.mul_(2)
        changed = functional.conv2d(x, 2 * other.unpack().weight, None, padding=1)
        torch.testing.assert_close(packed(x), changed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other(x), before)
        packed.load_state_dict(other.state_dict())
        torch.testing.assert_close(packed(x), before)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(FormatError, match="pads with zeros"):
        PackedConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), CSR)
    with pytest.raises(FormatError, match="got ConvTranspose2d"):
        PackedConv2d.from_conv(nn.ConvTranspose2d(4, 4, 3), CSR)
    layer = PackedConv2d.from_conv(pruned("same"), CSR)
    with pytest.raises(FormatError, match="takes images"):
        layer(torch.zeros(2, 7, 5, 5))
    with pytest.raises(FormatError, match="takes lines"):
        PackedConv2d.from_conv(pruned("line"), CSR)(torch.zeros(8, 5, 5, 5))
