"""What a finished accumulator block of grouped_mm.py becomes: y, (h, a), or (dh, weight * a, partial
dweight).

A block [BM, BN] can be stored in SUBTILES slices of columns, one after the other: the slices of an epilogue
that reads h as well need a fraction of the registers (H100, dh at 128 x 128: 1.1 KB of spills a thread
without).

Pointers arrive at the block's first row; offsets inside a block fit 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastexperts.kernels.activation import act_forward, act_vjp


@triton.jit
def halves(block):
    """The left and right half of the columns; in registers, since a thread holds whole runs of a row."""
    BM: tl.constexpr = block.shape[0]
    HALF: tl.constexpr = block.shape[1] // 2
    return block.reshape(BM, 2, HALF).permute(0, 2, 1).split()


@triton.jit
def store_plain(acc, p_out, n0, N, m_m, SUBTILES: tl.constexpr):
    """out = acc. p_out: [rows, N] at the first row."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if SUBTILES > 1:
        left, right = halves(acc)
        store_plain(left, p_out, n0, N, m_m, SUBTILES // 2)
        store_plain(right, p_out, n0 + BN // 2, N, m_m, SUBTILES // 2)
    else:
        o_n = n0 + tl.arange(0, BN)
        o_out = tl.arange(0, BM)[:, None] * N + o_n[None, :]
        tl.store(p_out + o_out, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_n < N)[None, :])


@triton.jit
def store_act(
    g, u, p_out, p_h, n0, N, m_m, STORE_H: tl.constexpr,
    FN: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """h = [g, u] and a = act(h). p_out: [rows, N], p_h: [rows, WIDTH * N], both at the first row."""
    BM: tl.constexpr = g.shape[0]
    BN: tl.constexpr = g.shape[1]
    WIDTH: tl.constexpr = 2 if GATED else 1
    if SUBTILES > 1:
        g0, g1 = halves(g)
        u0, u1 = halves(u)
        store_act(g0, u0, p_out, p_h, n0, N, m_m, STORE_H, FN, GATED, ALPHA, LIMIT, UP_SHIFT, SUBTILES // 2)
        n1 = n0 + BN // 2
        store_act(g1, u1, p_out, p_h, n1, N, m_m, STORE_H, FN, GATED, ALPHA, LIMIT, UP_SHIFT, SUBTILES // 2)
    else:
        dtype = p_out.dtype.element_ty
        o_m = tl.arange(0, BM)[:, None]
        o_n = n0 + tl.arange(0, BN)
        m_out = m_m[:, None] & (o_n < N)[None, :]
        if STORE_H:
            o_h = o_m * (WIDTH * N) + o_n[None, :]
            tl.store(p_h + o_h, g.to(dtype), mask=m_out)
            if GATED:
                tl.store(p_h + N + o_h, u.to(dtype), mask=m_out)
        act = act_forward(g, u, FN, GATED, ALPHA, LIMIT, UP_SHIFT)
        tl.store(p_out + o_m * N + o_n[None, :], act.to(dtype), mask=m_out)


@triton.jit
def store_dact(
    v, p_out, p_h, p_dh, weight, n0, N, m_m,
    STORE_OUT: tl.constexpr, STORE_DH: tl.constexpr,
    FN: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_SHIFT: tl.constexpr,
    SUBTILES: tl.constexpr,
):  # fmt: skip
    """dh = act'(h) * weight * v and out = weight * a; returns the rows' partial dweight = <v, a>.

    p_out: [rows, N], p_h and p_dh: [rows, WIDTH * N], all at the first row; weight: [BM].
    """
    BM: tl.constexpr = v.shape[0]
    BN: tl.constexpr = v.shape[1]
    WIDTH: tl.constexpr = 2 if GATED else 1
    if SUBTILES > 1:
        v0, v1 = halves(v)
        left = store_dact(
            v0, p_out, p_h, p_dh, weight, n0, N, m_m, STORE_OUT, STORE_DH,
            FN, GATED, ALPHA, LIMIT, UP_SHIFT, SUBTILES // 2,
        )  # fmt: skip
        right = store_dact(
            v1, p_out, p_h, p_dh, weight, n0 + BN // 2, N, m_m, STORE_OUT, STORE_DH,
            FN, GATED, ALPHA, LIMIT, UP_SHIFT, SUBTILES // 2,
        )  # fmt: skip
        return left + right
    else:
        dtype = p_h.dtype.element_ty
        o_m = tl.arange(0, BM)[:, None]
        o_n = n0 + tl.arange(0, BN)
        m_out = m_m[:, None] & (o_n < N)[None, :]
        o_h = o_m * (WIDTH * N) + o_n[None, :]
        g = tl.load(p_h + o_h, mask=m_out, other=0.0).to(v.dtype)
        u = g
        if GATED:
            u = tl.load(p_h + N + o_h, mask=m_out, other=0.0).to(v.dtype)
        act, dg, du = act_vjp(g, u, v * weight[:, None], FN, GATED, ALPHA, LIMIT, UP_SHIFT)
        if STORE_OUT:
            tl.store(p_out + o_m * N + o_n[None, :], (act * weight[:, None]).to(dtype), mask=m_out)
        if STORE_DH:
            tl.store(p_dh + o_h, dg.to(dtype), mask=m_out)
            if GATED:
                tl.store(p_dh + N + o_h, du.to(dtype), mask=m_out)
        return tl.sum(tl.where(m_out, v * act, 0.0), 1)
