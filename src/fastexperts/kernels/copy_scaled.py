"""Factors of updates, from the layout they are stored in to the one that products read (`pack`), and
gradients back: scaled, cast, padded and transposed in one pass.

Legend: E experts, X and Y the two dims of a factor.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import tl_accumulator

ELEMENTS = 2048  # of a program's block


@triton.jit
def _copy_block(
    p_in,  # [E, X, Y]
    p_out,  # [E, X', Y']
    i_block,
    in_e, in_x, in_y, out_e, out_x, out_y, num_e, in_dim_x, in_dim_y, out_dim_x, out_dim_y,
    SCALE: tl.constexpr, ACC: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Block number i_block of the output, E blocks first: zeros where `p_in` ends before."""
    blocks_e, blocks_x = tl.cdiv(num_e, BE), tl.cdiv(out_dim_x, BX)
    i_e, i_x, i_y = i_block % blocks_e, i_block // blocks_e % blocks_x, i_block // (blocks_e * blocks_x)
    o_e = (i_e * BE + tl.arange(0, BE))[:, None, None].to(tl.int64)
    o_x = (i_x * BX + tl.arange(0, BX))[None, :, None].to(tl.int64)
    o_y = (i_y * BY + tl.arange(0, BY))[None, None, :].to(tl.int64)
    m_in = (o_e < num_e) & (o_x < in_dim_x) & (o_y < in_dim_y)
    value = tl.load(p_in + o_e * in_e + o_x * in_x + o_y * in_y, mask=m_in, other=0.0).to(ACC) * SCALE
    m_out = (o_e < num_e) & (o_x < out_dim_x) & (o_y < out_dim_y)
    p_block = p_out + o_e * out_e + o_x * out_x + o_y * out_y
    tl.store(p_block, value.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _copy_scaled(
    p_in,  # [E, X, Y]
    p_out,  # [E, X', Y']
    in_e, in_x, in_y, out_e, out_x, out_y, num_e, in_dim_x, in_dim_y, out_dim_x, out_dim_y,
    SCALE: tl.constexpr, ACC: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Grid (blocks,): one program writes one block."""
    _copy_block(
        p_in, p_out, tl.program_id(0), in_e, in_x, in_y, out_e, out_x, out_y, num_e, in_dim_x, in_dim_y,
        out_dim_x, out_dim_y, SCALE, ACC, BE, BX, BY,
    )  # fmt: skip


@triton.jit
def _pack(
    p_a,  # (E, r, K)
    p_out_a,  # [E, R, K]
    p_b,  # (E, N, r)
    p_out_b,  # [E, N, R]
    a_e, a_r, a_k, out_a_e, out_a_r, out_a_k, num_e, rank_a, dim_k, padded_a, out_k,
    b_e, b_n, b_r, out_b_e, out_b_n, out_b_r, num_e_b, dim_n, rank_b, out_n, padded_b, blocks_a,
    SCALE: tl.constexpr, ACC_A: tl.constexpr, ACC_B: tl.constexpr,
    AE: tl.constexpr, AX: tl.constexpr, AY: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr,
    BY: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of a, then of b): one program writes one block of either."""
    i_block = tl.program_id(0)
    if i_block < blocks_a:
        _copy_block(
            p_a, p_out_a, i_block, a_e, a_r, a_k, out_a_e, out_a_r, out_a_k, num_e, rank_a, dim_k, padded_a,
            out_k, SCALE, ACC_A, AE, AX, AY,
        )  # fmt: skip
    else:
        _copy_block(
            p_b, p_out_b, i_block - blocks_a, b_e, b_n, b_r, out_b_e, out_b_n, out_b_r, num_e_b, dim_n,
            rank_b, out_n, padded_b, 1.0, ACC_B, BE, BX, BY,
        )  # fmt: skip


@planned
def _plan(source_EXY: Tensor, out_EXY: Tensor, *, scale: float) -> Plan:
    (be, bx, by), scalars, blocks = _blocks(source_EXY, out_EXY)
    options = dict(SCALE=scale, ACC=tl_accumulator(source_EXY.dtype), BE=be, BX=bx, BY=by)
    return Plan(_copy_scaled, (None,) * 2, scalars, options, blocks=blocks)


@planned
def _pack_plan(a_ErK: Tensor, a_ERK: Tensor, b_ENr: Tensor, b_ENR: Tensor, *, scale: float) -> Plan:
    (ae, ax, ay), of_a, blocks_a = _blocks(a_ErK, a_ERK)
    (be, bx, by), of_b, blocks_b = _blocks(b_ENr, b_ENR)
    options = dict(
        SCALE=scale, ACC_A=tl_accumulator(a_ErK.dtype), ACC_B=tl_accumulator(b_ENr.dtype),
        AE=ae, AX=ax, AY=ay, BE=be, BX=bx, BY=by,
    )  # fmt: skip
    scalars = (*of_a, *of_b, blocks_a)
    return Plan(_pack, (None,) * 4, scalars, options, blocks=blocks_a + blocks_b)


def _blocks(source_EXY: Tensor, out_EXY: Tensor) -> tuple[list[int], tuple[int, ...], int]:
    """(the dims of a block, the scalars of `_copy_block`, how many blocks). A block has up to ELEMENTS, first
    in the dims whose neighbours are adjacent, in one tensor or the other.
    """
    adjacent = {min(range(3), key=tensor.stride) for tensor in (source_EXY, out_EXY)}
    block, left = [1, 1, 1], ELEMENTS
    for dim in sorted(range(2, -1, -1), key=lambda dim: dim not in adjacent):
        most = min(left, 32) if dim in adjacent and len(adjacent) == 2 else left
        block[dim] = min(most, triton.next_power_of_2(out_EXY.shape[dim]))
        left //= block[dim]
    scalars = (*source_EXY.stride(), *out_EXY.stride(), *source_EXY.shape, *out_EXY.shape[1:])
    grid = (cdiv(dim, size) for dim, size in zip(out_EXY.shape, block, strict=True))
    return block, scalars, math.prod(grid)


def copy_scaled(source_EXY: Tensor, out_EXY: Tensor, scale: float = 1.0) -> Tensor:
    """out = scale * source, whatever the strides and dtypes of either: 0 where source ends before out."""
    if out_EXY.numel():
        plan = _plan(source_EXY, out_EXY, scale=scale)
        plan((plan.blocks,), (source_EXY, out_EXY))
    return out_EXY


def pack(a_ErK: Tensor, b_ENr: Tensor, scale: float, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See backend.Backend."""
    (experts, _, dim_k), dim_n = a_ErK.shape, b_ENr.shape[1]
    a_ERK = a_ErK.new_empty((experts, rank, dim_k), dtype=dtype)
    b_ENR = b_ENr.new_empty((experts, dim_n, rank), dtype=dtype)
    if a_ERK.numel() and b_ENR.numel():
        plan = _pack_plan(a_ErK, a_ERK, b_ENr, b_ENR, scale=scale)
        plan((plan.blocks,), (a_ErK, a_ERK, b_ENr, b_ENR))
    return a_ERK, b_ENR
