"""The formula of activations.py for blocks of h in registers: forward, and with its derivative."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from fastexperts.activations import Activation


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST (fp32, PTX) in four instructions, within 2 ulp: tl.sigmoid takes a dozen, for
    denormals that the sum with 1 drops.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(x)


@triton.jit
def _gate_fn(x, FN: tl.constexpr, ALPHA: tl.constexpr, FAST: tl.constexpr):
    """(f(x), f'(x)) in the dtype of x; what the caller drops is not computed."""
    if FN == "silu":
        s = _sigmoid(x * ALPHA, FAST)
        f = x * s
        return f, s + ALPHA * f * (1 - s)
    elif FN == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif FN == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2z) - 1
        s = _sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x), FAST)
        slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return x * s, s + x * s * (1 - s) * slope
    elif FN == "relu":
        return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    else:
        tl.static_assert(FN == "relu2", "a row of activations.FUNCTIONS without its Triton form")
        r = tl.where(x <= 0, 0.0, x)
        return r * r, 2 * r


@triton.jit
def act_forward(
    g,
    u,
    FN: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    FAST: tl.constexpr = False,
):
    """a of a block of g (and u); `where` and not `minimum`, so that NaN stays NaN."""
    if LIMIT is not None:
        g = tl.where(g > LIMIT, LIMIT, g)
    f, _ = _gate_fn(g, FN, ALPHA, FAST)
    if GATED:
        if LIMIT is not None:
            u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
        if UP_SHIFT != 0.0:
            u += UP_SHIFT
        f = f * u
    return f


@triton.jit
def act_vjp(
    g,
    u,
    da,
    FN: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    FAST: tl.constexpr = False,
):
    """(a, dg, du) of a block, da the gradient of a; du is undefined when not gated."""
    pass_g = da
    pass_u = da
    if LIMIT is not None:
        pass_g = tl.where(g <= LIMIT, da, 0.0)
        g = tl.where(g > LIMIT, LIMIT, g)
    f, df = _gate_fn(g, FN, ALPHA, FAST)
    if GATED:
        if LIMIT is not None:
            pass_u = tl.where((u <= LIMIT) & (u >= -LIMIT), da, 0.0)
            u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
        if UP_SHIFT != 0.0:
            u += UP_SHIFT
        return f * u, pass_g * u * df, pass_u * f
    else:
        return f, pass_g * df, pass_u


def constants(activation: Activation | None) -> dict[str, Any]:
    """The constexpr arguments of the functions above; LIMIT None compiles the clamps away."""
    if activation is None:
        return {"FN": "", "GATED": False, "ALPHA": 1.0, "LIMIT": None, "UP_SHIFT": 0.0}
    limit = None if math.isinf(activation.limit) else activation.limit
    return {
        "FN": activation.fn,
        "GATED": activation.gated,
        "ALPHA": activation.alpha,
        "LIMIT": limit,
        "UP_SHIFT": activation.up_shift,
    }
