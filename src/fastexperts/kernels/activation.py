"""The formula of activations.py for blocks of h in registers: forward, and with its derivative."""

from __future__ import annotations

import triton
import triton.language as tl


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
def _capped(x, CAP: tl.constexpr, FAST: tl.constexpr):
    """(CAP * tanh(x / CAP), its derivative); tanh(z) = 2 sigmoid(2z) - 1, which cancels near 0: there its
    series, to 3e-7 of it (fp64 has digits to spare).
    """
    t = 2 * _sigmoid(x * (2 / CAP), FAST) - 1
    if x.dtype != tl.float64:
        z = x * (1 / CAP)
        q = z * z
        t = tl.where(q < 0.0625, z * (1 - q * (1 / 3 - q * (2 / 15 - q * (17 / 315)))), t)
    return t * CAP, 1 - t * t


@triton.jit
def _gate_fn(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """(f(x), f'(x)) in the dtype of x; what the caller drops is not computed."""
    if ACT.fn == "silu":
        s = _sigmoid(x * ACT.alpha, FAST)
        if ACT.gate_cap != float("inf"):
            linear, slope = _capped(x, ACT.gate_cap, FAST)
            return linear * s, s * (slope + ACT.alpha * linear * (1 - s))
        else:
            f = x * s
            return f, s + ACT.alpha * f * (1 - s)
    elif ACT.fn == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT.fn == "gelu_tanh":
        s = _sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x), FAST)
        slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return x * s, s + x * s * (1 - s) * slope
    elif ACT.fn == "relu":
        return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0).to(x.dtype)
    else:
        tl.static_assert(ACT.fn == "relu2", "a row of activations.FUNCTIONS without its Triton form")
        r = tl.where(x <= 0, 0.0, x)
        return r * r, 2 * r


@triton.jit
def act_forward(g, u, ACT: tl.constexpr, FAST: tl.constexpr = False):
    """a of a block of g (and u); `where` and not `minimum`, so that NaN stays NaN. ACT: an `Activation`."""
    if ACT.limit != float("inf"):
        g = tl.where(g > ACT.limit, ACT.limit, g)
    f, _ = _gate_fn(g, ACT, FAST)
    if ACT.gated:
        if ACT.limit != float("inf"):
            u = tl.where(u > ACT.limit, ACT.limit, tl.where(u < -ACT.limit, -ACT.limit, u))
        if ACT.up_cap != float("inf"):
            u, _ = _capped(u, ACT.up_cap, FAST)
        if ACT.up_shift != 0.0:
            u += ACT.up_shift
        f = f * u
    return f


@triton.jit
def act_vjp(g, u, da, ACT: tl.constexpr, FAST: tl.constexpr = False):
    """(a, dg, du) of a block, da the gradient of a; du is undefined when not gated."""
    pass_g = da
    pass_u = da
    if ACT.limit != float("inf"):
        pass_g = tl.where(g <= ACT.limit, da, 0.0)
        g = tl.where(g > ACT.limit, ACT.limit, g)
    f, df = _gate_fn(g, ACT, FAST)
    if ACT.gated:
        if ACT.limit != float("inf"):
            pass_u = tl.where((u <= ACT.limit) & (u >= -ACT.limit), da, 0.0)
            u = tl.where(u > ACT.limit, ACT.limit, tl.where(u < -ACT.limit, -ACT.limit, u))
        if ACT.up_cap != float("inf"):
            u, slope = _capped(u, ACT.up_cap, FAST)
            pass_u *= slope
        if ACT.up_shift != 0.0:
            u += ACT.up_shift
        return f * u, pass_g * u * df, pass_u * f
    else:
        return f, pass_g * df, pass_u
