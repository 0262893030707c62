"""Passes: rewrite a captured graph, operator by operator, into fewer and larger ones. Outputs stay the same.

Every pass takes the graph and its constants and returns how often it applied.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .operators import Attention, Combine, Geometry, GlobalPool, Norm, Operator, Pool, Product, Rotary

ATEN = torch.ops.aten
Constants = dict[str, Tensor]


def simplify(graph: fx.Graph, constants: Constants) -> dict[str, int]:
    """Every pass, in the order in which one prepares the next. Returns how often each applied."""
    done = {p.__name__.strip("_"): p(graph, constants) for p in PASSES}
    _drop_unused(graph)
    return done


def _calls(graph: fx.Graph, *targets: object) -> Iterator[fx.Node]:
    """Calls of these functions, in order; nodes may be taken out meanwhile."""
    wanted = set(targets)
    return (n for n in list(graph.nodes) if n.op == "call_function" and n.target in wanted)


def _operators(graph: fx.Graph, kind: type[Operator]) -> Iterator[fx.Node]:
    return (n for n in list(graph.nodes) if isinstance(n.target, kind))


def _swap(node: fx.Node, operator: Operator, *inputs: fx.Node) -> fx.Node:
    """Put an operator where a node stands."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(operator, inputs)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _skip(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    """At rest nothing here has effects: dropout inside attention is off, random numbers are not drawn."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _shape(node: object) -> tuple | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _dtype(node: object) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _same(a: object, b: object) -> bool:
    """Whether two nodes hold tensors of one shape and dtype, whatever the open sizes are."""
    sa, sb = _shape(a), _shape(b)
    if sa is None or sb is None or len(sa) != len(sb) or _dtype(a) != _dtype(b):
        return False
    return all(statically_known_true(x == y) for x, y in zip(sa, sb))


def _constant(node: object, constants: Constants) -> Tensor | None:
    return constants.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _argument(node: fx.Node, at: int, name: str, default: object) -> object:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def no_ops(graph: fx.Graph, constants: Constants) -> int:
    """Take out what changes nothing: dropout at rest, copies, assertions on metadata, whole slices."""
    count = 0
    checks = (ATEN._assert_tensor_metadata.default, ATEN._assert_scalar.default, ATEN.sym_constrain_range.default)
    for node in _calls(graph, *checks):
        if not node.users:
            graph.erase_node(node)
            count += 1
    copies = (ATEN.clone.default, ATEN.alias.default, ATEN.detach.default, ATEN.contiguous.default)
    casts = (ATEN._to_copy.default, ATEN.to.dtype, ATEN.to.device, ATEN.to.dtype_layout)
    for node in _calls(graph, *copies, *casts, ATEN.dropout.default, ATEN.slice.Tensor, ATEN.expand.default):
        source = node.args[0]
        if node.target is ATEN.dropout.default and _argument(node, 2, "train", True):
            continue
        # A slice or an expansion to the same shape gives the same values.
        if _same(node, source):
            _skip(node, source)
            count += 1
    return count


def _pair(value: object) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def products(graph: fx.Graph, constants: Constants) -> int:
    """Linear layers and convolutions whose weights are constants."""
    count = 0
    for node in _calls(graph, ATEN.linear.default, ATEN.conv2d.default, ATEN.conv2d.padding):
        x, weight = node.args[0], _constant(node.args[1], constants)
        bias_node = _argument(node, 2, "bias", None)
        bias = _constant(bias_node, constants)
        if weight is None or weight.dtype != torch.float32 or weight.dim() not in (2, 4):
            continue
        if bias is None and bias_node is not None:
            continue
        name = node.args[1].name.removeprefix("p_model_").removesuffix("_weight")
        geometry = None if node.target is ATEN.linear.default else _geometry(node, weight)
        if geometry is None and node.target is not ATEN.linear.default:
            continue
        _swap(node, Product(weight, bias, name, geometry=geometry), x)
        count += 1
    return count


def transposed_products(graph: fx.Graph, constants: Constants) -> int:
    """GPT-2's layers, x flattened times a weight stored [inputs, outputs]: products of the rows as they were."""
    count = 0
    for node in _calls(graph, ATEN.addmm.default):
        bias, weight = (_constant(node.args[i], constants) for i in (0, 2))
        flat = node.args[1]
        if bias is None or weight is None or weight.dtype != torch.float32 or bias.dim() != 1 or not _alone(node):
            continue
        back, rows = next(iter(node.users)), flat.args[0] if _viewed(flat) else None
        if rows is None or not _viewed(back) or not _rows_alike(rows, back) or node.kwargs:
            continue
        name = node.args[2].name.removeprefix("p_model_").removesuffix("_weight")
        _swap(back, Product(weight.t().contiguous(), bias, name), rows)
        graph.erase_node(node)
        count += 1
    _drop_unused(graph)
    return count


