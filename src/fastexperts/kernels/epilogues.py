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
def part_of_h(p_h, o_m, n0, N, ACT: tl.constexpr, BN: tl.constexpr):
    """(pointers to gate columns [n0, n0 + BN) of h, the distance to up's), or all columns of a non-gated h.
    p_h: [rows, N], [rows, 2N] gated, at the first row.
    """
    o_n = n0 + tl.arange(0, BN)
    if ACT.interleaved:
        return p_h + o_m * (2 * N) + 2 * o_n[None, :], 1
    elif ACT.gated:
        return p_h + o_m * (2 * N) + o_n[None, :], N
    else:
        return p_h + o_m * N + o_n[None, :], 0


@triton.jit
def store_act(g, u, p_out, p_h, n0, N, m_m, STORE_H: tl.constexpr, ACT: tl.constexpr, SUBTILES: tl.constexpr):
    """h = [g, u] and a = act(h). p_out: [rows, N], p_h: [rows, G], both at the first row."""
    BM: tl.constexpr = g.shape[0]
    BN: tl.constexpr = g.shape[1]
    if SUBTILES > 1:
        g0, g1 = halves(g)
        u0, u1 = halves(u)
        store_act(g0, u0, p_out, p_h, n0, N, m_m, STORE_H, ACT, SUBTILES // 2)
        store_act(g1, u1, p_out, p_h, n0 + BN // 2, N, m_m, STORE_H, ACT, SUBTILES // 2)
    else:
        dtype = p_out.dtype.element_ty
        o_m = tl.arange(0, BM)[:, None]
        o_n = n0 + tl.arange(0, BN)
        m_out = m_m[:, None] & (o_n < N)[None, :]
        if STORE_H:
            p_g, to_u = part_of_h(p_h, o_m, n0, N, ACT, BN)
            tl.store(p_g, g.to(dtype), mask=m_out)
            if ACT.gated:
                tl.store(p_g + to_u, u.to(dtype), mask=m_out)
        tl.store(p_out + o_m * N + o_n[None, :], act_forward(g, u, ACT).to(dtype), mask=m_out)


@triton.jit
def store_dact(
    v, p_out, p_h, p_dh, weight, n0, N, m_m,
    STORE_OUT: tl.constexpr, STORE_DH: tl.constexpr, ACT: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """dh = act'(h) * weight * v and out = weight * a; returns the rows' partial dweight = <v, a>.

    p_out: [rows, N], p_h and p_dh: [rows, G], all at the first row; weight: [BM].
    """
    BM: tl.constexpr = v.shape[0]
    BN: tl.constexpr = v.shape[1]
    if SUBTILES > 1:
        v0, v1 = halves(v)
        n1 = n0 + BN // 2
        left = store_dact(v0, p_out, p_h, p_dh, weight, n0, N, m_m, STORE_OUT, STORE_DH, ACT, SUBTILES // 2)
        right = store_dact(v1, p_out, p_h, p_dh, weight, n1, N, m_m, STORE_OUT, STORE_DH, ACT, SUBTILES // 2)
        return left + right
    else:
        dtype = p_h.dtype.element_ty
        o_m = tl.arange(0, BM)[:, None]
        o_n = n0 + tl.arange(0, BN)
        m_out = m_m[:, None] & (o_n < N)[None, :]
        p_g, to_u = part_of_h(p_h, o_m, n0, N, ACT, BN)
        g = tl.load(p_g, mask=m_out, other=0.0).to(v.dtype)
        u = g
        if ACT.gated:
            u = tl.load(p_g + to_u, mask=m_out, other=0.0).to(v.dtype)
        act, dg, du = act_vjp(g, u, v * weight[:, None], ACT)
        if STORE_OUT:
            tl.store(p_out + o_m * N + o_n[None, :], (act * weight[:, None]).to(dtype), mask=m_out)
        if STORE_DH:
            p_dg, to_du = part_of_h(p_dh, o_m, n0, N, ACT, BN)
            tl.store(p_dg, dg.to(dtype), mask=m_out)
            if ACT.gated:
                tl.store(p_dg + to_du, du.to(dtype), mask=m_out)
        return tl.sum(tl.where(m_out, v * act, 0.0), 1)
