"""The mixture-of-experts layer: the dataflow forward, its mirror backward, and the one autograd formula.

Legend, used in every file: T tokens, K top-k, P = T*K token-expert pairs (rows, sorted by expert), E experts,
D model (hidden) dim, F expert intermediate dim, C parts of h (gate and up: 2, non-gated: 1), G = C*F.
x tokens, h pre-activations, a = act(h), y = W2 a, v = W2^T dout, wa = weight * a.
Tensors carry their dims as a suffix; index maps read value_of_index; a gradient is d + the name of its
primal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastexperts import ops
from fastexperts.activations import SWIGLU, Activation, resolve
from fastexperts.checks import check_moe_mlp
from fastexperts.routing import Routing
from fastexperts.weights import Weight, as_weight


def forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    routing: Routing,
    activation: Activation,
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """(out_TD, h_PG). Products run in `dtype`; the casts live as long as the call."""
    h_PG, a_PF = ops.up(
        x_TD.to(dtype), w1_ECFD.to(dtype), routing.pair_of_row_P, routing.offsets_E1, routing.schedule_S3,
        routing.top_k, activation.fn, activation.params, keep_h,
    )  # fmt: skip
    y_PD = ops.down(a_PF, w2_EDF.to(dtype), routing.offsets_E1, routing.schedule_S3)
    return ops.combine(y_PD, weight_TK, routing.row_of_pair_P, routing.top_k, x_TD.dtype), h_PG


def backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    h_PG: Tensor,
    routing: Routing,
    activation: Activation,
    dtype: torch.dtype,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx_TD, dweight_TK, dw1_ECFD, dw2_EDF), each only if `needs` it, from x and h alone: a is
    recomputed, and y is not needed, since <dout, W2 a> = <W2^T dout, a> = <v, a> is dweight.
    """
    need_dx, need_dweight, need_dw1, need_dw2 = needs
    dx_TD = dweight_TK = dw1_ECFD = dw2_EDF = None

    dout_TD = dout_TD.to(dtype)
    rows = (routing.row_of_pair_P, routing.pair_of_row_P, routing.offsets_E1, routing.top_k)
    dh_PG, wa_PF, dweight_TK = ops.dh(
        dout_TD, w2_EDF.to(dtype), h_PG, weight_TK, *routing.tensors, activation.fn, activation.params,
        need_dx or need_dw1, need_dw2, need_dweight,
    )  # fmt: skip
    if need_dw2:
        dw2_EDF = ops.dw2(dout_TD, wa_PF, *rows, w2_EDF)
    del wa_PF
    if need_dx:
        dx_PD = ops.dx(dh_PG, w1_ECFD.to(dtype), routing.offsets_E1, routing.schedule_S3)
        dx_TD = ops.combine(dx_PD, None, routing.row_of_pair_P, routing.top_k, x_TD.dtype)
        del dx_PD
    if need_dw1:
        dw1_ECFD = ops.dw1(dh_PG, x_TD.to(dtype), *rows, w1_ECFD)
    return dx_TD, dweight_TK if need_dweight else None, dw1_ECFD, dw2_EDF


def moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1: Tensor | Weight,
    w2: Tensor | Weight,
    *,
    activation: str | Activation = SWIGLU,
    dtype: torch.dtype | None = None,
    expert_parallel: bool = False,
) -> Tensor:
    """Mixture of expert MLPs over tokens that a router has already assigned.

        out[t] = sum_k weight[t, k] * w2[e] @ act(w1[e] @ x[t])    with e = ids[t, k]

    Args:
        x_TD: tokens [T, D], floating point.
        ids_TK: expert of each pair [T, K], int32 or int64. Ids outside [0, E) (expert-parallel sentinels)
            take no row and add nothing; with FASTEXPERTS_CHECK=1 any such id but -1 and E raises.
        weight_TK: routing weights [T, K], floating point; fp32 stays fp32.
        w1: up projection [E, G, D], gate rows first (G = 2F, or F for a non-gated activation), or a `Weight`.
        w2: down projection [E, D, F], or a `Weight`.
        activation: an `Activation` or a name in `fastexperts.ACTIVATIONS`.
        dtype: of the products; default the autocast dtype where autocast is on, else the dtype of `x_TD`.
            Weights of another dtype are cast for the length of a pass, and get gradients in their own dtype.
        expert_parallel: w1 and w2 hold only this rank's experts, so K may exceed E (other ids are sentinels).

    Returns:
        out_TD [T, D] in the dtype of `x_TD`.

    Differentiable once in x_TD, weight_TK, w1 and w2; a second derivative raises RuntimeError. Keeps x_TD, h
    [P, G] in `dtype`, the weights and the routing for backward. Sums are fp32 (fp64 for fp64) in a fixed
    order: the same inputs give bitwise the same results. Raises FastexpertsError for arguments that do not
    fit. Formulas: docs/how-it-works.md.
    """
    activation = resolve(activation, "moe_mlp")
    w1, w2 = as_weight(w1), as_weight(w2)
    check_moe_mlp(x_TD, ids_TK, weight_TK, w1, w2, activation, dtype, expert_parallel)
    if dtype is None:
        device = x_TD.device.type
        # "meta" has no autocast, and asking raises
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_TD.dtype
    w1_ECFD, w2_EDF = w1.parts(activation.parts), w2.out_in

    routing = ops.route(ids_TK, w2_EDF.shape[0], ops.block_m(x_TD.device, dtype))
    differentiable = (x_TD, weight_TK, w1_ECFD, w2_EDF)
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    out_TD, _ = _moe_mlp(
        *differentiable, list(routing), ids_TK.shape[1], activation.fn, activation.params, dtype, keep_h
    )
    return out_TD


@torch.library.custom_op("fastexperts::moe_mlp", mutates_args=())
def _moe_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    routing: list[Tensor],
    top_k: int,
    act: str,
    params: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    activation = Activation.of(act, w1_ECFD.shape[1] == 2, params)
    return forward(x_TD, weight_TK, w1_ECFD, w2_EDF, Routing.of(routing, top_k), activation, dtype, keep_h)


@_moe_mlp.register_fake
def _(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    routing: list[Tensor],
    top_k: int,
    act: str,
    params: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    _, parts, dim_f, _ = w1_ECFD.shape
    h_PG = x_TD.new_empty((weight_TK.numel() if keep_h else 0, parts * dim_f), dtype=dtype)
    return x_TD.new_empty(x_TD.shape), h_PG


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, weight_TK, w1_ECFD, w2_EDF, routing, ctx.top_k, ctx.act, ctx.params, ctx.dtype, _ = inputs
    _, h_PG = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h_PG)
    ctx.save_for_backward(x_TD, weight_TK, w1_ECFD, w2_EDF, h_PG, *routing)


def _backward(ctx: Any, dout_TD: Tensor | None, _dh_PG: None) -> tuple[Any, ...]:
    no_grad = ([None] * 4, *(None,) * 5)  # routing, and the arguments that are not tensors
    if dout_TD is None:
        return (*(None,) * 4, *no_grad)
    x_TD, weight_TK, w1_ECFD, w2_EDF, h_PG, *tensors = ctx.saved_tensors
    routing = Routing.of(tensors, ctx.top_k)
    activation = Activation.of(ctx.act, w1_ECFD.shape[1] == 2, ctx.params)
    needs = ctx.needs_input_grad[:4]
    grads = backward(
        dout_TD, x_TD, weight_TK, w1_ECFD, w2_EDF, h_PG, routing, activation, ctx.dtype, needs
    )  # fmt: skip
    return (*grads, *no_grad)


_moe_mlp.register_autograd(_backward, setup_context=_save_for_backward)
