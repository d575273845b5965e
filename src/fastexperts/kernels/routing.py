"""Routing on the device: count, scan, stable placement, in three launches and without atomics.

Legend: P pairs, E experts, S tiles of the schedule, B blocks of `BLOCK` pairs. See routing.Routing for the
result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.routing import Routing, schedule_length

CHUNK = 1024  # blocks that a step of the scan takes
BLOCK = 64  # pairs per program: ranks inside a block cost BLOCK^2 comparisons, and their registers occupancy


@triton.jit(do_not_specialize=["num_pairs"])
def _count(
    p_ids,  # [P] expert ids
    p_count,  # [B + 1, E] out: pairs of the block per expert
    num_pairs,
    num_experts: tl.constexpr,
    BLOCK: tl.constexpr,
    E2: tl.constexpr,
):
    """Grid (B,): one program counts the experts of one block of pairs."""
    i_b = tl.program_id(0)
    o_p = i_b * BLOCK + tl.arange(0, BLOCK)
    id_ = tl.load(p_ids + o_p, mask=o_p < num_pairs, other=-1)
    valid = (id_ >= 0) & (id_ < num_experts)
    o_e = tl.arange(0, E2)
    count = tl.histogram(tl.where(valid, id_, E2).to(tl.int32), E2, mask=valid)
    tl.store(p_count + i_b * num_experts + o_e, count, mask=o_e < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan(
    p_count,  # [B + 1, E] in: counts; out: pairs of the expert in earlier blocks, and last in all
    num_blocks,
    num_experts: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (E,): one program scans one expert's counts over the blocks."""
    i_e = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for start in range(0, num_blocks, CHUNK):
        o_b = start + tl.arange(0, CHUNK)
        p_chunk = p_count + o_b.to(tl.int64) * num_experts + i_e
        count = tl.load(p_chunk, mask=o_b < num_blocks, other=0)
        tl.store(p_chunk, total + tl.cumsum(count, 0) - count, mask=o_b < num_blocks)
        total += tl.sum(count, 0)
    tl.store(p_count + num_blocks.to(tl.int64) * num_experts + i_e, total)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place(
    p_ids,  # [P]
    p_count,  # [B + 1, E] pairs of the expert in earlier blocks, and last in all
    p_row_of_pair,  # [P] out
    p_pair_of_row,  # [P] out
    p_offsets,  # [E + 1] out
    p_schedule,  # [S, 3] out
    num_pairs,
    num_tiles,
    num_experts: tl.constexpr,
    BLOCK: tl.constexpr,
    E2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (B,): one program places one block of pairs and writes every B-th tile of the schedule."""
    i_b = tl.program_id(0)
    o_e = tl.arange(0, E2)
    p_total = p_count + tl.num_programs(0).to(tl.int64) * num_experts
    total = tl.load(p_total + o_e, mask=o_e < num_experts, other=0)
    end = tl.cumsum(total, 0)
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, 0)
    rows = tl.sum(total, 0)
    if i_b == 0:
        tl.store(p_offsets + o_e + 1, end, mask=o_e < num_experts)
        tl.store(p_offsets, 0)
        tl.store(p_schedule, tl.sum(tiles, 0))
        tl.store(p_schedule + 1, BLOCK_M)
        tl.store(p_schedule + 2, 0)

    o_p = i_b * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < num_pairs
    id_ = tl.load(p_ids + o_p, mask=m_p, other=-1)
    valid = (id_ >= 0) & (id_ < num_experts)
    id_ = tl.where(valid, id_, num_experts).to(tl.int32)  # after the test: 2^32 is no expert
    # pairs without an expert form one more group behind the last row; its earlier members are what is not
    # counted
    earlier = (id_[None, :] == id_[:, None]) & (o_p[None, :] < o_p[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    counted = tl.load(p_count + i_b * num_experts + o_e, mask=o_e < num_experts, other=0)
    base = tl.gather(end - total + counted, tl.where(valid, id_, 0), 0)
    base_invalid = rows + i_b * BLOCK - tl.sum(counted, 0)
    row = tl.where(valid, base, base_invalid) + rank
    tl.store(p_row_of_pair + o_p, tl.where(valid, row, -1), mask=m_p)
    tl.store(p_pair_of_row + row, tl.where(valid, o_p, -1), mask=m_p)

    for i_t in range(i_b, num_tiles, tl.num_programs(0)):
        before = tiles_end <= i_t
        expert = tl.minimum(tl.sum(before.to(tl.int32), 0), num_experts - 1)
        first_tile = tl.sum(tl.where(before, tiles, 0), 0)
        first_row = tl.sum(tl.where(o_e < expert, total, 0), 0)
        rows_end = tl.sum(tl.where(o_e <= expert, total, 0), 0)
        p_tile = p_schedule + 3 + 3 * i_t
        tl.store(p_tile, expert)
        tl.store(p_tile + 1, first_row + (i_t - first_tile) * BLOCK_M)
        tl.store(p_tile + 2, rows_end)


@planned
def _plans(ids_P: Tensor, *, num_experts: int, block_m: int) -> tuple[Plan, Plan, Plan]:
    """Of `_count`, `_scan` and `_place`."""
    padded = max(16, triton.next_power_of_2(num_experts))
    count = Plan(_count, (None,) * 2, (), dict(num_experts=num_experts, BLOCK=BLOCK, E2=padded))
    scan = Plan(_scan, (None,), (), dict(num_experts=num_experts, CHUNK=CHUNK))
    place = Plan(
        _place, (None,) * 6, (), dict(num_experts=num_experts, BLOCK=BLOCK, E2=padded, BLOCK_M=block_m)
    )
    return count, scan, place


def route(ids_TK: Tensor, num_experts: int, block_m: int) -> Routing:
    """See backend.Backend."""
    ids_P = ids_TK.reshape(-1)
    num_pairs, top_k = ids_P.numel(), ids_TK.shape[1]
    num_blocks = cdiv(num_pairs, BLOCK)
    length = schedule_length(num_pairs, num_experts, block_m)

    def new(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    if num_pairs == 0:
        schedule_S3 = new(1, 3).zero_()
        schedule_S3[0, 1] = block_m
        return Routing(new(0), new(0), new(num_experts + 1).zero_(), schedule_S3, top_k)
    counts = new(num_blocks + 1, num_experts)
    routing = Routing(new(num_pairs), new(num_pairs), new(num_experts + 1), new(length, 3), top_k)
    count, scan, place = _plans(ids_P, num_experts=num_experts, block_m=block_m)
    count((num_blocks,), (ids_P, counts), num_pairs)
    scan((num_experts,), (counts,), num_blocks)
    place((num_blocks,), (ids_P, counts, *routing.tensors), num_pairs, length - 1)
    return routing
