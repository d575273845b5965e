"""The ragged-contraction product of grouped_dw.py for Hopper, around a ring; one operand is gathered.

Legend: see moe.py and ring.py; M, N dims of the weight.
"""

from __future__ import annotations

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
from fastexperts.kernels.launch import Plan, cdiv
from fastexperts.kernels.operands import describable, processors
from fastexperts.kernels.ring import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CLAIM_SLOTS,
    CONSUMER_WARPS,
    CONSUMERS,
    REGISTERS,
    advance,
    available,
    barriers,
    before,
    claim,
    columns,
    described,
    gatherable,
    hand_over,
    handed,
    make_claims,
    put,
    ragged,
    rows,
    swizzle,
    swizzled,
    take_over,
)


@gluon.jit
def _dw_block(
    p_offsets, i_tile, num_experts, num_m, num_n, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """(expert, its first row, the end of its rows, first row and column of the block)"""
    per_expert = num_m * num_n
    i_tile = gl.minimum(i_tile, num_experts * per_expert - 1)
    i_e = i_tile // per_expert
    i_m, i_n = swizzle(i_tile % per_expert, num_m, num_n, GROUP)
    return i_e, gl.load(p_offsets + i_e), gl.load(p_offsets + i_e + 1), i_m * BM, i_n * BN


@gluon.jit
def _dw_producer(
    a, b, p_pair_of_row, p_offsets, p_schedule, ring, claims, stride, num_experts, M, N,
    TOP_K: gl.constexpr, GATHER_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_s, b_s, full, empty = ring
    WIDTH: gl.constexpr = BM // CONSUMERS if GATHER_A else BN
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BYTES: gl.constexpr = (BN if GATHER_A else BM) * BK * 2
    num_m, num_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    blocks = num_experts * num_m * num_n
    slot, phase = 0, 1
    claim_slot, claim_phase = 0, 1
    i_tile, i_next = gl.program_id(0), gl.program_id(0) + gl.num_programs(0)
    while i_tile < blocks:
        claimed = claim(p_schedule, 4)
        _, start, end, m0, n0 = _dw_block(p_offsets, i_tile, num_experts, num_m, num_n, BM, BN, GROUP)
        o_r = gl.arange(0, BK, gl.SliceLayout(1, ROWS))
        o_c = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, ROWS)), 0)
        pair = gl.load(p_pair_of_row + start + o_r, mask=start + o_r < end, other=0)
        for row0 in range(start, end, BK):
            r0, r1, r2 = rows(row0, end)
            bar = full.index(slot)
            m_r = gl.expand_dims(row0 + o_r < end, 1)
            p_row = gl.expand_dims((pair // TOP_K).to(gl.int64) * stride, 1)
            # the next step's pairs travel while this one waits
            ahead = row0 + BK + o_r
            pair = gl.load(p_pair_of_row + ahead, mask=ahead < end, other=0)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(CONSUMERS):
                if GATHER_A:
                    col = m0 + i * 64 + o_c
                    async_copy.async_copy_global_to_shared(
                        a_s.index(slot * CONSUMERS + i), a + p_row + col, mask=m_r & (col < M)
                    )
                else:
                    tma.async_copy_global_to_shared(
                        a, [r0, r1, r2, m0 + i * 64], bar, a_s.index(slot * CONSUMERS + i)
                    )
            if not GATHER_A:
                col = n0 + o_c
                async_copy.async_copy_global_to_shared(b_s.index(slot), b + p_row + col, mask=m_r & (col < N))
            else:
                tma.async_copy_global_to_shared(b, [r0, r1, r2, n0], bar, b_s.index(slot))
            async_copy.mbarrier_arrive(bar, increment_count=False)
            slot, phase = advance(slot, phase, STAGES)
        i_tile, i_next = i_next, handed(claimed, p_schedule, blocks)
        hand_over(claims, claim_slot, claim_phase, i_next, 4)
        claim_slot, claim_phase = advance(claim_slot, claim_phase, CLAIM_SLOTS)


@gluon.jit
def _dw_consumer(
    out, p_offsets, ring, claims, staging, num_experts, M, N, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    a_s, b_s, full, empty = ring
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    WIDTH: gl.constexpr = 1024 // out.dtype.primitive_bitwidth
    num_m, num_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    slot, phase = 0, 0
    claim_slot, claim_phase = 0, 0
    i_tile, i_next = gl.program_id(0), gl.program_id(0) + gl.num_programs(0)
    i_e, start, end, m0, n0 = _dw_block(p_offsets, i_tile, num_experts, num_m, num_n, BM, BN, GROUP)
    while i_tile < num_experts * num_m * num_n:
        acc = gl.zeros([BM // CONSUMERS, BN], gl.float32, MMA)
        for row0 in range(start, end, BK):
            mbarrier.wait(full.index(slot), phase)
            block_a = a_s.index(slot * CONSUMERS + SIDE).permute((1, 0))
            acc = warpgroup_mma(block_a, b_s.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before(slot, STAGES)), count=1, pred=row0 > start)
            slot, phase = advance(slot, phase, STAGES)
        # the next block is looked up while the last product runs
        following = _dw_block(p_offsets, i_next, num_experts, num_m, num_n, BM, BN, GROUP)
        i_tile, i_next = i_next, take_over(claims, claim_slot, claim_phase)
        claim_slot, claim_phase = advance(claim_slot, claim_phase, CLAIM_SLOTS)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before(slot, STAGES)), count=1, pred=start < end)
        for j in gl.static_range(BN // WIDTH):
            dw = columns(acc, j, BN // WIDTH)
            put(out, [i_e, m0 + SIDE * (BM // CONSUMERS), n0 + j * WIDTH], dw, staging, SIDE, j, BUFFERS)
        i_e, start, end, m0, n0 = following
    tma.store_wait(0)


@gluon.jit
def _hopper_dw(
    a,  # ragged descriptor [P, M], or pointer [T, M] with GATHER_A
    b,  # ragged descriptor [P, N], or pointer [T, N] without
    out,  # descriptor (E, M, N)
    p_pair_of_row,  # [P]
    p_offsets,  # [E + 1]
    p_schedule,  # [S, 3]: the counter of claims alone
    stride, num_experts, M, N,
    TOP_K: gl.constexpr, GATHER_A: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), persistent; see grouped_dw._grouped_dw for what a block is. Rows behind an expert's
    end arrive as zeros.
    """
    WIDTH: gl.constexpr = 1024 // out.dtype.primitive_bitwidth
    a_s = gl.allocate_shared_memory(DTYPE, [STAGES * CONSUMERS, BK, BM // CONSUMERS], LAYOUT)
    b_s = gl.allocate_shared_memory(DTYPE, [STAGES, BK, BN], LAYOUT)
    staging = gl.allocate_shared_memory(out.dtype, [CONSUMERS * BUFFERS, BM // CONSUMERS, WIDTH], OUT_LAYOUT)
    full, empty = barriers(STAGES, 129)  # the producer's threads, and the copy engine's bytes
    claims = make_claims()
    fence_async_shared()
    ring = (a_s, b_s, full, empty)
    gl.warp_specialize(
        [
            (_dw_consumer, (out, p_offsets, ring, claims, staging, num_experts, M, N,
                            BM, BN, BK, GROUP, STAGES, BUFFERS, 0)),
            (_dw_consumer, (out, p_offsets, ring, claims, staging, num_experts, M, N,
                            BM, BN, BK, GROUP, STAGES, BUFFERS, 1)),
            (_dw_producer, (a, b, p_pair_of_row, p_offsets, p_schedule, ring, claims, stride, num_experts,
                            M, N, TOP_K, GATHER_A, BM, BN, BK, GROUP, STAGES)),
        ],
        [4, 4],
        [(REGISTERS - PRODUCER_REGISTERS) // 2, PRODUCER_REGISTERS],
    )  # fmt: skip


def serves(rows_M: Tensor, rows_N: Tensor, out_EMN: Tensor, *, gather_m: bool) -> bool:
    """Whether `plan` takes these operands; the gradient may be fp32."""
    stored = out_EMN.element_size() <= 4 and describable(out_EMN)
    return stored and gatherable(rows_M if gather_m else rows_N) and available(rows_M, rows_N)


def plan(rows_M: Tensor, rows_N: Tensor, out_EMN: Tensor, top_k: int, *, gather_m: bool) -> Plan:
    """As grouped_dw._plan."""
    ring = tiles.RINGS["dw2" if gather_m else "dw1"]
    experts, dim_m, dim_n = out_EMN.shape
    half, width = BLOCK_M // CONSUMERS.value, 128 // out_EMN.element_size()
    return Plan(
        _hopper_dw,
        (
            None if gather_m else ragged(rows_M, [BLOCK_K, half]),
            ragged(rows_N, [BLOCK_K, BLOCK_N]) if gather_m else None,
            described(out_EMN, [1, half, width]),
            None,
            None,
            None,
        ),
        ((rows_M if gather_m else rows_N).stride(0), experts, dim_m, dim_n),
        dict(
            TOP_K=top_k, GATHER_A=gather_m, BM=BLOCK_M, BN=BLOCK_N, BK=BLOCK_K, GROUP=ring.group,
            STAGES=ring.stages, BUFFERS=ring.buffers, PRODUCER_REGISTERS=ring.producer_registers,
            DTYPE=gl.bfloat16 if rows_M.dtype == torch.bfloat16 else gl.float16, LAYOUT=swizzled(2),
            OUT_LAYOUT=swizzled(2, 8 * out_EMN.element_size()),
        ),
        blocks=experts * cdiv(dim_m, BLOCK_M) * cdiv(dim_n, BLOCK_N),
        most_programs=processors(rows_M.device),
        warps=CONSUMER_WARPS,
    )  # fmt: skip