def _viewed(node: object) -> bool:
    return _is(node, ATEN.view.default) or _is(node, ATEN.reshape.default) or _is(node, ATEN._unsafe_view.default)


def _rows_alike(a: object, b: object) -> bool:
    """Whether two nodes agree in all axes but the last."""
    sa, sb = _shape(a), _shape(b)
    if sa is None or sb is None or len(sa) != len(sb):
        return False
    return all(statically_known_true(x == y) for x, y in zip(sa[:-1], sb[:-1]))


def tanh_gelus(graph: fx.Graph, constants: Constants) -> int:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written out as transformers does."""
    count = 0
    for node in _calls(graph, ATEN.tanh.default):
        x = _tanh_argument(node.args[0])
        plus = next(iter(node.users)) if _alone(node) else None
        if x is None or not _is(plus, ATEN.add.Tensor) or plus.args[1] != 1.0 or not _alone(plus):
            continue
        last = next(iter(plus.users))
        halves = [a for a in last.args if _is(a, ATEN.mul.Tensor) and a.args == (x, 0.5)]
        if _is(last, ATEN.mul.Tensor) and len(halves) == 1:
            with graph.inserting_before(last):
                new = graph.call_function(ATEN.gelu.default, (x,), {"approximate": "tanh"})
            new.meta = dict(last.meta)
            last.replace_all_uses_with(new)
            graph.erase_node(last)
            count += 1
    _drop_unused(graph)
    return count


def _tanh_argument(node: object) -> fx.Node | None:
    """x, where a node is sqrt(2/pi) (x + 0.044715 x^3)."""
    if not _is(node, ATEN.mul.Tensor) or abs(_number(node.args[1]) - 0.7978845608) > 1e-6:
        return None
    total = node.args[0]
    if not _is(total, ATEN.add.Tensor) or not _is(total.args[1], ATEN.mul.Tensor):
        return None
    x, cube = total.args[0], total.args[1].args[0]
    right = _is(cube, ATEN.pow.Tensor_Scalar) and cube.args == (x, 3.0) and total.args[1].args[1] == 0.044715
    return x if right else None


def _number(x: object) -> float:
    return float(x) if isinstance(x, (int, float)) else float("inf")


def _geometry(node: fx.Node, weight: Tensor) -> Geometry | None:
    if len(_shape(node.args[0]) or ()) != 4:
        return None
    stride, dilation = _pair(_argument(node, 3, "stride", 1)), _pair(_argument(node, 5, "dilation", 1))
    padding, groups = _argument(node, 4, "padding", 0), _argument(node, 6, "groups", 1)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "same":
        high, wide = ((k - 1) * d for k, d in zip(kernel, dilation))
        around = (high // 2, wide // 2, high - high // 2, wide - wide // 2)
    else:
        high, wide = (0, 0) if padding == "valid" else _pair(padding)
        around = (high, wide, high, wide)
    return Geometry(kernel, stride, around, dilation, groups)


def padded_convolutions(graph: fx.Graph, constants: Constants) -> int:
    """Zeros written around an image before a convolution are the convolution's own padding."""
    count = 0
    for node in _operators(graph, Product):
        pad = node.args[0]
        if node.target.geometry is None or pad.target not in (ATEN.constant_pad_nd.default, ATEN.pad.default):
            continue
        amounts = list(pad.args[1])
        mode, value = _argument(pad, 2, "mode", "constant"), _argument(pad, 3, "value", None)
        if pad.target is ATEN.constant_pad_nd.default:
            mode, value = "constant", _argument(pad, 2, "value", 0)
        if len(amounts) != 4 or mode != "constant" or value not in (0, 0.0, None) or min(amounts) < 0:
            continue
        g = node.target.geometry
        left, right, top, bottom = amounts
        around = tuple(a + b for a, b in zip(g.padding, (top, left, bottom, right)))
        _swap(node, replace(node.target, geometry=replace(g, padding=around)), pad.args[0])
        count += 1
    _drop_unused(graph)
    return count


