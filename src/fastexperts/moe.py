"""The mixture-of-experts layer: the dataflow forward, its mirror backward, and the one autograd formula.

Legend, used in every file: T tokens, K top-k, P = T*K token-expert pairs (rows, sorted by expert), E experts,
D model (hidden) dim, F expert intermediate dim, C parts of h (gate and up: 2, non-gated: 1), G = C*F.
x tokens, h pre-activations, a = act(h), y = W2 a, v = W2^T dout, wa = weight * a.
Tensors carry their dims as a suffix; index maps read value_of_index; a gradient is d + the name of its
primal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastexperts import backend, settings
from fastexperts.activations import SWIGLU, Activation, resolve
from fastexperts.checks import check_moe_mlp
from fastexperts.library import op
from fastexperts.routing import Routing, check_ids, schedule_length
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
    ops = backend.load(x_TD.device)
    h_PG, a_PF = ops.up(x_TD.to(dtype), w1_ECFD.to(dtype), routing, activation, keep_h)
    y_PD = ops.down(a_PF, w2_EDF.to(dtype), routing)
    return ops.combine(y_PD, weight_TK, routing, x_TD.dtype), h_PG


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
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx_TD, dweight_TK, dw1_ECFD, dw2_EDF), each only if `needs` it, from x and h alone: a is
    recomputed, and y is not needed, since <dout, W2 a> = <W2^T dout, a> = <v, a> is dweight.
    """
    ops = backend.load(x_TD.device)
    need_dx, need_dweight, need_dw1, need_dw2 = needs
    dx_TD = dw1_ECFD = dw2_EDF = None

    dout_TD = dout_TD.to(dtype)
    dh_PG, wa_PF, dweight_TK = ops.dh(
        dout_TD, w2_EDF.to(dtype), h_PG, weight_TK, routing, activation,
        need_dh=need_dx or need_dw1, need_wa=need_dw2, need_dweight=need_dweight,
    )  # fmt: skip
    if need_dw2:
        dw2_EDF = ops.dw2(dout_TD, wa_PF, routing, w2_EDF)
    del wa_PF
    if need_dx:
        dx_PD = ops.dx(dh_PG, w1_ECFD.to(dtype), routing)
        dx_TD = ops.combine(dx_PD, None, routing, x_TD.dtype)
        del dx_PD
    if need_dw1:
        dw1_ECFD = ops.dw1(dh_PG, x_TD.to(dtype), routing, w1_ECFD)
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

    tensors = (x_TD, ids_TK, weight_TK, w1_ECFD, w2_EDF)
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    out_TD, *_ = _moe_mlp(*tensors, activation.fn, activation.params, dtype, keep_h)
    return out_TD


# The layer as PyTorch sees it: two ops that torch.compile, checkpoint policies and profilers see whole. They
# take no objects and return no None: activations travel as a name and floats, absent tensors with 0 rows.


@op("moe_mlp")
def _moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    act: str,
    params: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, and the four tensors of the routing); h is [0, G] unless `keep_h`."""
    num_experts = w2_EDF.shape[0]
    if settings.check_ids():
        check_ids(ids_TK, num_experts)
    backend.check_current(x_TD.device)
    ops = backend.load(x_TD.device)
    routing = ops.route(ids_TK, num_experts, ops.block_m(x_TD.device, dtype))
    activation = Activation.of(act, w1_ECFD.shape[1] == 2, params)
    out_TD, h_PG = forward(x_TD, weight_TK, w1_ECFD, w2_EDF, routing, activation, dtype, keep_h)
    row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3 = routing.tensors
    return out_TD, h_PG, row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3


@_moe_mlp.fake
def _(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    act: str,
    params: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, parts, dim_f, _ = w1_ECFD.shape
    num_pairs = ids_TK.numel()
    block_m = backend.load(x_TD.device).block_m(x_TD.device, dtype)

    def integers(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty((num_pairs if keep_h else 0, parts * dim_f), dtype=dtype),
        integers(num_pairs),
        integers(num_pairs),
        integers(num_experts + 1),
        integers(schedule_length(num_pairs, num_experts, block_m), 3),
    )


@op("moe_mlp_backward")
def _moe_mlp_backward(
    dout_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    kept: list[Tensor],
    act: str,
    params: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx_TD, dweight_TK, dw1_ECFD, dw2_EDF), empty where not needed. kept: h_PG and the routing."""
    backend.check_current(x_TD.device)
    h_PG, *tensors = kept
    routing = Routing.of(tensors, weight_TK.shape[1])
    activation = Activation.of(act, w1_ECFD.shape[1] == 2, params)
    grads = backward(
        dout_TD, x_TD, weight_TK, w1_ECFD, w2_EDF, h_PG, routing, activation, dtype, needs
    )  # fmt: skip
    dx_TD, dweight_TK, dw1_ECFD, dw2_EDF = (x_TD.new_empty(0) if grad is None else grad for grad in grads)
    return dx_TD, dweight_TK, dw1_ECFD, dw2_EDF


@_moe_mlp_backward.fake
def _(
    dout_TD: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    kept: list[Tensor],
    act: str,
    params: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_dx, need_dweight, need_dw1, need_dw2 = needs
    return (
        x_TD.new_empty(x_TD.shape if need_dx else 0),
        weight_TK.new_empty(weight_TK.shape) if need_dweight else x_TD.new_empty(0),
        torch.empty_like(w1_ECFD) if need_dw1 else x_TD.new_empty(0),
        torch.empty_like(w2_EDF) if need_dw2 else x_TD.new_empty(0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, w1_ECFD, w2_EDF, ctx.act, ctx.params, ctx.dtype, _ = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x_TD, weight_TK, w1_ECFD, w2_EDF, *kept)


def _backward(ctx: Any, dout_TD: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dout_TD is None:
        return (None,) * 9
    x_TD, weight_TK, w1_ECFD, w2_EDF, *kept = ctx.saved_tensors
    need_dx, _, *need_others = ctx.needs_input_grad[:5]  # ids have none
    needs = [need_dx, *need_others]
    grads = _moe_mlp_backward(
        dout_TD, x_TD, weight_TK, w1_ECFD, w2_EDF, kept, ctx.act, ctx.params, ctx.dtype, needs
    )
    dx_TD, *others = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (dx_TD, None, *others, None, None, None, None)


def _no_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(
        "fastexperts.moe_mlp: `create_graph` got True; it needs False, since there is no second derivative. "
        "Use experts_implementation='eager' for double backward."
    )


_moe_mlp.autograd(_backward, setup_context=_save_for_backward)
_moe_mlp_backward.autograd(_no_double_backward)
