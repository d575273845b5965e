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
from fastexperts.kernels.launch import Plan, planned
from fastexperts.kernels.operands import accumulator, operand, packed, precision, processors
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
def _store_descriptor(acc, out, i_e, part, m0, n0, SUBTILES: tl.constexpr):
    """One block through the descriptor `out`, in SUBTILES column slices; what lies outside is dropped."""
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if SUBTILES > 1:
        left, right = halves(acc)
        _store_descriptor(left, out, i_e, part, m0, n0, SUBTILES // 2)
        _store_descriptor(right, out, i_e, part, m0, n0 + BN // 2, SUBTILES // 2)
    else:
        out.store([i_e, part, m0, n0], acc.to(out.dtype).reshape(1, 1, BM, BN))


@triton.jit
def _grouped_dw(
    A,  # descriptor or pointer: [P, C * M]
    B,  # descriptor or pointer: [P, N]
    out,  # descriptor or pointer: (E, C, M, N)
    p_offsets,  # [E + 1]
    stride_a, stride_b, stride_oe, stride_oc, stride_om, stride_on, num_experts, parts, M, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    SUBTILES: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, OUT_TMA: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs,), persistent: each program owns every programs-th block [BM, BN] of one part of one
    expert.

    The last, partial step of an expert is peeled: masking every step costs a tenth of the speed (H100).
    """
    num_m = tl.cdiv(M, BM)
    num_n = tl.cdiv(N, BN)
    per_expert = parts * num_m * num_n
    for i_tile in tl.range(tl.program_id(0), num_experts * per_expert, tl.num_programs(0)):
        i_e = i_tile // per_expert
        i_cm, i_n = tl.swizzle2d(i_tile % per_expert // num_n, i_tile % num_n, parts * num_m, num_n, GROUP)
        part = i_cm // num_m
        m0 = i_cm % num_m * BM
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
            a = _load_rows(A, row0, end, part * M + m0, c_m, M - m0, stride_a, BK, A_TMA, False, EVEN_M)
            b = _load_rows(B, row0, end, n0, c_n, N - n0, stride_b, BK, B_TMA, False, EVEN_N)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if full_end < end:
            a = _load_rows(A, full_end, end, part * M + m0, c_m, M - m0, stride_a, BK, A_TMA, True, EVEN_M)
            b = _load_rows(B, full_end, end, n0, c_n, N - n0, stride_b, BK, B_TMA, True, EVEN_N)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=ACC)

        if OUT_TMA:
            _store_descriptor(acc, out, i_e, part, m0, n0, SUBTILES)
        else:
            p_block = out + i_e.to(tl.int64) * stride_oe + part * stride_oc
            p_block += o_m[:, None].to(tl.int64) * stride_om + o_n[None, :] * stride_on
            m_block = (o_m < M)[:, None] & (o_n < N)[None, :]
            tl.store(p_block, acc.to(out.dtype.element_ty), mask=m_block)


@planned
def _plan(rows_M: Tensor, rows_N: Tensor, out_ECMN: Tensor) -> Plan:
    """Both operands hold rows."""
    num_experts, parts, dim_m, dim_n = out_ECMN.shape
    tile = narrowed(tiles.tile(rows_M.device, rows_M.dtype, "dw"), m=dim_m, n=dim_n)
    a_view = operand(rows_M, [tile.k, tile.m], parts)
    b_view = operand(rows_N, [tile.k, tile.n])
    # the store goes through shared memory: fp32 gradients of bf16 operands in as many more slices
    subtiles = tile.subtiles * max(1, out_ECMN.element_size() // rows_M.element_size())
    out_view = operand(out_ECMN, [1, 1, tile.m, tile.n // subtiles])
    return Plan(
        _grouped_dw,
        (a_view, b_view, out_view, None),
        (rows_M.stride(0), rows_N.stride(0), *out_ECMN.stride(), num_experts, parts, dim_m, dim_n),
        dict(
            BM=tile.m, BN=tile.n, BK=tile.k, GROUP=tile.group, SUBTILES=subtiles,
            A_TMA=a_view is not None, B_TMA=b_view is not None, OUT_TMA=out_view is not None,
            EVEN_M=dim_m % tile.m == 0, EVEN_N=dim_n % tile.n == 0,
            ACC=accumulator(rows_M.dtype), PRECISION=precision(rows_M.dtype),
        ),
        blocks=num_experts * parts * triton.cdiv(dim_m, tile.m) * triton.cdiv(dim_n, tile.n),
        most_programs=processors(rows_M.device) * tile.programs_per_sm,
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


@planned
def _gathering_plan(
    rows_M: Tensor, rows_N: Tensor, out_ECMN: Tensor, *, top_k: int, gather_m: bool
) -> Plan | None:
    """One operand holds tokens; None where no kernel takes that."""
    if hopper_dw.serves(rows_M, rows_N, out_ECMN, gather_m=gather_m):
        return hopper_dw.plan(rows_M, rows_N, out_ECMN, top_k, gather_m=gather_m)
    return None


def _dw(rows_M: Tensor, rows_N: Tensor, routing: Routing, like_ECMN: Tensor, gather_m: bool) -> Tensor:
    """out[e, c, m, n] = sum over rows of e of rows_M[row, c*M + m] * rows_N[row, n], with the dtype and
    strides of `like`.

    rows_M (with `gather_m`) or rows_N (without) holds tokens.
    """
    out_ECMN = torch.empty_like(like_ECMN)
    if out_ECMN.numel() == 0 or len(routing.pair_of_row_P) == 0:
        return out_ECMN.zero_()
    rows_M, rows_N = packed(rows_M), packed(rows_N)
    plan = _gathering_plan(rows_M, rows_N, out_ECMN, top_k=routing.top_k, gather_m=gather_m)
    if plan:
        maps = (routing.pair_of_row_P, routing.offsets_E1)
        plan((plan.programs(),), (rows_M, rows_N, out_ECMN, *maps))
        return out_ECMN
    # a gather along the contraction costs these kernels more than a gather before it (docs/log.md)
    if gather_m:
        rows_M = gather(rows_M, routing)
    else:
        rows_N = gather(rows_N, routing)
    return _rows_dw(rows_M, rows_N, routing, out_ECMN)


def _rows_dw(rows_M: Tensor, rows_N: Tensor, routing: Routing, out_ECMN: Tensor) -> Tensor:
    """`_dw` into `out`, both operands rows."""
    plan = _plan(rows_M, rows_N, out_ECMN)
    plan((plan.programs(),), (rows_M, rows_N, out_ECMN, routing.offsets_E1))
    return out_ECMN


def dw(rows_PM: Tensor, rows_PN: Tensor, routing: Routing, like_EMN: Tensor) -> Tensor:
    """See backend.Backend."""
    out_EMN = torch.empty_like(like_EMN)
    if out_EMN.numel() == 0 or len(rows_PM) == 0:
        return out_EMN.zero_()
    _rows_dw(packed(rows_PM), packed(rows_PN), routing, out_EMN[:, None])
    return out_EMN


def dw1(dh_PG: Tensor, x_TD: Tensor, routing: Routing, w1_ECFD: Tensor) -> Tensor:
    """See backend.Backend."""
    return _dw(dh_PG, x_TD, routing, w1_ECFD, gather_m=False)


def dw2(dout_TD: Tensor, wa_PF: Tensor, routing: Routing, w2_EDF: Tensor) -> Tensor:
    """See backend.Backend."""
    return _dw(dout_TD, wa_PF, routing, w2_EDF[:, None], gather_m=True).squeeze(1)
