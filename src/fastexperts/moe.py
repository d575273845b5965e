"""The mixture-of-experts layer: the dataflow forward, its mirror backward, and the one autograd formula.

Legend, used in every file: T tokens, K top-k, P = T*K token-expert pairs (rows, sorted by expert), E experts,
D model (hidden) dim, F expert intermediate dim, C parts of h (gate and up: 2, non-gated: 1), G = C*F.
x tokens, h pre-activations, a = act(h), y = W2 a, v = W2^T dout, wa = weight * a.
Tensors carry their dims as a suffix; index maps read value_of_index; a gradient is d + the name of its
primal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastexperts import backend, settings
from fastexperts.activations import SWIGLU, Activation, resolve
from fastexperts.checks import check_moe_mlp
from fastexperts.library import op
from fastexperts.routing import Routing, check_ids, schedule_length
from fastexperts.weights import RANK_STEP, Lora, Step, Weight, as_weight


@dataclass(frozen=True)
class Layer:
    """What a layer computes with beside its tokens: weights as stored, routing, updates as `Lora.packed`."""

    weight_TK: Tensor
    w1_ECFD: Tensor
    w2_EDF: Tensor
    routing: Routing
    activation: Activation
    dtype: torch.dtype
    lora1: Lora | None
    lora2: Lora | None


def forward(x_TD: Tensor, layer: Layer, keep_h: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, xa_PR, ya_PR). Products run in `dtype`; the casts live as long as the call.

    An update w + b a is one more step of the product with w: x w^T + (x a^T) b^T, with xa = x a^T kept.
    """
    ops, routing = backend.load(x_TD.device), layer.routing
    step1 = step2 = None
    x = x_TD.to(layer.dtype)
    if layer.lora1:
        b1_ECFR = layer.lora1.b.unflatten(1, layer.w1_ECFD.shape[1:3])
        step1 = Step(ops.shrink(x, layer.lora1.a, routing, tokens=True), b1_ECFR)
    h_PG, a_PF = ops.up(x, layer.w1_ECFD.to(layer.dtype), routing, layer.activation, keep_h, step1)
    if layer.lora2:
        step2 = Step(ops.shrink(a_PF, layer.lora2.a, routing, tokens=False), layer.lora2.b)
    y_PD = ops.down(a_PF, layer.w2_EDF.to(layer.dtype), routing, step2)
    out_TD = ops.combine(y_PD, layer.weight_TK, routing, x_TD.dtype)
    xa_PR, ya_PR = (step.rows_PR if step else x.new_empty(0) for step in (step1, step2))
    return out_TD, h_PG, xa_PR, ya_PR


