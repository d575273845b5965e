"""The mixture-of-experts layer: the dataflow forward, and its mirror backward. ops.py makes it one operation
of PyTorch.

    route -> gather -> w1 -> activation -> w2 -> combine

Legend, used in every file: T tokens, K top-k, P = T*K token-expert pairs (rows, sorted by expert), E experts,
D model (hidden) dim, F expert intermediate dim, G columns of h (2F gate and up, F non-gated), R LoRA rank.
x tokens, h pre-activations, a = act(h), y = W2 a, v = W2^T dout, wa = weight * a. With a low-rank update of a
projection, W + B A: xa = x A1^T and ya = a A2^T, its rows [P, R], and wya = weight * ya.
Tensors carry their dims as a suffix; index maps read value_of_index; a gradient is d + the name of its
primal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastexperts import backend
from fastexperts.activations import Activation
from fastexperts.dtypes import accumulator
from fastexperts.routing import Routing
from fastexperts.updates import Update
from fastexperts.weights import Step


@dataclass(frozen=True)
class Layer:
    """What a layer computes with beside its tokens: weights as stored, updates, routing.

    dtype: of products.
    """

    weight_TK: Tensor
    w1_EGD: Tensor
    w2_EDF: Tensor
    bias1_EG: Tensor | None
    bias2_ED: Tensor | None
    update1: Update | None
    update2: Update | None
    routing: Routing
    activation: Activation
    dtype: torch.dtype


def forward(
    x_TD: Tensor, layer: Layer, keep_h: bool, unread: bool = False, kept_rows: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, xa_PR, ya_PR). Products run in `dtype`; the casts live as long as the call.

    unread: the backward alone comes after, so `out` is NaN, without w2 and combine. kept_rows: the xa and ya
    of an earlier call with the same arguments.
    An update W + B A is one more step of the product with W: x W^T + (x A^T) B^T, with xa = x A^T kept.
    """
    ops, routing, dtype = backend.load(x_TD.device), layer.routing, layer.dtype
    step1 = step2 = None
    x = x_TD.to(dtype)
    xa_PR, ya_PR = kept_rows or (x.new_empty(0), x.new_empty(0))
    if layer.update1:
        if not kept_rows:
            xa_PR = ops.shrink(x, layer.update1.a, routing, tokens=True)
        step1 = Step(xa_PR, layer.update1.b)
    w1, bias1 = layer.w1_EGD.to(dtype), layer.bias1_EG
    h_PG, a_PF = ops.up(x, w1, bias1, routing, layer.activation, keep_h, step1)
    if layer.update2 and not kept_rows:
        ya_PR = ops.shrink(a_PF, layer.update2.a, routing, tokens=False)
    if unread:
        return torch.full_like(x_TD, math.nan), h_PG, xa_PR, ya_PR
    if layer.update2:
        step2 = Step(ya_PR, layer.update2.b)
    y_PD = ops.down(a_PF, layer.w2_EDF.to(dtype), layer.bias2_ED, routing, step2)
    out_TD = ops.combine(y_PD, layer.weight_TK, routing, x_TD.dtype)
    return out_TD, h_PG, xa_PR, ya_PR


