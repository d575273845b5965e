"""Factors of updates, from the layout they are stored in to the one that products read, and gradients back:
scaled, cast, padded and transposed in one pass.

Legend: E experts, X and Y the two dims of a factor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastexperts.kernels.launch import Plan, planned
from fastexperts.kernels.operands import tl_accumulator

ELEMENTS = 2048  # of a program's block


@triton.jit
def _copy_scaled(
    p_in,  # [E, X, Y]
    p_out,  # [E, X', Y']
    in_e, in_x, in_y, out_e, out_x, out_y, num_e, in_dim_x, in_dim_y, out_dim_x, out_dim_y,
    SCALE: tl.constexpr, ACC: tl.constexpr, BE: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """Grid (E, X', Y' blocks): one program writes one block, zeros where `p_in` ends before."""
    o_e = (tl.program_id(0) * BE + tl.arange(0, BE))[:, None, None].to(tl.int64)
    o_x = (tl.program_id(1) * BX + tl.arange(0, BX))[None, :, None].to(tl.int64)
    o_y = (tl.program_id(2) * BY + tl.arange(0, BY))[None, None, :].to(tl.int64)
    m_in = (o_e < num_e) & (o_x < in_dim_x) & (o_y < in_dim_y)
    value = tl.load(p_in + o_e * in_e + o_x * in_x + o_y * in_y, mask=m_in, other=0.0).to(ACC) * SCALE
    m_out = (o_e < num_e) & (o_x < out_dim_x) & (o_y < out_dim_y)
    p_block = p_out + o_e * out_e + o_x * out_x + o_y * out_y
    tl.store(p_block, value.to(p_out.dtype.element_ty), mask=m_out)


@planned
def _plan(source_EXY: Tensor, out_EXY: Tensor, *, scale: float) -> tuple[Plan, tuple[int, int, int]]:
    block = _block(source_EXY, out_EXY)
    scalars = (*source_EXY.stride(), *out_EXY.stride(), *source_EXY.shape, *out_EXY.shape[1:])
    options = dict(SCALE=scale, ACC=tl_accumulator(source_EXY.dtype), BE=block[0], BX=block[1], BY=block[2])
    grid = tuple(triton.cdiv(dim, size) for dim, size in zip(out_EXY.shape, block, strict=True))
    return Plan(_copy_scaled, (None,) * 2, scalars, options), grid


def _block(source_EXY: Tensor, out_EXY: Tensor) -> list[int]:
    """Of up to ELEMENTS, first in the dims whose neighbours are adjacent, in one tensor or the other."""
    adjacent = {min(range(3), key=tensor.stride) for tensor in (source_EXY, out_EXY)}
    block, left = [1, 1, 1], ELEMENTS
    for dim in sorted(range(2, -1, -1), key=lambda dim: dim not in adjacent):
        most = min(left, 32) if dim in adjacent and len(adjacent) == 2 else left
        block[dim] = min(most, triton.next_power_of_2(out_EXY.shape[dim]))
        left //= block[dim]
    return block


def copy_scaled(source_EXY: Tensor, out_EXY: Tensor, scale: float = 1.0) -> Tensor:
    """See backend.Backend."""
    if out_EXY.numel():
        plan, grid = _plan(source_EXY, out_EXY, scale=scale)
        plan(grid, (source_EXY, out_EXY))
    return out_EXY
