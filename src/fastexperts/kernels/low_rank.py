"""Gradients of an update's factors: dfactor[e] = against[rows of e]^T @ rows[rows of e], and from the same
reading, where that pays, the rows' own product with the factor (`shrink`).

Few columns against many: what counts is that the wide rows are read once.

Legend: see moe.py; N columns of rows, NB blocks of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.dtypes import accumulator
from fastexperts.kernels import tiles
from fastexperts.kernels.copy_scaled import copy_scaled
from fastexperts.kernels.grouped_dw import dw
from fastexperts.kernels.grouped_mm import shrink
from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import packed, precision, tl_accumulator
from fastexperts.routing import Routing

WIDEST = 128
"""The rank up to which rows are streamed: a program holds that many columns of `against`."""
READ_OVER_PARTIAL = 4
"""Both come of one reading where the partial products, one per block of columns, are a quarter of its bytes
or less: up to rank 32 in 16 bits on Hopper.
"""
SUMMED = 1024  # elements of a program that sums them


@triton.jit(do_not_specialize=["num_rows"])
def _dfactor(
    p_rows,  # [P, N], or tokens [T, N] with GATHER
    p_against,  # [P, R]
    p_factor,  # (E, R, N)
    p_out,  # (E, RANK, N)
    p_partial,  # [NB, P, R]: rows @ factor^T of each block of columns
    p_pair_of_row,  # [P]
    p_offsets,  # [E + 1]
    stride, factor_e, factor_r, factor_n, out_e, out_r, out_n, N, num_rows,
    R: tl.constexpr, RANK: tl.constexpr, SCALE: tl.constexpr, TOP_K: tl.constexpr, GATHER: tl.constexpr,
    SHRINK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (E, N blocks): one program owns BN columns of one expert, BK of its rows a step. Experts first:
    the same columns of all tokens stay in L2.
    """
    i_e = tl.program_id(0)
    i_n = tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    end = tl.load(p_offsets + i_e + 1)
    if SHRINK:
        p_block = p_factor + i_e.to(tl.int64) * factor_e
        p_block += o_n[:, None].to(tl.int64) * factor_n + o_r[None, :] * factor_r
        factor = tl.load(p_block, mask=m_n[:, None] & (o_r < R)[None, :], other=0.0)
    acc = tl.zeros([BN, BR], ACC)
    for row0 in tl.range(tl.load(p_offsets + i_e), end, BK):
        row = row0 + tl.arange(0, BK)
        m_k = row < end
        source = row
        if GATHER:
            source = tl.load(p_pair_of_row + row, mask=m_k, other=0) // TOP_K
        p_x = p_rows + source[:, None].to(tl.int64) * stride + o_n[None, :]
        x = tl.load(p_x, mask=m_k[:, None] & m_n[None, :], other=0.0)
        m_a = m_k[:, None] & (o_r < R)[None, :]
        against = tl.load(p_against + row[:, None].to(tl.int64) * R + o_r[None, :], mask=m_a, other=0.0)
        acc = tl.dot(x.T, against, acc, input_precision=PRECISION, out_dtype=ACC)
        if SHRINK:
            part = tl.dot(x, factor, input_precision=PRECISION, out_dtype=ACC)
            o_part = (i_n.to(tl.int64) * num_rows + row)[:, None] * R + o_r[None, :]
            tl.store(p_partial + o_part, part, mask=m_a)
    p_block = p_out + i_e.to(tl.int64) * out_e
    p_block += o_n[:, None].to(tl.int64) * out_n + o_r[None, :].to(tl.int64) * out_r
    m_block = m_n[:, None] & (o_r < RANK)[None, :]
    tl.store(p_block, (acc * SCALE).to(p_out.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["size"])
def _sum_partial(
    p_partial,  # [NB * size]
    p_out,  # [size]
    size,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (size blocks,): one program adds the NB partial sums of BLOCK elements, in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], p_partial.dtype.element_ty)
    for i in tl.range(0, BLOCKS, loop_unroll_factor=8):
        total += tl.load(p_partial + i * size.to(tl.int64) + o, mask=o < size, other=0.0)
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=o < size)