def batch_norms(graph: fx.Graph, constants: Constants) -> int:
    """Batch norm at rest scales and shifts channels: fold it into the convolution before it."""
    count = 0
    norm = ATEN._native_batch_norm_legit_no_training.default
    for node in _calls(graph, norm):
        before, (gamma, beta, mean, var) = node.args[0], (_constant(a, constants) for a in node.args[1:5])
        taken = [u for u in node.users if u.args[1] == 0]
        if len(taken) != len(node.users) or not isinstance(before.target, Product) or not _alone(before):
            continue
        if mean is None or var is None or before.target.activation != "none":
            continue
        product = _scaled(before.target, gamma, beta, mean, var, node.args[6])
        new = _swap(node, product, *before.args)
        for user in taken:
            new.meta["val"] = user.meta["val"]
            _skip(user, new)
        count += 1
    _drop_unused(graph)
    return count


def _scaled(product: Product, gamma, beta, mean: Tensor, var: Tensor, eps: float) -> Product:
    scale = torch.rsqrt(var.double() + eps) * (1.0 if gamma is None else gamma.double())
    shift = (0.0 if beta is None else beta.double()) - mean.double() * scale
    if product.bias is not None:
        shift = shift + product.bias.double() * scale
    weight = product.weight * scale.to(product.weight.dtype).view(-1, *[1] * (product.weight.dim() - 1))
    return replace(product, weight=weight, bias=shift.to(weight.dtype))


def _activation_of(node: fx.Node) -> str | None:
    """The activation that a node computes of its first argument."""
    if node.op != "call_function":
        return None
    if node.target is ATEN.hardtanh.default:
        limits = (_argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0))
        return "relu6" if limits == (0.0, 6.0) else None
    if node.target is ATEN.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(_argument(node, 1, "approximate", "none"))
    if node.target is ATEN.clamp.default:
        limits = (_argument(node, 1, "min", None), _argument(node, 2, "max", None))
        return {(0, 6): "relu6", (0, None): "relu"}.get(limits)
    names = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hard_swish"}
    return names.get(getattr(node.target, "__name__", "").split(".")[0])


def activations(graph: fx.Graph, constants: Constants) -> int:
    """An activation that is the only user of a product belongs to it."""
    count = 0
    for node in list(graph.nodes):
        name = _activation_of(node)
        if name is None or _dtype(node) != torch.float32:
            continue
        before = node.args[0]
        if not isinstance(before, fx.Node):
            continue
        if _takes_activation(before):
            _swap(node, replace(before.target, activation=name), *before.args)
            graph.erase_node(before)
            count += 1
        else:
            _swap(node, Combine("alone", name), before)
    return count


def _takes_activation(node: fx.Node) -> bool:
    sums = isinstance(node.target, Product) or (isinstance(node.target, Combine) and node.target.form == "add")
    return sums and node.target.activation == "none" and _alone(node)


def scaled_products(graph: fx.Graph, constants: Constants) -> int:
    """A number that multiplies all of a product belongs to its weight."""
    count = 0
    for node in _calls(graph, ATEN.mul.Tensor):
        before, number = node.args[:2]
        if isinstance(number, float) and isinstance(before.target, Product) and _takes_residual(before):
            p = before.target
            bias = None if p.bias is None else p.bias * number
            _swap(node, replace(p, weight=p.weight * number, bias=bias), *before.args)
            graph.erase_node(before)
            count += 1
    return count


def residuals(graph: fx.Graph, constants: Constants) -> int:
    """A sum of a product and something computed before it starts the product's own sum."""
    count, order = 0, {}
    for at, node in enumerate(graph.nodes):
        order[node] = at
    for node in _calls(graph, ATEN.add.Tensor):
        a, b = node.args[:2]
        if node.kwargs.get("alpha", 1) != 1 or not _same(a, b) or _dtype(node) != torch.float32:
            continue
        able = [p for p in (a, b) if isinstance(p.target, Product) and _takes_residual(p)]
        if not able or a is b:
            _swap(node, Combine("add"), a, b)
            continue
        product = max(able, key=lambda n: order.get(n, 0))
        other = b if product is a else a
        new = _swap(node, product.target, *product.args, other)
        order[new] = order[node]
        graph.erase_node(product)
        count += 1
    return count


def _takes_residual(node: fx.Node) -> bool:
    return _alone(node) and len(node.args) == 1 and node.target.activation == "none"


