"""The row-tiled products of grouped_mm.py for Hopper: the same four passes and epilogues around a ring.

Legend: see moe.py and ring.py; M, N, K here are the dims of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastexperts.kernels import tiles
from fastexperts.kernels.hopper_epilogues import H_SLOTS, part_of_h, store_act, store_dact, store_plain
from fastexperts.kernels.launch import Described, Plan, cdiv
from fastexperts.kernels.operands import processors
from fastexperts.kernels.ring import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CLAIM_SLOTS,
    CONSUMER_WARPS,
    CONSUMERS,
    REGISTERS,
    SLICE,
    advance,
    available,
    barriers,
    before,
    claim,
    described,
    gatherable,
    hand_over,
    handed,
    make_claims,
    ragged,
    swizzle,
    swizzled,
    take_over,
)
from fastexperts.weights import Step


@gluon.jit
def _mm_block(p_schedule, i_tile, num_m, num_n, GROUP: gl.constexpr):
    """(expert, first row, end of the expert's rows, column block); behind the last block, the last one's."""
    i_m, i_n = swizzle(gl.maximum(gl.minimum(i_tile, num_m * num_n - 1), 0), num_m, num_n, GROUP)
    p_tile = p_schedule + 3 + 3 * i_m
    live = num_m > 0  # where no pair has an expert, no entry of the schedule is defined
    i_e = gl.load(p_tile, mask=live, other=0)
    row0 = gl.load(p_tile + 1, mask=live, other=0)
    return i_e, row0, gl.load(p_tile + 2, mask=live, other=0), i_n


@gluon.jit
def _load_w(
    w, i_e, k0, n0, bar, w_s, BN: gl.constexpr, BK: gl.constexpr, PARTS: gl.constexpr, KN: gl.constexpr
):
    """Block [BK, BN] of an expert's weight; with two PARTS the same BN / 2 columns of both."""
    for part in gl.static_range(PARTS):
        if KN:
            half = w_s.slice(part * (BN // PARTS), BN // PARTS, dim=1)
            tma.async_copy_global_to_shared(w, [i_e, part, k0, n0], bar, half)
        else:
            half = w_s.slice(part * (BN // PARTS), BN // PARTS)
            tma.async_copy_global_to_shared(w, [i_e, part, n0, k0], bar, half)


@gluon.jit
def _expect(bar, both, BM: gl.constexpr, BN: gl.constexpr, WIDTH: gl.constexpr):
    """Announce the bytes of `_load_a` and `_load_w`, WIDTH of the contraction."""
    mbarrier.expect(bar, (BM + BN) * WIDTH * 2, pred=both)
    mbarrier.expect(bar, (BM // CONSUMERS + BN) * WIDTH * 2, pred=both == 0)


@gluon.jit
def _load_a(a, row0, k0, bar, a_s, both, BM: gl.constexpr):
    """Block of BM rows from row0 on; the second consumer's half only if `both` consumers have rows."""
    HALF: gl.constexpr = BM // CONSUMERS
    tma.async_copy_global_to_shared(a, [row0, k0], bar, a_s.slice(0, HALF))
    tma.async_copy_global_to_shared(a, [row0 + HALF, k0], bar, a_s.slice(HALF, HALF), pred=both)


@gluon.jit
def _mm_producer(
    a, w, h, more_a, more_w, p_pair_of_row, p_schedule, ring, more_ring, h_ring, claims, stride_a, N, K,
    R: gl.constexpr, TOP_K: gl.constexpr, GATHER: gl.constexpr, PARTS: gl.constexpr, SPREAD: gl.constexpr,
    KN: gl.constexpr, EPILOGUE: gl.constexpr, ACT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, RK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    a_s, w_s, full, empty = ring
    more_a_s, more_w_s = more_ring
    h_s, h_full, h_empty = h_ring
    WARPS: gl.constexpr = 4 if GATHER else 1
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BN_OUT: gl.constexpr = BN // (PARTS * SPREAD)
    num_n = gl.cdiv(N, BN_OUT)
    num_m = gl.load(p_schedule)
    slot, phase = 0, 1
    h_slot, h_phase = 0, 1
    claim_slot, claim_phase = 0, 1
    i_tile, i_next = gl.program_id(0), gl.program_id(0) + gl.num_programs(0)
    i_e, row0, end, i_n = _mm_block(p_schedule, i_tile, num_m, num_n, GROUP)
    if GATHER:
        o_k = gl.arange(0, BK, gl.SliceLayout(0, ROWS))
        o_m = gl.arange(0, BM, gl.SliceLayout(1, ROWS))
        pair = gl.load(p_pair_of_row + row0 + o_m, mask=row0 + o_m < end, other=0)
    while i_tile < num_m * num_n:
        n0 = i_n * BN_OUT
        both = row0 + BM // CONSUMERS < end
        if GATHER:
            p_a = a + ((pair // TOP_K).to(gl.int64) * stride_a)[:, None] + o_k[None, :]
            m_m = gl.expand_dims(row0 + o_m < end, 1)
        # the next block, its pairs, and the number of the one behind it travel while this one is copied
        claimed = claim(p_schedule, WARPS)
        following = _mm_block(p_schedule, i_next, num_m, num_n, GROUP)
        if GATHER:
            pair = gl.load(
                p_pair_of_row + following[1] + o_m, mask=following[1] + o_m < following[2], other=0
            )
        for k0 in range(0, K, BK):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            if GATHER:
                mbarrier.expect(bar, BN * BK * 2)
            else:
                _expect(bar, both, BM, BN, BK)
            _load_w(w, i_e, k0, SPREAD * n0, bar, w_s.index(slot), BN, BK, PARTS, KN)
            if GATHER:
                if EVEN_K:
                    async_copy.async_copy_global_to_shared(a_s.index(slot), p_a + k0, mask=m_m)
                else:
                    m_k = gl.expand_dims(o_k < K - k0, 0)
                    async_copy.async_copy_global_to_shared(a_s.index(slot), p_a + k0, mask=m_m & m_k)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                _load_a(a, row0, k0, bar, a_s.index(slot), both, BM)
            slot, phase = advance(slot, phase, STAGES)
        for r0 in gl.static_range(0, R, RK):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            _expect(bar, both, BM, BN, RK)
            more_slot = slot * (BK // RK)
            _load_w(more_w, i_e, r0, SPREAD * n0, bar, more_w_s.index(more_slot), BN, RK, PARTS, KN)
            _load_a(more_a, row0, r0, bar, more_a_s.index(more_slot), both, BM)
            if GATHER:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            slot, phase = advance(slot, phase, STAGES)
        i_tile, i_next = i_next, handed(claimed, p_schedule, num_m * num_n)
        hand_over(claims, claim_slot, claim_phase, i_next, WARPS)  # before h, which waits for the epilogue
        claim_slot, claim_phase = advance(claim_slot, claim_phase, CLAIM_SLOTS)
        if EPILOGUE == "dact":
            # h follows through slots of its own, SLICE columns of both parts each
            for j in gl.static_range(BN // SLICE):
                mbarrier.wait(h_empty.index(h_slot), h_phase)
                h_bar = h_full.index(h_slot)
                mbarrier.expect(h_bar, (2 if ACT.gated else 1) * BM * SLICE * 2)
                for part in gl.static_range(2 if ACT.gated else 1):
                    h_part = h_s.index(2 * h_slot + part)
                    where, column = part_of_h(n0 + j * SLICE, part, ACT)
                    tma.async_copy_global_to_shared(h, [row0, where, column], h_bar, h_part)
                h_slot, h_phase = advance(h_slot, h_phase, H_SLOTS)
        i_e, row0, end, i_n = following


@gluon.jit
def _multiply(acc, a_s, w_s, SIDE: gl.constexpr, ROWS: gl.constexpr, KN: gl.constexpr):
    """acc += A @ W of a slot, once the product before it is done."""
    w_s = w_s if KN else w_s.permute((1, 0))
    acc = warpgroup_mma(a_s.slice(SIDE * ROWS, ROWS), w_s, acc, is_async=True)
    return warpgroup_mma_wait(1, deps=[acc])


@gluon.jit
def _mm_consumer(
    out, h, dh, p_weight, p_dweight, p_bias, p_pair_of_row, p_schedule, ring, more_ring, h_ring, claims,
    staging, N, K, num_rows, R: gl.constexpr,
    PARTS: gl.constexpr, SPREAD: gl.constexpr, KN: gl.constexpr, EPILOGUE: gl.constexpr,
    STORE_H: gl.constexpr, STORE_OUT: gl.constexpr, STORE_DWEIGHT: gl.constexpr, ACT: gl.constexpr,
    BIAS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, RK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    a_s, w_s, full, empty = ring
    more_a_s, more_w_s = more_ring
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    BN_OUT: gl.constexpr = BN // (PARTS * SPREAD)
    ROWS: gl.constexpr = BM // CONSUMERS
    num_n = gl.cdiv(N, BN_OUT)
    num_m = gl.load(p_schedule)
    slot, phase = 0, 0
    h_slot, h_phase, filled = 0, 0, 0
    claim_slot, claim_phase = 0, 0
    i_tile, i_next = gl.program_id(0), gl.program_id(0) + gl.num_programs(0)
    i_e, row0, end, i_n = _mm_block(p_schedule, i_tile, num_m, num_n, GROUP)
    while i_tile < num_m * num_n:
        row = row0 + SIDE * ROWS
        # a consumer whose rows all lie behind the end lets the slots pass
        live = row < end
        acc = gl.zeros([ROWS, BN], gl.float32, MMA)
        for k0 in range(0, gl.where(live, K, 0), BK):
            mbarrier.wait(full.index(slot), phase)
            acc = _multiply(acc, a_s.index(slot), w_s.index(slot), SIDE, ROWS, KN)
            mbarrier.arrive(empty.index(before(slot, STAGES)), count=1, pred=k0 > 0)
            slot, phase = advance(slot, phase, STAGES)
        if R > 0:
            for _ in range(0, gl.where(live, R, 0), RK):
                mbarrier.wait(full.index(slot), phase)
                more_slot = slot * (BK // RK)
                more_a, more_w = more_a_s.index(more_slot), more_w_s.index(more_slot)
                acc = _multiply(acc, more_a, more_w, SIDE, ROWS, KN)
                mbarrier.arrive(empty.index(before(slot, STAGES)), count=1)
                slot, phase = advance(slot, phase, STAGES)
        for _ in range(gl.where(live, 0, gl.cdiv(K, BK) + R // RK)):
            mbarrier.wait(full.index(slot), phase)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = advance(slot, phase, STAGES)
        # the next block is looked up while the last product runs
        following = _mm_block(p_schedule, i_next, num_m, num_n, GROUP)
        i_tile, i_next = i_next, take_over(claims, claim_slot, claim_phase)
        claim_slot, claim_phase = advance(claim_slot, claim_phase, CLAIM_SLOTS)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before(slot, STAGES)), count=1, pred=live)

        n0 = i_n * BN_OUT
        if EPILOGUE == "none":
            store_plain(acc, out, p_bias, i_e, row, end, n0, N, staging, BIAS, BN, BUFFERS, SIDE)
        elif EPILOGUE == "act":
            store_act(
                acc, out, h, p_bias, i_e, row, end, n0, N, staging, PARTS, SPREAD, STORE_H, ACT, BIAS, BN,
                BUFFERS, SIDE,
            )  # fmt: skip
        else:
            h_slot, h_phase, filled = store_dact(
                acc, out, h, dh, p_weight, p_dweight, p_pair_of_row, row, end, i_n, num_rows, h_ring, h_slot,
                h_phase, filled, staging, STORE_H, STORE_OUT, STORE_DWEIGHT, ACT, BM, BN, SIDE,
            )  # fmt: skip
        i_e, row0, end, i_n = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_mm(
    a,  # descriptor [P, K], or pointer [T, K] with GATHER
    w,  # descriptor (E, C, N, K), or (E, 1, K, N) with KN
    out,  # ragged descriptor [P, N]
    h,  # ragged descriptor [P, C, N] of "act", descriptor of "dact"
    dh,  # ragged descriptor [P, C, N]
    p_weight,  # [P] by pair
    p_dweight,  # [NB, P] by row: partial sums
    more_a,  # descriptor [P, R]
    more_w,  # descriptor (E, C, N, R), or (E, 1, R, N) with KN
    p_pair_of_row,  # [P]
    p_schedule,  # [S, 3]
    p_bias,  # [E, G] or [E, N]
    stride_a, N, K, num_rows,
    TOP_K: gl.constexpr, GATHER: gl.constexpr, KN: gl.constexpr, EPILOGUE: gl.constexpr,
    STORE_H: gl.constexpr, STORE_OUT: gl.constexpr, STORE_DWEIGHT: gl.constexpr, ACT: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, SPREAD: gl.constexpr, R: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, RK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    EVEN_K: gl.constexpr, LAYOUT: gl.constexpr, MORE_LAYOUT: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), persistent; see grouped_mm._grouped_mm for what a block is."""
    FILLS: gl.constexpr = 129 if GATHER else 1  # the producer's threads, and the copy engine's bytes
    W_SHAPE: gl.constexpr = [STAGES, BK, BN] if KN else [STAGES, BN, BK]
    a_s = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], LAYOUT)
    w_s = gl.allocate_shared_memory(DTYPE, W_SHAPE, LAYOUT)
    staging = gl.allocate_shared_memory(DTYPE, [CONSUMERS * BUFFERS, BM // CONSUMERS, SLICE], LAYOUT)
    full, empty = barriers(STAGES, FILLS)
    ring = (a_s, w_s, full, empty)
    h_ring = (a_s, full, empty)  # a stand-in: partitions take it in any case
    if EPILOGUE == "dact":
        h_s = gl.allocate_shared_memory(DTYPE, [2 * H_SLOTS, BM, SLICE], LAYOUT)
        h_full, h_empty = barriers(H_SLOTS, 1)
        h_ring = (h_s, h_full, h_empty)
    more_ring = (a_s, w_s)
    if R > 0:  # a slot holds BK // RK blocks of the further step, and the first is used
        MORE_W_SHAPE: gl.constexpr = [STAGES * (BK // RK), RK, BN] if KN else [STAGES * (BK // RK), BN, RK]
        more_a_s = a_s._reinterpret(DTYPE, [STAGES * (BK // RK), BM, RK], MORE_LAYOUT)
        more_ring = (more_a_s, w_s._reinterpret(DTYPE, MORE_W_SHAPE, LAYOUT if KN else MORE_LAYOUT))
    claims = make_claims()
    fence_async_shared()
    gl.warp_specialize(
        [
            (_mm_consumer, (out, h, dh, p_weight, p_dweight, p_bias, p_pair_of_row, p_schedule, ring,
                            more_ring, h_ring, claims, staging, N, K, num_rows, R, PARTS, SPREAD, KN,
                            EPILOGUE, STORE_H, STORE_OUT, STORE_DWEIGHT, ACT, BIAS, BM, BN, BK, RK, GROUP,
                            STAGES, BUFFERS, 0)),
            (_mm_consumer, (out, h, dh, p_weight, p_dweight, p_bias, p_pair_of_row, p_schedule, ring,
                            more_ring, h_ring, claims, staging, N, K, num_rows, R, PARTS, SPREAD, KN,
                            EPILOGUE, STORE_H, STORE_OUT, STORE_DWEIGHT, ACT, BIAS, BM, BN, BK, RK, GROUP,
                            STAGES, BUFFERS, 1)),
            (_mm_producer, (a, w, h, more_a, more_w, p_pair_of_row, p_schedule, ring, more_ring, h_ring,
                            claims, stride_a, N, K, R, TOP_K, GATHER, PARTS, SPREAD, KN, EPILOGUE, ACT, BM,
                            BN, BK, RK, GROUP, STAGES, EVEN_K)),
        ],
        [4, 4 if GATHER else 1],
        [(REGISTERS - PRODUCER_REGISTERS) // 2, PRODUCER_REGISTERS],
    )  # fmt: skip


def serves(
    a: Tensor,
    w_EC__: Tensor,
    out_PN: Tensor | None,
    h_PG: Tensor | None,
    dh_PG: Tensor | None,
    more: Step | None,
    dim_n: int,
    *,
    gather: bool,
) -> bool:
    """Whether `plan` takes these operands. dim_n: of a part of h."""
    split = [t.unflatten(1, (-1, dim_n)) for t in (h_PG, dh_PG) if t is not None]
    tensors = [a, w_EC__, *split, *([] if out_PN is None else [out_PN]), *(more or ())]
    return (not gather or gatherable(a)) and available(*tensors)


def plan(
    name: str,
    a: Tensor,
    w_EC__: Tensor,
    out_PN: Tensor | None,
    h_PG: Tensor | None,
    dh_PG: Tensor | None,
    more: Step | None,
    dim_k: int,
    dim_n: int,
    options: dict[str, Any],
) -> Plan:
    """As grouped_mm._plan, whose `options` it takes over."""
    ring = tiles.RINGS[name]
    parts, spread = w_EC__.shape[1], options["SPREAD"]
    kn, gather = options["KN"], options["GATHER"]
    part_n = dim_n if not options["ACT"].interleaved else 2 * dim_n
    half, box = BLOCK_M // CONSUMERS.value, SLICE.value

    def split(tensor: Tensor | None, how: Callable[..., Described], rows: int) -> Described | None:
        return None if tensor is None else how(tensor.unflatten(1, (-1, part_n)), [rows, 1, box])

    def blocks(step: int) -> tuple[list[int], list[int]]:
        width = BLOCK_N // parts
        return [half, step], [1, 1, step, width] if kn else [1, 1, width, step]

    group = ring.group_of(w_EC__[0].numel() * w_EC__.element_size())
    rank = more.rows_PR.shape[1] if more else 0
    rank_k = math.gcd(rank, BLOCK_K)  # of a step behind K
    (a_block, w_block), (more_a_block, more_w_block) = blocks(BLOCK_K), blocks(rank_k)
    return Plan(
        _hopper_mm,
        (
            None if gather else described(a, a_block),
            described(w_EC__, w_block),
            None if out_PN is None else ragged(out_PN, [half, box]),
            split(h_PG, described, BLOCK_M) if name == "dh" else split(h_PG, ragged, half),
            split(dh_PG, ragged, half),
            None,
            None,
            described(more.rows_PR, more_a_block) if more else None,
            described(more.w, more_w_block) if more else None,
            None,
            None,
            None,
        ),
        (a.stride(0), dim_n, dim_k),
        dict(
            options, PARTS=parts, R=rank, BM=BLOCK_M, BN=BLOCK_N, BK=BLOCK_K, RK=rank_k, GROUP=group,
            STAGES=ring.stages, BUFFERS=ring.buffers, PRODUCER_REGISTERS=ring.producer_registers,
            EVEN_K=dim_k % BLOCK_K == 0, LAYOUT=swizzled(2), MORE_LAYOUT=swizzled(2, width=2 * rank_k),
            DTYPE=gl.bfloat16 if a.dtype == torch.bfloat16 else gl.float16,
        ),
        blocks=cdiv(dim_n, BLOCK_N // (parts * spread)),
        most_programs=processors(a.device),
        warps=CONSUMER_WARPS,
    )  # fmt: skip