@planned
def _plan(
    rows: Tensor, against_PR: Tensor, factor_ERN: Tensor | None, out_ErN: Tensor, *, scale: float, top_k: int,
    tokens: bool,
) -> Plan:  # fmt: skip
    num_rank, dim_n = against_PR.shape[1], out_ErN.shape[2]
    tile = tiles.tile(rows.device, rows.dtype, "dfactor")
    block_r, block_n = _block(tile, num_rank)
    block_n = tiles.fitted(block_n, dim_n)
    strides = (0, 0, 0) if factor_ERN is None else factor_ERN.stride()
    return Plan(
        _dfactor,
        (None,) * 7,
        (rows.stride(0), *strides, *out_ErN.stride(), dim_n),
        dict(
            R=num_rank, RANK=out_ErN.shape[1], SCALE=scale, TOP_K=top_k, GATHER=tokens,
            SHRINK=factor_ERN is not None, BN=block_n, BK=tile.k, BR=block_r, ACC=tl_accumulator(rows.dtype),
            PRECISION=precision(rows.dtype),
        ),
        blocks=cdiv(dim_n, block_n),
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


def _block(tile: tiles.Tile, rank: int) -> tuple[int, int]:
    """(of the rank, of columns)."""
    block_r = max(16, triton.next_power_of_2(rank))
    return block_r, max(16, tile.n * tile.m // max(tile.m, block_r))


def _reads_once(rows: Tensor, rank: int) -> bool:
    block_r, block_n = _block(tiles.tile(rows.device, rows.dtype, "dfactor"), rank)
    partial, read = block_r * accumulator(rows.dtype).itemsize, block_n * rows.dtype.itemsize
    return READ_OVER_PARTIAL * partial <= read


@planned
def _sum_plan(partial: Tensor, out: Tensor, *, blocks: int) -> Plan:
    return Plan(_sum_partial, (None, None), (), dict(BLOCKS=blocks, BLOCK=SUMMED))


def dfactor(
    rows: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool, scale: float = 1.0
) -> Tensor:
    """See backend.Backend."""
    rank = against_PR.shape[1]
    if rank <= WIDEST:
        return _launch(rows, None, against_PR, routing, like_ErN, tokens, scale)[1]
    shape = like_ErN.shape[0], rank, like_ErN.shape[2]
    like_ERN = like_ErN.new_empty(shape, dtype=accumulator(rows.dtype))
    grad_ERN = dw(against_PR, rows, routing, like_ERN, "right" if tokens else "")
    return copy_scaled(grad_ERN, torch.empty_like(like_ErN), scale)


def shrink_dfactor(
    rows: Tensor, factor_ERN: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool
) -> tuple[Tensor, Tensor]:
    """See backend.Backend."""
    if _reads_once(rows, factor_ERN.shape[1]):
        return _launch(rows, factor_ERN, against_PR, routing, like_ErN, tokens)
    rows_PR = shrink(rows, factor_ERN, routing, tokens)
    return rows_PR, dfactor(rows, against_PR, routing, like_ErN, tokens)


def _launch(
    rows: Tensor, factor_ERN: Tensor | None, against_PR: Tensor, routing: Routing, like_ErN: Tensor,
    tokens: bool, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rows @ factor^T, of no rows without a factor; dfactor)."""
    rows, against_PR, grad_ErN = packed(rows), against_PR.contiguous(), torch.empty_like(like_ErN)
    rows_PR = torch.empty_like(against_PR if factor_ERN is not None else against_PR[:0])
    if grad_ErN.numel() == 0 or against_PR.shape[0] == 0:
        return rows_PR.zero_(), grad_ErN.zero_()
    # scattered stores of 4 bytes cost more than a copy that turns blocks (docs/log.md)
    out_ErN = grad_ErN if grad_ErN.stride(2) == 1 else grad_ErN.new_empty(grad_ErN.shape)
    plan = _plan(rows, against_PR, factor_ERN, out_ErN, scale=scale, top_k=routing.top_k, tokens=tokens)
    blocks = plan.blocks if factor_ERN is not None else 0
    partial = rows_PR.new_empty(blocks * rows_PR.numel(), dtype=accumulator(rows.dtype))
    # `rows` stands in for what is not asked for
    every = (rows, against_PR, factor_ERN, out_ErN, partial if blocks else None)
    tensors = (*[rows if t is None else t for t in every], routing.pair_of_row_P, routing.offsets_E1)
    plan((out_ErN.shape[0], plan.blocks), tensors, against_PR.shape[0])
    if blocks:
        sums = (partial, rows_PR.view(-1))
        _sum_plan(*sums, blocks=blocks)((cdiv(rows_PR.numel(), SUMMED),), sums, rows_PR.numel())
    return rows_PR, out_ErN if out_ErN is grad_ErN else copy_scaled(out_ErN, grad_ErN)
