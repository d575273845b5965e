"""Epilogues of the row-tiled products for Hopper: what epilogues.py computes, from a consumer's registers
through shared memory and the copy engine.

Legend: see moe.py and ring.py; N is the dim of a product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastexperts.kernels.activation import act_forward, act_vjp
from fastexperts.kernels.ring import CONSUMERS, SLICE, advance, before, columns, put, rows

H_SLOTS = gl.constexpr(2)  # slots of h, SLICE columns of both parts each
FAST = gl.constexpr(True)


@gluon.jit
def part_of_h(n, part: gl.constexpr, ACT: gl.constexpr):
    """(part, column) of h of the SLICE columns that go with columns n of a: gate's or up's, or where they
    alternate the first or the second half of both.
    """
    if ACT.interleaved:
        return 0, 2 * n + part * SLICE
    else:
        return part, n


@gluon.jit
def _biased(block, p_bias, live):
    """`block` and a bias for each of its columns, of which `live` or more are there."""
    REGS: gl.constexpr = block.type.layout
    o_n = gl.arange(0, block.shape[1], gl.SliceLayout(0, REGS))
    return block + gl.expand_dims(gl.load(p_bias + o_n, mask=o_n < live, other=0.0).to(gl.float32), 0)


@gluon.jit
def _split(block):
    """(g, u) of a block whose columns alternate; in registers."""
    return block.reshape([block.shape[0], block.shape[1] // 2, 2]).split()


@gluon.jit
def _alternate(g, u):
    """The inverse of `_split`."""
    return gl.join(g, u).reshape([g.shape[0], 2 * g.shape[1]])


@gluon.jit
def _side_by_side(left, right):
    """The inverse of two `columns`."""
    return gl.join(left, right).permute((0, 2, 1)).reshape([left.shape[0], 2 * left.shape[1]])


@gluon.jit
def store_plain(
    acc, out, p_bias, i_e, row, end, n0, N, staging, BIAS: gl.constexpr, BN: gl.constexpr,
    BUFFERS: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """The block, SLICE columns at a time."""
    r0, r1, r2 = rows(row, end)
    for j in gl.static_range(BN // SLICE):
        y = columns(acc, j, BN // SLICE)
        if BIAS:
            n = n0 + j * SLICE
            y = _biased(y, p_bias + i_e * N + n, N - n)
        put(out, [r0, r1, r2, n0 + j * SLICE], y, staging, SIDE, j, BUFFERS)


@gluon.jit
def store_act(
    acc, out, h, p_bias, i_e, row, end, n0, N, staging, PARTS: gl.constexpr, SPREAD: gl.constexpr,
    STORE_H: gl.constexpr, ACT: gl.constexpr, BIAS: gl.constexpr, BN: gl.constexpr, BUFFERS: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """a = act(h), SLICE columns at a time, and h."""
    BN_OUT: gl.constexpr = BN // (PARTS * SPREAD)
    r0, r1, r2 = rows(row, end)
    NUM: gl.constexpr = BN_OUT // SLICE
    STORES: gl.constexpr = (1 + PARTS * SPREAD) if STORE_H else 1
    for j in gl.static_range(NUM):
        n = n0 + j * SLICE
        if ACT.interleaved:
            both = columns(acc, j, NUM)
            if BIAS:
                both = _biased(both, p_bias + 2 * (i_e * N + n), 2 * (N - n))
            first, second = columns(both, 0, 2), columns(both, 1, 2)
            g, u = _split(both)
        else:
            g = columns(acc, j, PARTS * NUM)
            u = columns(acc, (PARTS - 1) * NUM + j, PARTS * NUM)
            if BIAS:
                g = _biased(g, p_bias + i_e * PARTS * N + n, N - n)
                if ACT.gated:
                    u = _biased(u, p_bias + (i_e * PARTS + 1) * N + n, N - n)
            first, second = g, u
        if STORE_H:
            where, column = part_of_h(n, 0, ACT)
            put(h, [r0, r1, r2, where, column], first, staging, SIDE, STORES * j, BUFFERS)
            if ACT.gated:
                where, column = part_of_h(n, 1, ACT)
                put(h, [r0, r1, r2, where, column], second, staging, SIDE, STORES * j + 1, BUFFERS)
        a = act_forward(g, u, ACT, FAST)
        put(out, [r0, r1, r2, n], a, staging, SIDE, STORES * j + STORES - 1, BUFFERS)


@gluon.jit
def store_dact(
    acc, out, h, dh, p_weight, p_dweight, p_pair_of_row, row, end, i_n, num_rows, h_ring, h_slot, h_phase,
    filled, staging, STORE_H: gl.constexpr, STORE_OUT: gl.constexpr, STORE_DWEIGHT: gl.constexpr,
    ACT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """dh, weight * a and the partial sums of dweight from v, as h arrives, SLICE columns at a time; the next
    slot of h, its phase, and how many were filled.
    """
    h_s, h_full, h_empty = h_ring
    ROWS: gl.constexpr = BM // CONSUMERS
    n0 = i_n * BN
    r0, r1, r2 = rows(row, end)
    REGS: gl.constexpr = columns(acc, 0, BN // SLICE).type.layout
    half = columns(acc, 0, 2 * BN // SLICE)
    TURNS: gl.constexpr = _alternate(half, half).type.layout
    o_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, REGS))
    m_m = o_m < end
    pair = gl.load(p_pair_of_row + o_m, mask=m_m, other=0)
    weight = gl.load(p_weight + pair, mask=m_m, other=0.0).to(gl.float32)
    dweight = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, REGS))
    for j in gl.static_range(BN // SLICE):
        n = n0 + j * SLICE
        mbarrier.wait(h_full.index(h_slot), h_phase)
        g_s = h_s.index(2 * h_slot).slice(SIDE * ROWS, ROWS)
        u_s = h_s.index(2 * h_slot + 1).slice(SIDE * ROWS, ROWS)
        v = columns(acc, j, BN // SLICE)
        if ACT.interleaved:
            g0, u0 = _split(g_s.load(TURNS).to(gl.float32))
            g1, u1 = _split(u_s.load(TURNS).to(gl.float32))
            g = gl.convert_layout(_side_by_side(g0, g1), REGS)
            u = gl.convert_layout(_side_by_side(u0, u1), REGS)
        else:
            g = g_s.load(REGS).to(gl.float32)
            u = u_s.load(REGS).to(gl.float32) if ACT.gated else g
        a, dg, du = act_vjp(g, u, v * weight[:, None], ACT, FAST)
        dweight += gl.sum(v * a, 1)
        # packed before the wait, which they live across
        wa, dg, du = (a * weight[:, None]).to(h.dtype), dg.to(h.dtype), du.to(h.dtype)
        if ACT.interleaved:
            dg, du = (
                _alternate(columns(dg, 0, 2), columns(du, 0, 2)),
                _alternate(columns(dg, 1, 2), columns(du, 1, 2)),
            )
        # the slot before this one is free once its stores have been read
        tma.store_wait(0)
        mbarrier.arrive(h_empty.index(before(h_slot, H_SLOTS)), count=1, pred=filled > 0)
        filled += 1
        if STORE_OUT:
            wa_s = staging.index(SIDE)
            wa_s.store(wa)
        if STORE_H:
            # in place: a warp writes where it read
            g_s.store(dg)
            if ACT.gated:
                u_s.store(du)
        fence_async_shared()
        if STORE_OUT:
            tma.async_copy_shared_to_global(out, [r0, r1, r2, n], wa_s)
        if STORE_H:
            where, column = part_of_h(n, 0, ACT)
            tma.async_copy_shared_to_global(dh, [r0, r1, r2, where, column], g_s)
            if ACT.gated:
                where, column = part_of_h(n, 1, ACT)
                tma.async_copy_shared_to_global(dh, [r0, r1, r2, where, column], u_s)
        h_slot, h_phase = advance(h_slot, h_phase, H_SLOTS)
    if STORE_DWEIGHT:
        gl.store(p_dweight + i_n.to(gl.int64) * num_rows + o_m, dweight, mask=m_m)
    return h_slot, h_phase, filled
