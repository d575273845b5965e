"""The ragged-contraction GEMM: dw[e] = A[rows of e]^T @ B[rows of e], the gradient of an expert's weight.

Legend: see moe.py; M, N dims of one part of the weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels import hopper_dw, tiles
from fastexperts.kernels.combine import gather
from fastexperts.kernels.epilogues import halves
from fastexperts.kernels.launch import Plan, cdiv, planned
from fastexperts.kernels.operands import operand, packed, precision, processors, tl_accumulator
from fastexperts.kernels.tiles import narrowed
from fastexperts.routing import Routing


@triton.jit
def _load_rows(
    X, row0, end, col0, o_col, num_col, stride,
    BK: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Block [BK, columns] of X from row0 and column col0 + o_col; MASK zeroes the rows behind `end`, which
    belong to another expert. EVEN: no column lies behind num_col.
    """
    o_r = row0 + tl.arange(0, BK)
    if TMA:
        x = X.load([row0, col0])
        if MASK:
            x = tl.where(o_r[:, None] < end, x, tl.zeros_like(x))
        return x
    else:
        p_x = X + o_r[:, None].to(tl.int64) * stride + (col0 + o_col)[None, :]
        if MASK:
            return tl.load(p_x, mask=(o_r < end)[:, None] & (o_col < num_col)[None, :], other=0.0)
        elif EVEN:
            return tl.load(p_x)
        else:
            return tl.load(p_x, mask=(o_col < num_col)[None, :], other=0.0)


@triton.jit
def _store_descriptor(acc, out, i_e, m0, n0, SUBTILES: tl.constexpr):
    """One block through the descriptor `out`, in SUBTILES column slices; what lies outside is dropped."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if SUBTILES > 1:
        left, right = halves(acc)
        _store_descriptor(left, out, i_e, m0, n0, SUBTILES // 2)
        _store_descriptor(right, out, i_e, m0, n0 + BN // 2, SUBTILES // 2)
    else:
        out.store([i_e, m0, n0], acc.to(out.dtype).reshape(1, BM, BN))


@triton.jit
def _grouped_dw(
    A,  # descriptor or pointer: [P, M]
    B,  # descriptor or pointer: [P, N]
    out,  # descriptor or pointer: (E, M, N)
    p_offsets,  # [E + 1]
    stride_a, stride_b, stride_oe, stride_om, stride_on, num_experts, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILES: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, OUT_TMA: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), persistent: each program owns every programs-th block [BM, BN] of one expert.

    The last, partial step of an expert is peeled: masking every step costs a tenth of the speed (H100).
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    per_expert = num_m * num_n
    for i_tile in tl.range(tl.program_id(0), num_experts * per_expert, tl.num_programs(0)):
        i_e = i_tile // per_expert
        i_m, i_n = tl.swizzle2d(i_tile % per_expert // num_n, i_tile % num_n, num_m, num_n, GROUP)
        m0 = i_m * BM
        n0 = i_n * BN
        o_m = m0 + tl.arange(0, BM)
        o_n = n0 + tl.arange(0, BN)
        c_m = tl.arange(0, BM)
        c_n = tl.arange(0, BN)
        start = tl.load(p_offsets + i_e)
        end = tl.load(p_offsets + i_e + 1)
        full_end = start + (end - start) // BK * BK

        acc = tl.zeros([BM, BN], ACC)
        for row0 in range(start, full_end, BK):
            a = _load_rows(A, row0, end, m0, c_m, M - m0, stride_a, BK, A_TMA, False, EVEN_M)
            b = _load_rows(B, row0, end, n0, c_n, N - n0, stride_b, BK, B_TMA, False, EVEN_N)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if full_end < end:
            a = _load_rows(A, full_end, end, m0, c_m, M - m0, stride_a, BK, A_TMA, True, EVEN_M)
            b = _load_rows(B, full_end, end, n0, c_n, N - n0, stride_b, BK, B_TMA, True, EVEN_N)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=ACC)

        if OUT_TMA:
            _store_descriptor(acc, out, i_e, m0, n0, SUBTILES)
        else:
            p_block = out + i_e.to(tl.int64) * stride_oe
            p_block += o_m[:, None].to(tl.int64) * stride_om + o_n[None, :] * stride_on
            m_block = (o_m < M)[:, None] & (o_n < N)[None, :]
            tl.store(p_block, acc.to(out.dtype.element_ty), mask=m_block)


@planned
def _plan(left_PM: Tensor, right_PN: Tensor, out_EMN: Tensor) -> Plan:
    """Both operands hold rows."""
    num_experts, dim_m, dim_n = out_EMN.shape
    tile = narrowed(tiles.tile(left_PM.device, left_PM.dtype, "dw"), m=dim_m, n=dim_n)
    a_view, b_view = operand(left_PM, [tile.k, tile.m]), operand(right_PN, [tile.k, tile.n])
    # the store goes through shared memory: fp32 gradients of bf16 operands in as many more slices
    subtiles = tile.subtiles * max(1, out_EMN.element_size() // left_PM.element_size())
    out_view = operand(out_EMN, [1, tile.m, tile.n // subtiles])
    return Plan(
        _grouped_dw,
        (a_view, b_view, out_view, None),
        (left_PM.stride(0), right_PN.stride(0), *out_EMN.stride(), num_experts, dim_m, dim_n),
        dict(
            BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tile.group, SUBTILES=subtiles,
            A_TMA=a_view is not None, B_TMA=b_view is not None, OUT_TMA=out_view is not None,
            EVEN_M=dim_m % tile.m == 0, EVEN_N=dim_n % tile.n == 0,
            ACC=tl_accumulator(left_PM.dtype), PRECISION=precision(left_PM.dtype),
        ),
        blocks=num_experts * cdiv(dim_m, tile.m) * cdiv(dim_n, tile.n),
        most_programs=processors(left_PM.device) * tile.programs_per_sm,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


@planned
def _gathering_plan(
    left: Tensor, right: Tensor, out_EMN: Tensor, *, top_k: int, gather_left: bool
) -> Plan | None:
    """One operand holds tokens; None where no kernel takes that."""
    if hopper_dw.serves(left, right, out_EMN, gather_m=gather_left):
        return hopper_dw.plan(left, right, out_EMN, top_k, gather_m=gather_left)
    return None


def dw(
    left: Tensor,
    right: Tensor,
    routing: Routing,
    like_EMN: Tensor,
    tokens: str = "",
) -> Tensor:
    """See backend.Backend."""
    if like_EMN.stride(2) != 1 and like_EMN.stride(1) == 1:
        # stored [E, N, M]: the transposed product writes it along its rows
        other = {"left": "right", "right": "left", "": ""}[tokens]
        return dw(right, left, routing, like_EMN.mT, other).mT
    out_EMN = torch.empty_like(like_EMN)
    if out_EMN.numel() == 0 or routing.num_pairs == 0:
        return out_EMN.zero_()
    left, right = packed(left), packed(right)
    if tokens:
        gather_left = tokens == "left"
        plan = _gathering_plan(left, right, out_EMN, top_k=routing.top_k, gather_left=gather_left)
        if plan:
            maps = (routing.pair_of_row_P, routing.offsets_E1, routing.schedule_S3)
            plan((plan.programs(),), (left, right, out_EMN, *maps))
            return out_EMN
        # a gather along the contraction costs these kernels more than a gather before it (docs/log.md)
        left, right = (gather(left, routing), right) if gather_left else (left, gather(right, routing))
    plan = _plan(left, right, out_EMN)
    plan((plan.programs(),), (left, right, out_EMN, routing.offsets_E1))
    return out_EMN
