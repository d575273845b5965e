"""Rows to tokens and back: `combine` (weighted sum over k), `gather` (a row's token), `weigh` (rows times
weights), and the sums of dweight.

Legend: T tokens, K top-k, P = T*K rows, D model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import tl_accumulator
from fastexperts.routing import Routing

_BLOCK_D = 2048


@triton.jit
def _combine(
    p_y,  # [P, D]
    p_weight,  # [P] by pair
    p_row_of_pair,  # [P]
    p_out,  # [T, D]
    dim_d,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, D blocks): one program owns BLOCK_D columns of one token and adds k in ascending order."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < dim_d
    out = tl.zeros([BLOCK_D], ACC)
    for k in tl.static_range(TOP_K):
        row = tl.load(p_row_of_pair + i_t * TOP_K + k).to(tl.int64)
        y = tl.load(p_y + row * dim_d + o_d, mask=m_d & (row >= 0), other=0.0).to(ACC)
        if WEIGHTED:
            y *= tl.load(p_weight + i_t * TOP_K + k, mask=row >= 0, other=0.0).to(ACC)
        out += y
    tl.store(p_out + i_t * dim_d + o_d, out.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def _gather(
    p_x,  # [T, D], rows `stride_t` apart
    p_row_of_pair,  # [P]
    p_out,  # [P, D]
    stride_t,
    dim_d,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, D blocks): one program reads BLOCK_D columns of a token once and writes them to its K rows."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < dim_d
    x = tl.load(p_x + i_t * stride_t + o_d, mask=m_d)
    for k in tl.static_range(TOP_K):
        row = tl.load(p_row_of_pair + i_t * TOP_K + k).to(tl.int64)
        tl.store(p_out + row * dim_d + o_d, x, mask=m_d & (row >= 0))


@triton.jit(do_not_specialize=["num_rows"])
def _weigh(
    p_rows,  # [P, R]
    p_weight,  # [P] by pair
    p_pair_of_row,  # [P]
    p_out,  # [P, R]
    num_rows,
    R: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (P blocks,): one program owns BLOCK_P rows; rows without a pair stay undefined."""
    o_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_r = tl.arange(0, BLOCK_R)
    pair = tl.load(p_pair_of_row + o_p, mask=o_p < num_rows, other=-1)
    weight = tl.load(p_weight + pair, mask=pair >= 0, other=0.0)
    m_block = (pair >= 0)[:, None] & (o_r < R)[None, :]
    o_block = o_p.to(tl.int64)[:, None] * R + o_r[None, :]
    value = tl.load(p_rows + o_block, mask=m_block).to(ACC) * weight.to(ACC)[:, None]
    tl.store(p_out + o_block, value.to(p_out.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _sum_dweight(
    p_partial,  # [NB, P] by row
    p_plus,  # [P] by pair
    p_row_of_pair,  # [P]
    p_out,  # [P] by pair
    num_pairs,
    num_blocks,
    BLOCK: tl.constexpr,
    PLUS: tl.constexpr,
):
    """Grid (P blocks): one program sums the column blocks of BLOCK pairs in order; no row gives 0."""
    o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < num_pairs
    row = tl.load(p_row_of_pair + o_p, mask=m_p, other=-1)
    total = tl.zeros([BLOCK], p_partial.dtype.element_ty)
    p_block = p_partial + row
    for _ in range(num_blocks):
        total += tl.load(p_block, mask=row >= 0, other=0.0)
        p_block += num_pairs
    if PLUS:
        total += tl.load(p_plus + o_p, mask=m_p, other=0.0)
    tl.store(p_out + o_p, total.to(p_out.dtype.element_ty), mask=m_p)


@planned
def _combine_plan(y_PD: Tensor, weight_TK: Tensor | None, out_TD: Tensor, *, top_k: int) -> Plan:
    dim_d = y_PD.shape[1]
    block = min(_BLOCK_D, triton.next_power_of_2(dim_d))
    options = dict(TOP_K=top_k, WEIGHTED=weight_TK is not None, ACC=tl_accumulator(y_PD.dtype), BLOCK_D=block)
    return Plan(_combine, (None,) * 4, (dim_d,), options, blocks=cdiv(dim_d, block))


def combine(y_PD: Tensor, weight_TK: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
    """See backend.Backend."""
    num_tokens, top_k = routing.num_pairs // routing.top_k, routing.top_k
    out_TD = y_PD.new_empty((num_tokens, y_PD.shape[1]), dtype=dtype)
    if out_TD.numel():
        weight_TK = None if weight_TK is None else weight_TK.contiguous()
        plan = _combine_plan(y_PD, weight_TK, out_TD, top_k=top_k)
        tensors = (y_PD, y_PD if weight_TK is None else weight_TK, routing.row_of_pair_P, out_TD)
        plan((num_tokens, plan.blocks), tensors)
    return out_TD


@planned
def _gather_plan(x_TD: Tensor, x_PD: Tensor, *, top_k: int) -> Plan:
    dim_d = x_TD.shape[1]
    block = min(_BLOCK_D, triton.next_power_of_2(dim_d))
    options = dict(TOP_K=top_k, BLOCK_D=block)
    return Plan(_gather, (None,) * 3, (x_TD.stride(0), dim_d), options, blocks=cdiv(dim_d, block))


def gather(x_TD: Tensor, routing: Routing) -> Tensor:
    """x_PD[row] = x_TD[token of row], columns adjacent."""
    num_tokens, dim_d = x_TD.shape
    x_PD = x_TD.new_empty((routing.num_pairs, dim_d))
    if x_PD.numel():
        plan = _gather_plan(x_TD, x_PD, top_k=routing.top_k)
        plan((num_tokens, plan.blocks), (x_TD, routing.row_of_pair_P, x_PD))
    return x_PD


@planned
def _weigh_plan(rows_PR: Tensor, weight_TK: Tensor) -> Plan:
    block_r = triton.next_power_of_2(rows_PR.shape[1])
    acc, block_p = tl_accumulator(rows_PR.dtype), max(1, 2048 // block_r)
    options = dict(R=rows_PR.shape[1], ACC=acc, BLOCK_P=block_p, BLOCK_R=block_r)
    return Plan(_weigh, (None,) * 4, (), options)


def weigh(rows_PR: Tensor, weight_TK: Tensor, routing: Routing) -> Tensor:
    """See backend.Backend."""
    rows_PR, weight_TK = rows_PR.contiguous(), weight_TK.contiguous()
    out_PR = torch.empty_like(rows_PR)
    if out_PR.numel():
        plan = _weigh_plan(rows_PR, weight_TK)
        grid = (cdiv(rows_PR.shape[0], plan.constants["BLOCK_P"]),)
        plan(grid, (rows_PR, weight_TK, routing.pair_of_row_P, out_PR), rows_PR.shape[0])
    return out_PR


@planned
def _sum_plan(dweight_TK: Tensor, plus_TK: Tensor | None, *, wide: torch.dtype) -> Plan:
    return Plan(_sum_dweight, (None,) * 4, (), dict(BLOCK=256, PLUS=plus_TK is not None))


def sum_dweight(partial_NP: Tensor, plus_TK: Tensor | None, routing: Routing, like_TK: Tensor) -> Tensor:
    """dweight_TK from the partial sums per block of columns, and `plus`, in the dtype of `like_TK`."""
    dweight_TK = torch.empty_like(like_TK, memory_format=torch.contiguous_format)
    num_blocks, num_pairs = partial_NP.shape
    if num_pairs:
        plan = _sum_plan(dweight_TK, plus_TK, wide=partial_NP.dtype)
        grid = (cdiv(num_pairs, plan.constants["BLOCK"]),)
        plus = partial_NP if plus_TK is None else plus_TK
        plan(grid, (partial_NP, plus, routing.row_of_pair_P, dweight_TK), num_pairs, num_blocks)
    return dweight_TK
