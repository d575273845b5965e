"""Sums of an expert's rows: db[e] = sum over rows of e of (weight *) rows, the gradient of an expert's bias.

Legend: see moe.py; N columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import packed, tl_accumulator
from fastexperts.routing import Routing


@triton.jit
def _sum_rows(
    p_rows,  # [P, N], or tokens [T, N] with WEIGHTED
    p_weight,  # [P] by pair
    p_out,  # [E, N]
    p_pair_of_row,  # [P]
    p_offsets,  # [E + 1]
    stride,
    N,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (E, N blocks): one program adds BLOCK_N columns of all rows of one expert, BLOCK_R rows a step."""
    i_e = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(p_offsets + i_e + 1)
    total = tl.zeros([BLOCK_R, BLOCK_N], ACC)
    for row0 in range(tl.load(p_offsets + i_e), end, BLOCK_R):
        row = row0 + tl.arange(0, BLOCK_R)
        m_r = row < end
        source = row
        if WEIGHTED:
            pair = tl.load(p_pair_of_row + row, mask=m_r, other=0)
            source = pair // TOP_K
        p_block = p_rows + source[:, None].to(tl.int64) * stride + o_n[None, :]
        value = tl.load(p_block, mask=m_r[:, None] & (o_n < N)[None, :], other=0.0).to(ACC)
        if WEIGHTED:
            value *= tl.load(p_weight + pair, mask=m_r, other=0.0).to(ACC)[:, None]
        total += value
    p_sum = p_out + i_e.to(tl.int64) * N + o_n
    tl.store(p_sum, tl.sum(total, 0).to(p_out.dtype.element_ty), mask=o_n < N)


@planned
def _plan(rows: Tensor, weight_TK: Tensor | None, out_EN: Tensor, *, top_k: int) -> Plan:
    dim_n = out_EN.shape[1]
    block_n = min(128, triton.next_power_of_2(dim_n))
    options = dict(
        TOP_K=top_k,
        WEIGHTED=weight_TK is not None,
        ACC=tl_accumulator(rows.dtype),
        BLOCK_R=32,
        BLOCK_N=block_n,
    )
    scalars = (rows.stride(0), dim_n)
    return Plan(_sum_rows, (None,) * 5, scalars, options, blocks=cdiv(dim_n, block_n))


def db(rows: Tensor, weight_TK: Tensor | None, routing: Routing, like_EN: Tensor) -> Tensor:
    """See backend.Backend."""
    out_EN = torch.empty_like(like_EN, memory_format=torch.contiguous_format)
    if out_EN.numel() == 0 or routing.num_pairs == 0:
        return out_EN.zero_()
    rows = packed(rows)
    weight_TK = None if weight_TK is None else weight_TK.contiguous()
    plan = _plan(rows, weight_TK, out_EN, top_k=routing.top_k)
    weight = rows if weight_TK is None else weight_TK
    plan((out_EN.shape[0], plan.blocks), (rows, weight, out_EN, routing.pair_of_row_P, routing.offsets_E1))
    return out_EN