def gates(graph: fx.Graph, constants: Constants) -> int:
    """The product of two tensors of one shape; an activation that only the product reads belongs to it."""
    count = 0
    for node in _calls(graph, ATEN.mul.Tensor):
        a, b = node.args[:2]
        if not _same(a, b) or _dtype(node) != torch.float32 or a is b:
            continue
        for x, other in ((a, b), (b, a)):
            if isinstance(x.target, Combine) and x.target.form == "alone" and _alone(x):
                _swap(node, Combine("multiply", x.target.activation), x.args[0], other)
                graph.erase_node(x)
                break
        else:
            _swap(node, Combine("multiply"), a, b)
        count += 1
    return count


def norms(graph: fx.Graph, constants: Constants) -> int:
    """Layer norm and RMS norm over the last axis."""
    count = 0
    for node in _calls(graph, ATEN.layer_norm.default):
        x, shape = node.args[:2]
        gamma, beta = (_constant(_argument(node, i, n, None), constants) for i, n in ((2, "weight"), (3, "bias")))
        if gamma is not None and len(shape) == 1 and gamma.dtype == torch.float32:
            _swap(node, Norm(gamma, beta, _argument(node, 4, "eps", 1e-5)), x)
            count += 1
    for node in _calls(graph, ATEN.mul.Tensor):
        count += _rms(node, constants)
    _drop_unused(graph)
    return count


def _rms(node: fx.Node, constants: Constants) -> bool:
    """gamma * (x * rsqrt(mean(x ** 2) + eps)), as transformers writes it."""
    for gamma_node, inner in (node.args[:2], node.args[1::-1]):
        gamma = _constant(gamma_node, constants)
        if gamma is None or gamma.dim() != 1 or not _is(inner, ATEN.mul.Tensor):
            continue
        x, root = inner.args
        if not _is(root, ATEN.rsqrt.default) or not _is(root.args[0], ATEN.add.Tensor):
            continue
        mean, eps = root.args[0].args
        if not _is(mean, ATEN.mean.dim) or list(mean.args[1]) != [-1] or not isinstance(eps, float):
            continue
        square = mean.args[0]
        if _is(square, ATEN.pow.Tensor_Scalar) and square.args == (x, 2):
            _swap(node, Norm(gamma, None, eps, centred=False), x)
            return True
    return False


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def attentions(graph: fx.Graph, constants: Constants) -> int:
    """Scaled dot products between heads that were cut from rows and are put back into rows."""
    count = 0
    for node in _calls(graph, ATEN.scaled_dot_product_attention.default):
        count += _attention(node)
    _drop_unused(graph)
    return count


def _attention(node: fx.Node) -> bool:
    q, k, v = node.args[:3]
    mask = _argument(node, 3, "attn_mask", None)
    if _argument(node, 4, "dropout_p", 0.0) != 0.0 or _dtype(node) != torch.float32:
        return False
    k, v = _unrepeated(k), _unrepeated(v)
    rows = [_rows_of(x) for x in (q, k, v)]
    out = _back_to_rows(node)
    if None in rows or out is None:
        return False
    heads, dim = q.meta["val"].shape[1], q.meta["val"].shape[3]
    kv_heads = k.meta["val"].shape[1]
    if not (isinstance(heads, int) and isinstance(dim, int) and isinstance(kv_heads, int) and _same(k, v)):
        return False
    scale = _argument(node, 6, "scale", None) or dim**-0.5
    causal = bool(_argument(node, 5, "is_causal", False))
    inputs = [*rows, mask] if mask is not None else rows
    _swap(out, Attention(heads, kv_heads, dim, scale, causal), *inputs)
    return True


def _unrepeated(node: fx.Node) -> fx.Node:
    """k or v before each of its heads was repeated for several heads of q."""
    expanded = node.args[0] if _viewed(node) else None
    if not _is(expanded, ATEN.expand.default) or not _is(expanded.args[0], ATEN.unsqueeze.default):
        return node
    source, axis = expanded.args[0].args
    shape = _shape(source)
    return source if axis == 2 and shape is not None and len(shape) == 4 and len(_shape(node) or ()) == 4 else node


def rotaries(graph: fx.Graph, constants: Constants) -> int:
    """Heads turned by their positions' angles, x cos + (-x2, x1) sin: turned as rows instead, then cut into heads."""
    count = 0
    for node in _calls(graph, ATEN.add.Tensor):
        count += _rotary(node)
    _drop_unused(graph)
    return count


