"""Sums, products, activations and rotary embedding on panels, of tokens or of images.

Shapes: P panels of K features and W positions; S positions of a sequence, D features of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, unknown
from gossamer.kernels.cpu.checks import activation_code, need_floats, output
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.tokens import WIDTH, need_panels, padded, panel_count

FORMS = {"alone": 0, "add": 1, "multiply": 2, "scale": 3}
# Elements that pay for waking one more thread: about ten microseconds of work.
GRAIN = 50_000
# Floats of a task: 64 KiB of each operand.
_EACH = 16_384


def plan_elementwise(
    panels: int,
    features: int,
    *,
    width: int = WIDTH,
    form: str = "alone",
    activation: str = "none",
    within: tuple[int, int, int] | None = None,
    offsets: tuple[int, int, int] = (0, 0, 0),
    threads: int = 1,
) -> Launch:
    """Lay out elementwise work on panels; `.run(x, z, y)` takes addresses.

    | form | y | z |
    |---|---|---|
    | "alone" | act(x) | 0 |
    | "add" | act(x + z) | panels |
    | "multiply" | act(x) * z, a gated unit with silu or gelu | panels |
    | "scale" | act(x * z) | one float |

    Each operand has its own number of features per panel and its first feature, so that a gate and what it gates may
    be halves of one fused product. y may be x or z.

    Args:
        panels: P, or images.
        features: K, how many take part.
        width: W, a multiple of 16: 64 for token panels, the plane stride for images.
        form: "alone", "add", "multiply" or "scale".
        activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu", "relu6" or "hard_swish".
        within: features per panel of x, z and y; K unless given.
        offsets: first feature of x, z and y in their panels.
        threads: how many threads may work.

    Raises:
        FormatError: the features do not fit, or the width is not a multiple of 16.
        UnknownName: no such form or activation.

    Example:
        >>> gated = plan_elementwise(9, 1536, form="multiply", activation="silu", within=(3072, 3072, 1536),
        ...                          offsets=(0, 1536, 0))
    """
    from gossamer.kernels.cpu import elementwise_loops as loops

    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if width % 16:
        raise FormatError(f"width must be a multiple of 16 floats, got {width}; pad the positions of a panel")
    within = (features,) * 3 if within is None else within
    _need_room("xzy", within, offsets, (features, 0 if form in ("alone", "scale") else features, features))
    count = features * width
    parts = -(-count // _EACH)
    each = -(-count // (16 * max(parts, 1))) * 16
    strides = [4 * width * number for pair in zip(within, offsets) for number in pair]
    threads = max(1, min(threads, panels * parts, panels * count // GRAIN))
    fixed = (panels * parts, parts, count, each, *strides)
    entry = loops.combining(FORMS[form], activation_code(activation))
    return launch(entry, addresses=3, fixed=fixed, threads=threads)


def _need_room(names: str, within: tuple[int, ...], offsets: tuple[int, ...], needed: tuple[int, ...]) -> None:
    for name, there, offset, count in zip(names, within, offsets, needed):
        if offset < 0 or offset + count > there:
            raise FormatError(f"{name} needs features {offset} to {offset + count - 1}, got panels of {there}")


def elementwise(
    x_PKW: Tensor,
    z_PKW: Tensor | float | None = None,
    *,
    form: str = "alone",
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """act(x), act(x + z), act(x) * z or act(x * factor) on panels; the forms are those of `plan_elementwise`.

    Args:
        x_PKW: float32 panels, W a multiple of 16.
        z_PKW: panels of the same size for "add" and "multiply", a number for "scale", else None.
        form: "alone", "add", "multiply" or "scale".
        activation: as in `plan_elementwise`.
        out: where to write; may be x or z.

    Raises:
        FormatError: a shape, dtype or layout does not fit.
        UnknownName: no such form or activation.

    Example:
        >>> y = elementwise(gate, up, form="multiply", activation="silu")
    """
    need_floats("x", x_PKW, "[P, K, W]", x_PKW.dim() == 3)
    panels, features, width = x_PKW.shape
    plan = plan_elementwise(
        panels, features, width=width, form=form, activation=activation, threads=torch.get_num_threads()
    )
    z_PKW = _second(form, x_PKW, z_PKW)
    out = output(out, tuple(x_PKW.shape), (), (x_PKW, z_PKW))
    plan.run(x_PKW.data_ptr(), 0 if z_PKW is None else z_PKW.data_ptr(), out.data_ptr())
    return out


def _second(form: str, x_PKW: Tensor, z: Tensor | float | None) -> Tensor | None:
    """The second operand as a tensor, once it is seen to be what the form takes."""
    if form == "alone":
        if z is not None:
            raise FormatError('form "alone" takes no second operand; name the form, such as "add"')
        return None
    if form == "scale":
        if isinstance(z, Tensor) or z is None:
            raise FormatError(f'form "scale" takes a number, got {type(z).__name__}; use "multiply" for panels')
        return torch.tensor([z], dtype=torch.float32, device="cpu")
    if not isinstance(z, Tensor):
        raise FormatError(f'form "{form}" takes panels as second operand, got {type(z).__name__}')
    need_floats("z", z, str(list(x_PKW.shape)), z.shape == x_PKW.shape)
    return z


def plan_rotary(
    batch: int,
    seq: int,
    heads: int,
    head_dim: int,
    *,
    features: tuple[int, int] | None = None,
    offsets: tuple[int, int] = (0, 0),
    table_row: int | None = None,
    threads: int = 1,
) -> Launch:
    """Lay out rotary embedding of token panels; `.run(x, cos, sin, y)` takes addresses.

    Features i and i + D / 2 of a head are a point that is turned by the angle of position and i. cos and sin are
    tables [D / 2, at least padded(S)] as `rotary_table` makes them. y may be x. Queries and keys that follow each
    other in one fused product are turned by one call with the heads of both.

    Args:
        batch: B.
        seq: S.
        heads: H.
        head_dim: D, even.
        features: features per panel of x and y; H D unless given.
        offsets: first feature of x and y in their panels.
        table_row: floats of a row of the tables; padded(S) unless given.
        threads: how many threads may work.

    Raises:
        FormatError: D is odd, or the features do not fit.

    Example:
        >>> plan_rotary(1, 128, 12, 64, features=(960, 960)).run(qkv, cos, sin, qkv)

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.
    Departs from: pairs are half a head apart, as in Llama, not neighbours.
    """
    from gossamer.kernels.cpu import elementwise_loops as loops

    if head_dim % 2:
        raise FormatError(f"rotary embedding turns pairs of features, got an odd head of {head_dim}")
    count, panels = heads * head_dim, panel_count(batch, seq)
    features = (count, count) if features is None else features
    _need_room("xy", features, offsets, (count, count))
    threads = max(1, min(threads, panels * heads, panels * count * WIDTH // GRAIN))
    table_row = padded(seq) if table_row is None else table_row
    strides = [4 * WIDTH * number for pair in zip(features, offsets) for number in pair]
    fixed = (
        panels * heads, heads, head_dim // 2, WIDTH, padded(seq), batch * padded(seq), 4 * table_row, *strides,
    )  # fmt: skip
    return launch(loops.rotating(), addresses=4, fixed=fixed, threads=threads)


def rotary_table(angles_SD: Tensor) -> Tensor:
    """A cos or sin table [S, D / 2] with positions along the lanes: [D / 2, padded(S)], zero beyond S.

    Args:
        angles_SD: cos or sin of the angle of every position and pair of features.

    Example:
        >>> rotary_table(torch.ones(17, 32)).shape
        torch.Size([32, 32])
    """
    seq = angles_SD.shape[0]
    table = torch.zeros(angles_SD.shape[1], padded(seq), dtype=torch.float32, device="cpu")
    table[:, :seq] = angles_SD.T
    return table


def rotary(
    x_PKW: Tensor, cos_SD: Tensor, sin_SD: Tensor, batch: int, heads: int, *, out: Tensor | None = None
) -> Tensor:
    """Rotary embedding of token panels, Llama's way: features i and i + D / 2 of a head make a pair.

    Args:
        x_PKW: float32 panels of H D features.
        cos_SD: cos of the angles [S, D / 2]; a table [S, D] must be cut to its first half.
        sin_SD: likewise.
        batch: B.
        heads: H.
        out: where to write; may be x.

    Raises:
        FormatError: a shape, dtype or layout does not fit.

    Example:
        >>> y = rotary(q, cos, sin, batch=2, heads=9)
    """
    need_floats("cos", cos_SD, "[S, D / 2]", cos_SD.dim() == 2)
    need_floats("sin", sin_SD, f"{list(cos_SD.shape)} like cos", sin_SD.shape == cos_SD.shape)
    seq, half = cos_SD.shape
    need_panels("x", x_PKW, batch, seq, 2 * heads * half)
    out = output(out, tuple(x_PKW.shape), (), (x_PKW,))
    cos, sin = rotary_table(cos_SD), rotary_table(sin_SD)
    plan = plan_rotary(batch, seq, heads, 2 * half, threads=torch.get_num_threads())
    plan.run(x_PKW.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    return out
