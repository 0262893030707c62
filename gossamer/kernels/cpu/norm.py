"""Layer norm and root-mean-square norm on token panels, with the residual sum before them.

Shapes: P panels of K features and W positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_floats, output
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.tokens import WIDTH, float_bits

# Elements that pay for waking one more thread: about ten microseconds of work.
GRAIN = 50_000


def plan_layer_norm(panels: int, features: int, eps: float, *, threads: int = 1) -> Launch:
    """Lay out y = (t - mean t) / sqrt(var t + eps) * gamma + beta, t = x + residual, each position by itself.

    `.run(x, residual, gamma, beta, y)` takes addresses: of panels [P, K, 64] for x, residual and y, of K floats for
    gamma and beta. Residual, gamma and beta may be 0, which leaves them out; y may be x or residual. The variance is
    taken about the mean in a second pass, so large means cost no accuracy.

    Args:
        panels: P.
        features: K.
        eps: added to the variance, finite and not negative.
        threads: how many threads may work.

    Raises:
        FormatError: eps is negative or not finite.

    Example:
        >>> plan_layer_norm(32, 384, 1e-12).run(x.data_ptr(), 0, gamma.data_ptr(), beta.data_ptr(), y.data_ptr())
    """
    return _plan(panels, features, eps, threads, centred=1)


def plan_rms_norm(panels: int, features: int, eps: float, *, threads: int = 1) -> Launch:
    """Lay out y = t / sqrt(mean t² + eps) * gamma, t = x + residual; addresses and arguments as `plan_layer_norm`.

    Raises:
        FormatError: eps is negative or not finite.

    Example:
        >>> plan_rms_norm(9, 576, 1e-5).run(x.data_ptr(), 0, gamma.data_ptr(), 0, y.data_ptr())
    """
    return _plan(panels, features, eps, threads, centred=0)


def _plan(panels: int, features: int, eps: float, threads: int, *, centred: int) -> Launch:
    from gossamer.kernels.cpu import norm_loops as loops

    if not (math.isfinite(eps) and eps >= 0):
        raise FormatError(f"eps must be finite and not negative, got {eps}; models use 1e-12 to 1e-5")
    threads = max(1, min(threads, panels * features * WIDTH // GRAIN))
    vectors = 4 if panels * WIDTH // lanes() >= 4 * threads else 2
    parts = WIDTH // (lanes() * vectors)
    constants = (float_bits(1.0 / max(features, 1)), float_bits(eps), float_bits(1.0), float_bits(0.0))
    fixed = (panels * parts if features else 0, parts, features, WIDTH, *constants)
    return launch(loops.kernel(vectors, centred), addresses=5, fixed=fixed, threads=min(threads, panels * parts or 1))


def layer_norm(
    x_PKW: Tensor,
    gamma_K: Tensor | None = None,
    beta_K: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual_PKW: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Layer norm over the features of token panels, of x or of x + residual.

    Args:
        x_PKW: float32 [P, K, 64].
        gamma_K: float32 [K]; 1 when None.
        beta_K: float32 [K]; 0 when None.
        eps: added to the variance.
        residual_PKW: added to x first.
        out: where to write; may be x or the residual.

    Raises:
        FormatError: a shape, dtype or layout does not fit, or eps is negative or not finite.

    Example:
        >>> y = layer_norm(x, gamma, beta, 1e-12, residual_PKW=x_before)
    """
    return _run(plan_layer_norm, x_PKW, gamma_K, beta_K, eps, residual_PKW, out)


def rms_norm(
    x_PKW: Tensor,
    gamma_K: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual_PKW: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Root-mean-square norm over the features of token panels; arguments as `layer_norm`, without beta.

    Raises:
        FormatError: a shape, dtype or layout does not fit, or eps is negative or not finite.

    Example:
        >>> y = rms_norm(x, gamma, 1e-5)
    """
    return _run(plan_rms_norm, x_PKW, gamma_K, None, eps, residual_PKW, out)


def _run(plan, x_PKW, gamma_K, beta_K, eps, residual_PKW, out) -> Tensor:
    need_floats("x", x_PKW, f"[P, K, {WIDTH}]", x_PKW.dim() == 3 and x_PKW.shape[-1] == WIDTH)
    panels, features, _ = x_PKW.shape
    for name, vector in (("gamma", gamma_K), ("beta", beta_K)):
        if vector is not None:
            need_floats(name, vector, f"[{features}]", vector.shape == (features,))
    if residual_PKW is not None:
        need_floats("residual", residual_PKW, str(list(x_PKW.shape)), residual_PKW.shape == x_PKW.shape)
    out = output(out, tuple(x_PKW.shape), (gamma_K, beta_K), (x_PKW, residual_PKW))
    at = [0 if tensor is None else tensor.data_ptr() for tensor in (x_PKW, residual_PKW, gamma_K, beta_K, out)]
    plan(panels, features, eps, threads=torch.get_num_threads()).run(*at)
    return out