def _rotary(node: fx.Node) -> bool:
    straight, crossed = node.args[:2]
    if not _is(straight, ATEN.mul.Tensor) or not _is(crossed, ATEN.mul.Tensor):
        return False
    (x, cos), (turned, sin) = straight.args, crossed.args
    rows, shape = _rows_of(x) if isinstance(x, fx.Node) else None, _shape(x)
    if rows is None or shape is None or not _half_turn(turned, x, shape[3]):
        return False
    if not isinstance(shape[1], int) or not isinstance(shape[3], int) or len(_shape(cos) or ()) != 4:
        return False
    if not statically_known_true(_shape(cos)[0] == 1) or not _same(cos, sin) or _dtype(node) != torch.float32:
        return False
    graph, view = node.graph, x.args[0]
    with graph.inserting_before(node):
        new = graph.call_function(Rotary(shape[1], shape[3]), (rows, cos, sin))  # type: ignore[arg-type]
        new.meta = dict(rows.meta)
        cut = graph.call_function(view.target, (new, *view.args[1:]))
        cut.meta = dict(view.meta)
        heads = graph.call_function(x.target, (cut, *x.args[1:]))
        heads.meta = dict(node.meta)
    node.replace_all_uses_with(heads)
    graph.erase_node(node)
    return True


def _half_turn(node: object, x: fx.Node, dim: int) -> bool:
    """Whether a node is cat(-x[..., dim / 2 :], x[..., : dim / 2])."""
    if not _is(node, ATEN.cat.default) or len(node.args[0]) != 2:
        return False
    minus, first = node.args[0]
    if not _is(minus, ATEN.neg.default):
        return False
    second = minus.args[0]
    halves = [n.args[:4] if _is(n, ATEN.slice.Tensor) else None for n in (first, second)]
    return halves[0] == (x, 3, 0, dim // 2) and halves[1] is not None and halves[1][:3] == (x, 3, dim // 2)


def _rows_of(node: fx.Node) -> fx.Node | None:
    """x, where a node is x.view(B, S, heads, dim).transpose(1, 2)."""
    if not _is(node, ATEN.transpose.int) or sorted(node.args[1:]) != [1, 2]:
        return None
    view = node.args[0]
    if not _viewed(view):
        return None
    rows, (x, cut) = view.args[0], (_shape(view.args[0]), _shape(view))
    if x is None or cut is None or len(x) != 3 or len(cut) != 4:
        return None
    return rows if all(statically_known_true(a == b) for a, b in zip(x[:2], cut[:2])) else None


def _back_to_rows(node: fx.Node) -> fx.Node | None:
    """The node that holds y as rows [B, S, heads * dim], where nothing else uses y."""
    at, turned = node, False
    for _ in range(4):
        if not _alone(at):
            return None
        at = next(iter(at.users))
        if _is(at, ATEN.transpose.int) and sorted(at.args[1:]) == [1, 2]:
            turned = True
        elif not (_viewed(at) or _is(at, ATEN.clone.default)):
            return None
        shape = _shape(at)
        if turned and shape is not None and len(shape) == 3:
            return at
        if not turned and not _same(at, node):
            return None
    return None


def merged_projections(graph: fx.Graph, constants: Constants) -> int:
    """Query, key and value products of one input become one product, of which attention takes its parts."""
    count = 0
    for node in _operators(graph, Attention):
        q, k, v = node.args[:3]
        parts = (q, k, v)
        if len(set(parts)) != 3 or not all(isinstance(p.target, Product) and _alone(p) for p in parts):
            continue
        if any(p.args != q.args or p.target.activation != "none" or p.target.geometry for p in parts):
            continue
        if len({p.target.bias is None for p in parts}) != 1:
            continue
        merged = _merged([p.target for p in parts])
        first = min(parts, key=list(graph.nodes).index)
        with graph.inserting_before(first):
            product = graph.call_function(merged, q.args)  # type: ignore[arg-type]
        sizes = [p.target.weight.shape[0] for p in parts]
        operator = replace(node.target, offsets=(0, sizes[0], sizes[0] + sizes[1]))
        _swap(node, operator, product, product, product, *node.args[3:])
        for part in parts:
            graph.erase_node(part)
        count += 1
    return count


def split_projections(graph: fx.Graph, constants: Constants) -> int:
    """Queries, keys and values that were split from one product are read where they lie."""
    count = 0
    for node in _operators(graph, Attention):
        parts = node.args[:3]
        if any(node.target.offsets) or not all(p.target is operator.getitem for p in parts):
            continue
        split = parts[0].args[0]
        sizes = split.args[1] if _is(split, ATEN.split.Tensor) else None
        axis = _argument(split, 2, "dim", 0)
        if any(p.args[0] is not split for p in parts) or not isinstance(sizes, int) or axis not in (-1, 2):
            continue
        source, offsets = split.args[0], tuple(p.args[1] * sizes for p in parts)
        _swap(node, replace(node.target, offsets=offsets), source, source, source, *node.args[3:])
        count += 1
    _drop_unused(graph)
    return count


def _merged(parts: list[Product]) -> Product:
    bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
    stem = parts[0].name.rsplit("_", 1)[0]
    return Product(torch.cat([p.weight for p in parts]), bias, f"{stem}_(qkv)")


def sunk_views(graph: fx.Graph, constants: Constants) -> int:
    """Rows flattened before a norm or a product, and given their axes back later, keep them throughout."""
    count = 0
    for node in list(graph.nodes):
        if isinstance(node.target, (Norm, Product)) and getattr(node.target, "geometry", None) is None:
            count += _sink(node)
    for node in list(graph.nodes):
        if _viewed(node) and _viewed(node.args[0]) and _same(node, node.args[0].args[0]):
            _skip(node, node.args[0].args[0])
    _drop_unused(graph)
    return count


def _sink(node: fx.Node) -> bool:
    """op(view(x), view(r)) as view(op(x, r)), where the views flatten all axes but the last."""
    sources = []
    for view in node.all_input_nodes:
        shape = _shape(view.args[0]) if _viewed(view) else None
        if shape is None or len(shape) != 3 or len(_shape(view) or ()) != 2:
            return False
        if not statically_known_true(shape[-1] == _shape(view)[-1]):
            return False
        sources.append(view.args[0])
    if not all(_rows_alike(sources[0], s) for s in sources):
        return False
    meta = node.meta["val"]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(node.target, tuple(sources))
        flat = node.graph.call_function(ATEN.view.default, (new, [-1, meta.shape[-1]]))
    lead = sources[0].meta["val"]
    new.meta["val"] = lead.new_empty(*lead.shape[:-1], meta.shape[-1])
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)
    node.graph.erase_node(node)
    return True