def backward(
    dout_TD: Tensor, x_TD: Tensor, layer: Layer, kept: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dx_TD, dweight_TK, dw1_ECFD, dw2_EDF, da1, db1, da2, db2), each only if `needs` it, from x and what
    `forward` kept alone: a is recomputed, and y is not needed, since <dout, W2 a> = <W2^T dout, a> = <v, a>
    is dweight.
    """
    ops, routing, dtype = backend.load(x_TD.device), layer.routing, layer.dtype
    h_PG, xa_PR, ya_PR = kept
    need_dx, need_dweight, need_dw1, need_dw2, need_da1, need_db1, need_da2, need_db2 = needs
    dx_TD = dw1_ECFD = dw2_EDF = da1 = db1 = da2 = db2 = step1 = step2 = None

    x, dout = x_TD.to(dtype), dout_TD.to(dtype)
    if layer.lora2:  # v = W2^T dout + a^T (b^T dout)
        db_PR = ops.shrink(dout, layer.lora2.b.transpose(1, 2), routing, tokens=True)
        step2 = Step(db_PR, layer.lora2.a)
    dh_PG, wa_PF, dweight_TK = ops.dh(
        dout, layer.w2_EDF.to(dtype), h_PG, layer.weight_TK, routing, layer.activation,
        need_dh=need_dx or need_dw1 or need_da1 or need_db1, need_wa=need_dw2 or need_da2,
        need_dweight=need_dweight, more=step2,
    )  # fmt: skip
    if need_dw2:
        dw2_EDF = ops.dw2(dout, wa_PF, routing, layer.w2_EDF)
    if step2 and need_da2:
        da2 = ops.dw(step2.rows_PR, wa_PF, routing, step2.w)
    if layer.lora2 and need_db2:
        # transposed: with r columns the product's blocks are mostly padding (H100, r = 16: 0.30 ms; da1, of
        # the same shape as this, 0.14)
        b_ERD = torch.empty_like(layer.lora2.b.mT, memory_format=torch.contiguous_format)
        wya_PR = weighted(ya_PR, layer.weight_TK, routing)
        db2 = ops.dw1(wya_PR, dout, routing, b_ERD[:, None]).squeeze(1).mT
    del wa_PF
    if layer.lora1 and (need_dx or need_da1):
        b_ERG = layer.lora1.b.transpose(1, 2)
        step1 = Step(ops.shrink(dh_PG, b_ERG, routing, tokens=False), layer.lora1.a)
    if need_dx:
        dx_PD = ops.dx(dh_PG, layer.w1_ECFD.to(dtype), routing, step1)
        dx_TD = ops.combine(dx_PD, None, routing, x_TD.dtype)
        del dx_PD
    if need_dw1:
        dw1_ECFD = ops.dw1(dh_PG, x, routing, layer.w1_ECFD)
    if step1 and need_da1:
        da1 = ops.dw1(step1.rows_PR, x, routing, step1.w[:, None]).squeeze(1)
    if layer.lora1 and need_db1:
        db1 = ops.dw(dh_PG, xa_PR, routing, layer.lora1.b)
    return dx_TD, dweight_TK if need_dweight else None, dw1_ECFD, dw2_EDF, da1, db1, da2, db2


def weighted(rows_PR: Tensor, weight_TK: Tensor, routing: Routing) -> Tensor:
    """Each row times its pair's weight; rows without a pair stay undefined."""
    weight_P = weight_TK.reshape(-1)[routing.pair_of_row_P.clamp(min=0)]
    return (rows_PR * weight_P[:, None]).to(rows_PR.dtype)


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
        w1: up projection [E, G, D], gate rows first (G = 2F, or F for a non-gated activation), or a `Weight`,
            which may carry a low-rank update, `Lora`.
        w2: down projection [E, D, F], or a `Weight`.
        activation: an `Activation` or a name in `fastexperts.ACTIVATIONS`.
        dtype: of the products; default the autocast dtype where autocast is on, else the dtype of `x_TD`.
            Weights of another dtype are cast for the length of a pass, and get gradients in their own dtype.
        expert_parallel: w1 and w2 hold only this rank's experts, so K may exceed E (other ids are sentinels).

    Returns:
        out_TD [T, D] in the dtype of `x_TD`.

    Differentiable once in x_TD, weight_TK, w1, w2 and the factors of their updates; a second derivative
    raises RuntimeError. Keeps x_TD, h [P, G] in `dtype`, the weights, the routing and of an update its rows
    [P, r] for backward. Sums are fp32 (fp64 for fp64) in a fixed
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
    tensors = (x_TD, ids_TK, weight_TK, w1.parts(activation.parts), w2.out_in)
    factors, scales = flattened(w1.lora_parts(activation.parts), w2.lora_parts(1))
    differentiable = (*tensors, *factors)
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)
    out_TD, *_ = _moe_mlp(*tensors, factors, activation.fn, [*activation.params, *scales], dtype, keep_h)
    return out_TD


# The layer as PyTorch sees it: two ops that torch.compile, checkpoint policies and profilers see whole. They
# take no objects and return no None: an activation travels as a name and floats, updates as four factors (no
# update: of rank 0) and two scales, absent tensors as empty ones.


def flattened(*updates: Lora | None) -> tuple[list[Tensor], list[float]]:
    """([a1, b1, a2, b2], [scale1, scale2]), or two empty lists where there is no update at all."""
    if updates == (None, None):
        return [], []
    some = next(update for update in updates if update)
    none = Lora(some.a.detach()[:0, :0], some.b.detach()[:0, :, :0])
    present = [update or none for update in updates]
    return [factor for update in present for factor in (update.a, update.b)], [u.scale for u in present]


def restored(
    weight_TK: Tensor, w1_ECFD: Tensor, w2_EDF: Tensor, factors: Sequence[Tensor], act: str,
    numbers: Sequence[float], routing: Routing, dtype: torch.dtype,
) -> Layer:  # fmt: skip
    """The inverse of `flattened` and of an activation's."""
    alpha, limit, up_shift, *scales = numbers
    pairs = zip(factors[::2], factors[1::2], scales, strict=True)
    loras = [Lora(a, b, scale).packed(dtype) if len(a) else None for a, b, scale in pairs]
    lora1, lora2 = loras or (None, None)
    activation = Activation(act, w1_ECFD.shape[1] == 2, alpha, limit, up_shift)
    return Layer(weight_TK, w1_ECFD, w2_EDF, routing, activation, dtype, lora1, lora2)


