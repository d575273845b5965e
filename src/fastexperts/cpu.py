"""The primitives of backend.Backend over PyTorch's own grouped GEMM: what runs where Triton does not.

Legend: see backend.py. Host offsets are read once per call, which costs nothing on a CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastexperts.activations import Activation
from fastexperts.dtypes import accumulator
from fastexperts.routing import Routing
from fastexperts.routing import route_torch as route
from fastexperts.weights import Step

__all__ = ["block_m", "combine", "dh", "down", "dw", "dw1", "dw2", "dx", "route", "shrink", "up"]


def block_m(device: torch.device, dtype: torch.dtype) -> int:
    return 128


def up(
    x_TD: Tensor,
    w1_ECFD: Tensor,
    routing: Routing,
    activation: Activation,
    keep_h: bool,
    more: Step | None = None,
) -> tuple[Tensor, Tensor]:
    x_PD = _gather(x_TD, routing)
    h_PG = torch.cat(
        [_grouped_mm(x_PD, w.transpose(1, 2), routing.offsets_E1) for w in w1_ECFD.unbind(1)], dim=1
    )
    if more:
        h_PG = h_PG + _grouped_mm(more.rows_PR, more.w.flatten(1, 2).transpose(1, 2), routing.offsets_E1)
    return h_PG if keep_h else h_PG[:0].clone(), activation.forward(h_PG)


def down(a_PF: Tensor, w2_EDF: Tensor, routing: Routing, more: Step | None = None) -> Tensor:
    y_PD = _grouped_mm(a_PF, w2_EDF.transpose(1, 2), routing.offsets_E1)
    if more:
        y_PD = y_PD + _grouped_mm(more.rows_PR, more.w.transpose(1, 2), routing.offsets_E1)
    return y_PD


def shrink(rows: Tensor, factor_ERK: Tensor, routing: Routing, tokens: bool) -> Tensor:
    rows_PK = _gather(rows, routing) if tokens else rows
    return _grouped_mm(rows_PK, factor_ERK.transpose(1, 2), routing.offsets_E1)


def dx(dh_PG: Tensor, w1_ECFD: Tensor, routing: Routing, more: Step | None = None) -> Tensor:
    parts = zip(dh_PG.chunk(w1_ECFD.shape[1], dim=1), w1_ECFD.unbind(1), strict=True)
    first, *rest = (_grouped_mm(dh_PF, w_EFD, routing.offsets_E1) for dh_PF, w_EFD in parts)
    dx_PD = first + rest[0] if rest else first
    if more:
        dx_PD = dx_PD + _grouped_mm(more.rows_PR, more.w, routing.offsets_E1)
    return dx_PD


def dh(
    dout_TD: Tensor,
    w2_EDF: Tensor,
    h_PG: Tensor,
    weight_TK: Tensor,
    routing: Routing,
    activation: Activation,
    need_dh: bool,
    need_wa: bool,
    need_dweight: bool,
    more: Step | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(h_PG.dtype)
    row_of_pair_P = routing.row_of_pair_P
    v_PF = _grouped_mm(_gather(dout_TD, routing), w2_EDF, routing.offsets_E1).to(wide)
    if more:
        v_PF = v_PF + _grouped_mm(more.rows_PR, more.w, routing.offsets_E1).to(wide)
    weight_P1 = weight_TK.reshape(-1)[routing.pair_of_row_P.clamp(min=0)].to(wide)[:, None]
    a_PF, dh_PG = activation.vjp(h_PG.to(wide), weight_P1 * v_PF)
    dweight_P = (v_PF * a_PF).sum(-1)[row_of_pair_P.clamp(min=0)].where(row_of_pair_P >= 0, 0)
    return (
        _if(need_dh, dh_PG, h_PG.dtype),
        _if(need_wa, weight_P1 * a_PF, h_PG.dtype),
        _if(need_dweight, dweight_P.reshape(weight_TK.shape), weight_TK.dtype),
    )


def combine(y_PD: Tensor, weight_TK: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
    wide = accumulator(y_PD.dtype)
    row_of_pair_TK = routing.row_of_pair_P.view(-1, routing.top_k)
    out_TD = y_PD.new_zeros((len(row_of_pair_TK), y_PD.shape[1]), dtype=wide)
    for k, row_T in enumerate(row_of_pair_TK.unbind(1)):
        y_TD = y_PD[row_T.clamp(min=0)].to(wide)
        if weight_TK is not None:
            y_TD = y_TD * weight_TK[:, k, None].to(wide)
        out_TD += y_TD.where(row_T[:, None] >= 0, 0)
    return out_TD.to(dtype)


def dw(rows_PM: Tensor, rows_PN: Tensor, routing: Routing, like_EMN: Tensor) -> Tensor:
    return _dw(rows_PM, rows_PN, routing, like_EMN[:, None]).squeeze(1)


def dw1(dh_PG: Tensor, x_TD: Tensor, routing: Routing, w1_ECFD: Tensor) -> Tensor:
    return _dw(dh_PG, _gather(x_TD, routing), routing, w1_ECFD)


def dw2(dout_TD: Tensor, wa_PF: Tensor, routing: Routing, w2_EDF: Tensor) -> Tensor:
    return _dw(_gather(dout_TD, routing), wa_PF, routing, w2_EDF[:, None]).squeeze(1)


def _gather(x_TD: Tensor, routing: Routing) -> Tensor:
    """x_PD[row] = x_TD[token of row]"""
    return x_TD[routing.pair_of_row_P.clamp(min=0) // routing.top_k]


def _dw(rows_M: Tensor, rows_N: Tensor, routing: Routing, like_ECMN: Tensor) -> Tensor:
    out_ECMN = torch.empty_like(like_ECMN)
    parts = zip(rows_M.chunk(like_ECMN.shape[1], dim=1), out_ECMN.unbind(1), strict=True)
    for part_PM, out_EMN in parts:
        out_EMN.copy_(_grouped_mm(part_PM.t(), rows_N, routing.offsets_E1))
    return out_ECMN


def _grouped_mm(a: Tensor, b: Tensor, offsets_E1: Tensor) -> Tensor:
    """[P, K] x [E, K, N] -> [P, N] by rows of an expert, or [M, P] x [P, N] -> [E, M, N] over them.

    PyTorch's grouped GEMM has no fp64 and wants strides in multiples of 16 bytes: a loop over experts
    elsewhere.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype != torch.float64 and a.numel() and b.numel() and _aligned(a) and _aligned(b):
            return nnf.grouped_mm(a, b, offs=offsets_E1[1:])
        ragged_rows = b.dim() == 3
        shape = (a.shape[0], b.shape[2]) if ragged_rows else (offsets_E1.shape[0] - 1, a.shape[0], b.shape[1])
        out = a.new_zeros(shape)
        bounds = offsets_E1.tolist()
        for e, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                continue
            if ragged_rows:
                out[start:end] = a[start:end] @ b[e]
            else:
                out[e] = a[:, start:end] @ b[start:end]
        return out


def _if(needed: bool, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, or no rows of it: cloned, since a view would keep all of them alive."""
    return tensor.to(dtype) if needed else tensor[:0].to(dtype).clone()


def _aligned(matrix: Tensor) -> bool:
    rows, columns = matrix.stride()[-2:]
    major = rows if columns == 1 else columns
    batch_ok = matrix.dim() == 2 or matrix.stride(0) * matrix.element_size() % 16 == 0
    return (
        1 in (rows, columns)
        and major * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and batch_ok
    )