def pools(graph: fx.Graph, constants: Constants) -> int:
    """Largest values and means under a window."""
    count = 0
    for node in _calls(graph, ATEN.max_pool2d.default, ATEN.avg_pool2d.default):
        largest = node.target is ATEN.max_pool2d.default
        kernel = _pair(node.args[1])
        stride = _pair(_argument(node, 2, "stride", []) or kernel)
        padding = _pair(_argument(node, 3, "padding", 0))
        dilation = _pair(_argument(node, 4, "dilation", 1)) if largest else (1, 1)
        rounds_up = _argument(node, 5 if largest else 4, "ceil_mode", False)
        divides = None if largest else _argument(node, 6, "divisor_override", None)
        if rounds_up or divides or len(_shape(node.args[0]) or ()) != 4 or _dtype(node) != torch.float32:
            continue
        inside = not largest and not _argument(node, 5, "count_include_pad", True)
        kind = "max" if largest else "mean_inside" if inside else "mean"
        _swap(node, Pool(kind, Geometry(kernel, stride, (*padding, *padding), dilation, 1)), node.args[0])
        count += 1
    return count


def global_pools(graph: fx.Graph, constants: Constants) -> int:
    """Means over all pixels."""
    count = 0
    for node in _calls(graph, ATEN.mean.dim, ATEN.adaptive_avg_pool2d.default):
        shape = _shape(node.args[0])
        if shape is None or len(shape) != 4 or _dtype(node) != torch.float32:
            continue
        if node.target is ATEN.mean.dim:
            axes, keep = sorted(a % 4 for a in node.args[1]), bool(_argument(node, 2, "keepdim", False))
        else:
            axes, keep = ([2, 3], True) if list(node.args[1]) == [1, 1] else ([], False)
        if axes == [2, 3]:
            _swap(node, GlobalPool(keep), node.args[0])
            count += 1
    return count


PASSES: tuple[Callable[[fx.Graph, Constants], int], ...] = (
    no_ops,
    tanh_gelus,
    products,
    transposed_products,
    scaled_products,
    padded_convolutions,
    batch_norms,
    norms,
    rotaries,
    attentions,
    residuals,
    activations,
    sunk_views,
    gates,
    merged_projections,
    split_projections,
    pools,
    global_pools,
)