@op("moe_mlp")
def _moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    factors: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, xa_PR, ya_PR, and the four tensors of the routing); h is [0, G] unless `keep_h`."""
    num_experts = w2_EDF.shape[0]
    if settings.check_ids():
        check_ids(ids_TK, num_experts)
    backend.check_current(x_TD.device)
    ops = backend.load(x_TD.device)
    routing = ops.route(ids_TK, num_experts, ops.block_m(x_TD.device, dtype))
    layer = restored(weight_TK, w1_ECFD, w2_EDF, factors, act, numbers, routing, dtype)
    row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3 = routing.tensors
    return *forward(x_TD, layer, keep_h), row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3


@_moe_mlp.fake
def _(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_ECFD: Tensor,
    w2_EDF: Tensor,
    factors: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_experts, parts, dim_f, _ = w1_ECFD.shape
    num_pairs = ids_TK.numel()
    block_m = backend.load(x_TD.device).block_m(x_TD.device, dtype)

    def integers(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    def rows(a: Tensor) -> Tensor:
        rank = a.shape[1] + -a.shape[1] % RANK_STEP
        return x_TD.new_empty((num_pairs, rank) if len(a) else 0, dtype=dtype)

    xa_PR, ya_PR = (rows(a) for a in factors[::2] or [x_TD[:0]] * 2)
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty((num_pairs if keep_h else 0, parts * dim_f), dtype=dtype),
        xa_PR,
        ya_PR,
        integers(num_pairs),
        integers(num_pairs),
        integers(num_experts + 1),
        integers(schedule_length(num_pairs, num_experts, block_m), 3),
    )


@op("moe_mlp_backward")
def _moe_mlp_backward(
    dout_TD: Tensor,
    primals: list[Tensor],
    kept: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of `primals` (x, weight, w1, w2, factors), empty where not needed. kept: h, xa, ya, and the
    routing.
    """
    x_TD, weight_TK, w1_ECFD, w2_EDF, *factors = primals
    backend.check_current(x_TD.device)
    routing = Routing.of(kept[3:], weight_TK.shape[1])
    layer = restored(weight_TK, w1_ECFD, w2_EDF, factors, act, numbers, routing, dtype)
    every = [*needs, *[False] * (8 - len(needs))]
    found = backward(dout_TD, x_TD, layer, kept[:3], every)
    grads = [x_TD.new_empty(0) if grad is None else grad for grad in found]
    for i, factor in enumerate(factors, start=4):
        if needs[i]:
            grads[i] = grads[i][:, : factor.shape[1], : factor.shape[2]].to(factor.dtype).contiguous()
    for i, scale in zip((4, 6), numbers[3:], strict=False):  # packed into a
        if scale != 1.0 and factors and needs[i]:
            grads[i].mul_(scale)
    return grads[: len(primals)]


@_moe_mlp_backward.fake
def _(
    dout_TD: Tensor,
    primals: list[Tensor],
    kept: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    x_TD, weight_TK, w1_ECFD, w2_EDF, *factors = primals
    strided = [torch.empty_like(w) for w in (w1_ECFD, w2_EDF)]  # as the parameters; the others are contiguous
    grads = [x_TD.new_empty(x_TD.shape), weight_TK.new_empty(weight_TK.shape), *strided]
    grads += [factor.new_empty(factor.shape) for factor in factors]
    return [grad if need else x_TD.new_empty(0) for grad, need in zip(grads, needs, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, w1_ECFD, w2_EDF, factors, ctx.act, ctx.numbers, ctx.dtype, _ = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x_TD, weight_TK, w1_ECFD, w2_EDF, *factors, *kept)
    ctx.primals = 4 + len(factors)


def _backward(ctx: Any, dout_TD: Tensor | None, *_: None) -> tuple[Any, ...]:
    need_x, _, need_weight, need_w1, need_w2, need_factors, *_ = ctx.needs_input_grad
    if dout_TD is None:
        return (*(None,) * 5, [None] * (ctx.primals - 4), *(None,) * 4)
    saved = list(ctx.saved_tensors)  # once: checkpointing recomputes at the first look and refuses a second
    primals, kept = saved[: ctx.primals], saved[ctx.primals :]
    needs = [need_x, need_weight, need_w1, need_w2, *(need_factors or ())]
    found = _moe_mlp_backward(dout_TD, primals, kept, ctx.act, ctx.numbers, ctx.dtype, needs)
    dx_TD, *others = (grad if need else None for grad, need in zip(found, needs, strict=True))
    dweight_TK, dw1_ECFD, dw2_EDF, *dfactors = others
    return (dx_TD, None, dweight_TK, dw1_ECFD, dw2_EDF, dfactors, None, None, None, None)


def _no_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(
        "fastexperts.moe_mlp: `create_graph` got True; it needs False, since there is no second derivative. "
        "Use experts_implementation='eager' for double backward."
    )


_moe_mlp.autograd(_backward, setup_context=_save_for_backward)
_moe_mlp_backward.autograd(_no_double_backward)