def backward(
    dout_TD: Tensor, x_TD: Tensor, layer: Layer, kept: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dw1, dw2, dbias1, dbias2, da1, db1, da2, db2), each only if `needs` it, from x and what
    `forward` kept alone: a is recomputed, and y is not needed, since dweight = <dout, y>
    = <dout, W2 a + bias2> = <v, a> + <dout, bias2>.
    """
    ops, routing, dtype = backend.load(x_TD.device), layer.routing, layer.dtype
    h_PG, xa_PR, ya_PR = kept
    need_dx, need_dweight, need_dw1, need_dw2, need_dbias1, need_dbias2, *need_factors = needs
    need_da1, need_db1, need_da2, need_db2 = need_factors
    dx_TD = dweight_TK = dw1_EGD = dw2_EDF = dbias1 = dbias2 = da1 = db1 = da2 = db2 = None
    step1 = step2 = plus_TK = None

    x, dout = x_TD.to(dtype), dout_TD.to(dtype)
    need_dh = need_dx or need_dw1 or need_dbias1 or need_da1 or need_db1
    need_wa = need_dw2 or need_da2
    dh_PG = wa_PF = x.new_empty(0)
    if layer.update2 and (need_dh or need_wa or need_dweight or need_db2):
        # v = W2^T dout + A2^T (B2^T dout), and dB2 = dout^T wya
        wya_PR = ops.weigh(ya_PR, layer.weight_TK, routing) if need_db2 else None
        rows_PR, db2 = through_b(dout, layer.update2, wya_PR, routing, tokens=True)
        step2 = Step(rows_PR, layer.update2.a)
    if need_dh or need_wa or need_dweight:
        if layer.bias2_ED is not None and need_dweight:
            plus_TK = inner_products(dout, layer.bias2_ED, routing)
        dh_PG, wa_PF, dweight_TK = ops.dh(
            dout, layer.w2_EDF.to(dtype), h_PG, layer.weight_TK, routing, layer.activation,
            needs=(need_dh, need_wa, need_dweight), more=step2, plus_TK=plus_TK,
        )  # fmt: skip
    if need_dw2:
        dw2_EDF = ops.dw(dout, wa_PF, routing, layer.w2_EDF, tokens="left")
    if layer.bias2_ED is not None and need_dbias2:
        dbias2 = ops.db(dout, layer.weight_TK, routing, layer.bias2_ED)
    if step2 and layer.update2 and need_da2:
        da2 = gradient_of_a(wa_PF, step2.rows_PR, layer.update2, routing, tokens=False)
    del wa_PF
    if layer.update1 and (need_dx or need_da1 or need_db1):
        rows_PR, db1 = through_b(dh_PG, layer.update1, xa_PR if need_db1 else None, routing, tokens=False)
        step1 = Step(rows_PR, layer.update1.a)
    if need_dx:
        dx_PD = ops.dx(dh_PG, layer.w1_EGD.to(dtype), routing, step1)
        dx_TD = ops.combine(dx_PD, None, routing, x_TD.dtype)
        del dx_PD
    if need_dw1:
        dw1_EGD = ops.dw(dh_PG, x, routing, layer.w1_EGD, tokens="right")
    if layer.bias1_EG is not None and need_dbias1:
        dbias1 = ops.db(dh_PG, None, routing, layer.bias1_EG)
    if step1 and layer.update1 and need_da1:
        da1 = gradient_of_a(x, step1.rows_PR, layer.update1, routing, tokens=True)
    dweight = dweight_TK if need_dweight else None
    return dx_TD, dweight, dw1_EGD, dw2_EDF, dbias1, dbias2, da1, db1, da2, db2


def through_b(
    rows: Tensor, update: Update, against_PR: Tensor | None, routing: Routing, tokens: bool
) -> tuple[Tensor, Tensor | None]:
    """Backward through an update's B, from the gradient of its output, `rows`: (the gradient of its input,
    rows B; dB = rows^T against, where `against` is that input, or None without).
    """
    ops, b_ERN, like_ErN = backend.load(rows.device), update.b.mT, update.stored.b.mT
    if against_PR is None:
        return ops.shrink(rows, b_ERN, routing, tokens), None
    rows_PR, db_ErN = ops.shrink_dfactor(rows, b_ERN, against_PR, routing, like_ErN, tokens=tokens)
    return rows_PR, db_ErN.mT


def gradient_of_a(
    rows: Tensor, through_b_PR: Tensor, update: Update, routing: Routing, tokens: bool
) -> Tensor:
    """dA = scale * through_b^T rows, of the update's input `rows` and the gradient that came through B."""
    a, scale = update.stored.a, update.stored.scale
    return backend.load(rows.device).dfactor(rows, through_b_PR, routing, a, tokens, scale)


def inner_products(dout_TD: Tensor, bias_ED: Tensor, routing: Routing) -> Tensor:
    """<dout, bias of the pair's expert> [T, K], in the dtype of sums; 0 for a pair without an expert.

    One dense product over all experts: a few per cent of the FLOPs of w2 (E against K * F columns).
    """
    wide = accumulator(dout_TD.dtype)
    bias_DE = bias_ED.to(dout_TD.dtype).mT
    with torch.autocast(dout_TD.device.type, enabled=False):
        if dout_TD.is_cuda and dout_TD.dtype.itemsize == 2:
            dot_TE = torch.mm(dout_TD, bias_DE, out_dtype=wide)
        else:
            dot_TE = dout_TD.to(wide) @ bias_DE.to(wide)
    row_TK = routing.row_of_pair_P.view(-1, routing.top_k)
    expert_TK = torch.searchsorted(routing.offsets_E1[1:], row_TK, right=True)
    return dot_TE.gather(1, expert_TK.clamp(max=len(bias_ED) - 1)).where(row_TK >= 0, 0)
