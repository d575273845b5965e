"""Rows to tokens and back: `combine` (weighted sum over k), `gather` (a row's token), and the sums of
dweight.

Legend: T tokens, K top-k, P = T*K rows, D model dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.operands import accumulator

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


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _sum_dweight(
    p_partial,  # [NB, P] by row
    p_row_of_pair,  # [P]
    p_out,  # [P] by pair
    num_pairs,
    num_blocks,
    BLOCK: tl.constexpr,
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
    tl.store(p_out + o_p, total.to(p_out.dtype.element_ty), mask=m_p)


def combine(
    y_PD: Tensor, weight_TK: Tensor | None, row_of_pair_P: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    """Launch `_combine`; see ops.combine."""
    num_tokens, dim_d = row_of_pair_P.shape[0] // top_k, y_PD.shape[1]
    out_TD = y_PD.new_empty((num_tokens, dim_d), dtype=dtype)
    if out_TD.numel():
        block = min(_BLOCK_D, triton.next_power_of_2(dim_d))
        _combine[(num_tokens, triton.cdiv(dim_d, block))](
            y_PD, y_PD if weight_TK is None else weight_TK.contiguous(), row_of_pair_P, out_TD, dim_d,
            TOP_K=top_k, WEIGHTED=weight_TK is not None, ACC=accumulator(y_PD.dtype), BLOCK_D=block,
        )  # fmt: skip
    return out_TD


def gather(x_TD: Tensor, row_of_pair_P: Tensor, top_k: int) -> Tensor:
    """x_PD[row] = x_TD[token of row], columns adjacent."""
    num_tokens, dim_d = x_TD.shape
    x_PD = x_TD.new_empty((row_of_pair_P.shape[0], dim_d))
    if x_PD.numel():
        block = min(_BLOCK_D, triton.next_power_of_2(dim_d))
        _gather[(num_tokens, triton.cdiv(dim_d, block))](
            x_TD, row_of_pair_P, x_PD, x_TD.stride(0), dim_d, TOP_K=top_k, BLOCK_D=block
        )
    return x_PD


def sum_dweight(partial_NP: Tensor, row_of_pair_P: Tensor, like_TK: Tensor) -> Tensor:
    """dweight_TK from the partial sums per block of columns, in the dtype of `like_TK`."""
    dweight_TK = torch.empty_like(like_TK, memory_format=torch.contiguous_format)
    num_pairs = row_of_pair_P.shape[0]
    if num_pairs:
        _sum_dweight[(triton.cdiv(num_pairs, 256),)](
            partial_NP, row_of_pair_P, dweight_TK, num_pairs, partial_NP.shape[0], BLOCK=256
        )
    return dweight_TK
