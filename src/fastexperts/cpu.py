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

__all__ = [
    "block_m",
    "combine",
    "db",
    "dfactor",
    "dh",
    "down",
    "dw",
    "dx",
    "pack",
    "route",
    "shrink",
    "shrink_dfactor",
    "up",
    "weigh",
]


def block_m(device: torch.device, dtype: torch.dtype) -> int:
    return 128


def up(
    x_TD: Tensor,
    w1_EGD: Tensor,
    bias_EG: Tensor | None,
    routing: Routing,
    activation: Activation,
    keep_h: bool,
    more: Step | None = None,
) -> tuple[Tensor, Tensor]:
    h_PG = _grouped_mm(_gather(x_TD, routing), w1_EGD.mT, routing.offsets_E1)
    if more:
        h_PG = h_PG + _grouped_mm(more.rows_PR, more.w.mT, routing.offsets_E1)
    h_PG = _biased(h_PG, bias_EG, routing)
    return h_PG if keep_h else h_PG[:0].clone(), activation.forward(h_PG)


def down(
    a_PF: Tensor, w2_EDF: Tensor, bias_ED: Tensor | None, routing: Routing, more: Step | None = None
) -> Tensor:
    y_PD = _grouped_mm(a_PF, w2_EDF.mT, routing.offsets_E1)
    if more:
        y_PD = y_PD + _grouped_mm(more.rows_PR, more.w.mT, routing.offsets_E1)
    return _biased(y_PD, bias_ED, routing)


def shrink(rows: Tensor, factor_ERK: Tensor, routing: Routing, tokens: bool) -> Tensor:
    rows_PK = _gather(rows, routing) if tokens else rows
    return _grouped_mm(rows_PK, factor_ERK.mT, routing.offsets_E1)


def dx(dh_PG: Tensor, w1_EGD: Tensor, routing: Routing, more: Step | None = None) -> Tensor:
    dx_PD = _grouped_mm(dh_PG, w1_EGD, routing.offsets_E1)
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
    needs: tuple[bool, bool, bool],
    more: Step | None = None,
    plus_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulator(h_PG.dtype)
    row_of_pair_P = routing.row_of_pair_P
    v_PF = _grouped_mm(_gather(dout_TD, routing), w2_EDF, routing.offsets_E1).to(wide)
    if more:
        v_PF = v_PF + _grouped_mm(more.rows_PR, more.w, routing.offsets_E1).to(wide)
    weight_P1 = weight_TK.reshape(-1)[routing.pair_of_row_P.clamp(min=0)].to(wide)[:, None]
    a_PF, dh_PG = activation.vjp(h_PG.to(wide), weight_P1 * v_PF)
    dweight_P = (v_PF * a_PF).sum(-1)[row_of_pair_P.clamp(min=0)].where(row_of_pair_P >= 0, 0)
    if plus_TK is not None:
        dweight_P = dweight_P + plus_TK.flatten()
    need_dh, need_wa, need_dweight = needs
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


def dw(
    left: Tensor,
    right: Tensor,
    routing: Routing,
    like_EMN: Tensor,
    tokens: str = "",
) -> Tensor:
    left_PM = _gather(left, routing) if tokens == "left" else left
    right_PN = _gather(right, routing) if tokens == "right" else right
    out_EMN = torch.empty_like(like_EMN)
    return out_EMN.copy_(_grouped_mm(left_PM.t(), right_PN, routing.offsets_E1))


def dfactor(
    rows: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool, scale: float = 1.0
) -> Tensor:
    rows_PN = _gather(rows, routing) if tokens else rows
    grad_ERN = _grouped_mm(against_PR.t(), rows_PN, routing.offsets_E1).to(accumulator(rows.dtype))
    return torch.empty_like(like_ErN).copy_(scale * grad_ERN[:, : like_ErN.shape[1]])


def shrink_dfactor(
    rows: Tensor, factor_ERN: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool
) -> tuple[Tensor, Tensor]:
    return shrink(rows, factor_ERN, routing, tokens), dfactor(rows, against_PR, routing, like_ErN, tokens)


def weigh(rows_PR: Tensor, weight_TK: Tensor, routing: Routing) -> Tensor:
    weight_P = weight_TK.reshape(-1)[routing.pair_of_row_P.clamp(min=0)]
    return (rows_PR * weight_P[:, None]).to(rows_PR.dtype)


def pack(a_ErK: Tensor, b_ENr: Tensor, scale: float, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scaled_ErK, behind = a_ErK.to(accumulator(a_ErK.dtype)) * scale, rank - a_ErK.shape[1]
    a_ERK, b_ENR = nnf.pad(scaled_ErK, (0, 0, 0, behind)), nnf.pad(b_ENr, (0, behind))
    return a_ERK.to(dtype).contiguous(), b_ENR.to(dtype).contiguous()


def db(rows: Tensor, weight_TK: Tensor | None, routing: Routing, like_EN: Tensor) -> Tensor:
    wide = accumulator(rows.dtype)
    rows_PN = rows if weight_TK is None else _gather(rows, routing)
    weighted_PN = rows_PN.to(wide)
    if weight_TK is not None:
        weighted_PN = (
            weighted_PN * weight_TK.reshape(-1)[routing.pair_of_row_P.clamp(min=0)].to(wide)[:, None]
        )
    # not index_add_, whose order of sums varies on a GPU
    sums_EN = torch.segment_reduce(weighted_PN, "sum", offsets=routing.offsets_E1.long(), unsafe=True)
    return sums_EN.to(like_EN.dtype)


def _expert_of_row(routing: Routing) -> Tensor:
    """[P]; E behind the last row of an expert."""
    rows = torch.arange(len(routing.pair_of_row_P), dtype=torch.int32, device=routing.offsets_E1.device)
    return torch.searchsorted(routing.offsets_E1[1:], rows, right=True)


def _biased(rows_PN: Tensor, bias_EN: Tensor | None, routing: Routing) -> Tensor:
    if bias_EN is None:
        return rows_PN
    bias_PN = bias_EN[_expert_of_row(routing).clamp(max=len(bias_EN) - 1)]
    return (rows_PN + bias_PN).to(rows_PN.dtype)


def _gather(x_TD: Tensor, routing: Routing) -> Tensor:
    """x_PD[row] = x_TD[token of row]"""
    return x_TD[routing.pair_of_row_P.clamp(min=0) // routing.top_k]


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
