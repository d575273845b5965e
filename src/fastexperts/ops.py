"""The layer of moe.py as PyTorch sees it: `moe_mlp`, over two torch.library ops that torch.compile,
checkpoint policies and profilers see whole, with the one autograd formula between them.

Ops take no objects and return no None: an activation travels as a name and floats, biases and the factors of
updates as `EXTRAS`, an absent tensor as an empty one.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastexperts import backend, settings
from fastexperts.activations import SWIGLU, Activation, resolve
from fastexperts.checks import check_moe_mlp
from fastexperts.library import op
from fastexperts.moe import Layer, backward, forward
from fastexperts.routing import Routing, check_ids, schedule_length
from fastexperts.updates import Update, padded
from fastexperts.weights import Lora, Weight, as_weight

EXTRAS = ("bias1", "bias2", "a1", "b1", "a2", "b2")
"""What the two projections may have beside their weights: all of them, or none."""
PRIMALS = 4  # x, weight, w1, w2: always there, before the extras

NAME = "moe_mlp"
AGAIN = slice(2, None)
"""Of its results: xa, ya, and the routing in whose order their rows are."""
Results = tuple[Tensor, ...]
_thread = threading.local()


class ResultsThrough(contextlib.AbstractContextManager[None]):
    """While it is entered, in this thread: the results of the ops named in `of` come from `through`. May be
    entered again.

    For what checkpoints do in the place of a computation, below autograd: a dispatch mode would see every
    operation of a layer, in Python.
    """

    def __init__(self, of: Sequence[str] = (NAME,)) -> None:
        self._of = of
        self._before: list[dict[str, Callable[..., Results]]] = []

    def through(self, op: str, compute: Callable[..., Results]) -> Results:
        """The results of `op`, which `compute()` computes. That of our layer takes `unread=True`: NaN for the
        output, without w2 and combine; and `kept`, an earlier call's results in `AGAIN`, which it then does
        not compute.
        """
        raise NotImplementedError

    def __enter__(self) -> None:
        self._before.append(_throughs())
        # bound here: an object that held it would hold itself
        _thread.throughs = _throughs() | {op: functools.partial(self.through, op) for op in self._of}

    def __exit__(self, *_: object) -> None:
        _thread.throughs = self._before.pop()


def _throughs() -> dict[str, Callable[..., Results]]:
    return getattr(_thread, "throughs", {})


def through_of(op: str) -> Callable[[Callable[..., Results]], Results] | None:
    """What this thread's `ResultsThrough` does with the results of `op`, if there is one."""
    return _throughs().get(op)


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

        out[t] = sum_k weight[t, k] * (w2[e] @ act(w1[e] @ x[t] + b1[e]) + b2[e])    with e = ids[t, k]

    Args:
        x_TD: tokens [T, D], floating point.
        ids_TK: expert of each pair [T, K], int32 or int64. Ids outside [0, E) (expert-parallel sentinels)
            take no row and add nothing; with FASTEXPERTS_CHECK=1 any such id but -1 and E raises.
        weight_TK: routing weights [T, K], floating point; fp32 stays fp32.
        w1: up projection [E, G, D], G = 2F (gate rows first, unless the activation is `interleaved`), or F
            for a non-gated activation; or a `Weight`, which may carry a bias and a low-rank update, `Lora`.
        w2: down projection [E, D, F], or a `Weight`.
        activation: an `Activation` or a name in `fastexperts.ACTIVATIONS`.
        dtype: of the products; default the autocast dtype where autocast is on (which leaves fp64 alone),
            else the dtype of `x_TD`.
            Weights of another dtype are cast for the length of a pass, and get gradients in their own dtype.
        expert_parallel: w1 and w2 hold only this rank's experts, so K may exceed E (other ids are sentinels).

    Returns:
        out_TD [T, D] in the dtype of `x_TD`.

    Differentiable once, backwards, in x_TD, weight_TK, w1, w2, their biases and the factors of their updates;
    a second derivative, or forward mode, raises RuntimeError. Keeps x_TD, h [P, G] in `dtype`, the weights,
    the routing and of an update its rows [P, r] for backward. Sums are fp32 (fp64 for fp64) in a fixed order:
    the same inputs give bitwise the same results. Raises FastexpertsError for arguments that do not fit.
    Formulas: docs/how-it-works.md.
    """
    activation = resolve(activation, "moe_mlp")
    w1, w2 = as_weight(w1), as_weight(w2)
    check_moe_mlp(x_TD, ids_TK, weight_TK, w1, w2, activation, dtype, expert_parallel)
    if dtype is None:
        device = x_TD.device.type
        # "meta" has no autocast, and asking raises
        autocast = device != "meta" and torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x_TD.dtype
    tensors = (x_TD, ids_TK, weight_TK, w1.out_in, w2.out_in)
    extras, scales = flattened(w1, w2)
    if forward_ad._current_level >= 0:
        _no_forward_mode([*tensors, *extras])
    keep_h = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *extras))
    numbers = [*activation.params, *scales]
    out_TD, *_ = _moe_mlp(*tensors, extras, activation.fn, numbers, dtype, keep_h)
    return out_TD


def flattened(w1: Weight, w2: Weight) -> tuple[list[Tensor], list[float]]:
    """(`EXTRAS`, scales of the two updates), or two empty lists where there are none."""
    weights = (w1, w2)
    if all(weight.bias is None and weight.lora is None for weight in weights):
        return [], []
    absent = w1.w.new_empty(0)
    biases = [absent if weight.bias is None else weight.bias for weight in weights]
    none = Lora(absent.view(0, 0, 0), absent.view(0, 0, 0))
    updates = [weight.lora or none for weight in weights]
    factors = [factor for update in updates for factor in (update.a, update.b)]
    return [*biases, *factors], [update.scale for update in updates]


def restored(
    weight_TK: Tensor, w1_EGD: Tensor, w2_EDF: Tensor, extras: Sequence[Tensor], act: str,
    numbers: Sequence[float], routing: Routing, dtype: torch.dtype,
) -> Layer:  # fmt: skip
    """The `Layer` behind an op's flat arguments. numbers: the activation's, and with extras the two updates'
    scales.
    """
    bias1 = bias2 = update1 = update2 = None
    params = list(numbers)
    if extras:
        *params, scale1, scale2 = numbers
        bias1, bias2 = (bias if bias.numel() else None for bias in extras[:2])
        _, _, a1, b1, a2, b2 = extras
        loras = (Lora(a1, b1, scale1), Lora(a2, b2, scale2))
        update1, update2 = (Update(lora, dtype) if lora.a.numel() else None for lora in loras)
    activation = Activation.of(act, params)
    return Layer(weight_TK, w1_EGD, w2_EDF, bias1, bias2, update1, update2, routing, activation, dtype)


@op(NAME)
def _moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    extras: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, xa_PR, ya_PR, and the four tensors of the routing); h is [0, G] unless `keep_h`."""
    num_experts = w2_EDF.shape[0]

    def compute(unread: bool = False, kept: Results = ()) -> Results:
        if settings.check_ids():
            check_ids(ids_TK, num_experts)
        ops = backend.load(x_TD.device)
        with backend.current(x_TD.device):
            rows, routed = kept[:2], kept[2:]
            if routed:
                routing = Routing.of(routed, ids_TK.shape[1])
            else:
                routing = ops.route(ids_TK, num_experts, ops.block_m(x_TD.device, dtype))
            layer = restored(weight_TK, w1_EGD, w2_EDF, extras, act, numbers, routing, dtype)
            return *forward(x_TD, layer, keep_h, unread, rows), *routing.tensors

    through = through_of(NAME)
    return compute() if through is None else through(compute)  # type: ignore[return-value]


@_moe_mlp.fake
def _(x_TD: Tensor, ids_TK: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, w1_EGD, _, extras, _, _, dtype, keep_h = others
    num_experts, dim_g, _ = w1_EGD.shape
    num_pairs = ids_TK.numel()
    block_m = backend.load(x_TD.device).block_m(x_TD.device, dtype)

    def integers(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    def rows(extra: str) -> Tensor:
        a = extras[EXTRAS.index(extra)] if extras else x_TD[:0]
        return x_TD.new_empty((num_pairs, padded(a.shape[1])) if a.numel() else 0, dtype=dtype)

    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty((num_pairs if keep_h else 0, dim_g), dtype=dtype),
        rows("a1"),
        rows("a2"),
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
    """Gradients of `primals` (x, weight, w1, w2, extras), empty where not needed. kept: h, xa, ya, and the
    routing.
    """
    x_TD, weight_TK, w1_EGD, w2_EDF, *extras = primals
    routing = Routing.of(kept[3:], weight_TK.shape[1])
    every = [*needs, *[False] * (PRIMALS + len(EXTRAS) - len(needs))]
    with backend.current(x_TD.device):
        layer = restored(weight_TK, w1_EGD, w2_EDF, extras, act, numbers, routing, dtype)
        found = backward(dout_TD, x_TD, layer, kept[:3], every)
        return [x_TD.new_empty(0) if grad is None else grad for grad in found[: len(primals)]]


@_moe_mlp_backward.fake
def _(dout_TD: Tensor, primals: list[Tensor], *others: Any) -> list[Tensor]:
    needs = others[-1]
    x_TD, weight_TK, w1_EGD, w2_EDF, *extras = primals
    grads = [new.new_empty(new.shape) for new in (x_TD, weight_TK)]
    grads += [torch.empty_like(w) for w in (w1_EGD, w2_EDF)]  # laid out as the parameters
    grads += [bias.new_empty(bias.shape) for bias in extras[:2]]
    grads += [torch.empty_like(factor) for factor in extras[2:]]
    return [grad if need else x_TD.new_empty(0) for grad, need in zip(grads, needs, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weight_TK, w1_EGD, w2_EDF, extras, *ctx.how, _ = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x_TD, weight_TK, w1_EGD, w2_EDF, *extras, *kept)
    ctx.primals = PRIMALS + len(extras)


def _backward(ctx: Any, dout_TD: Tensor | None, *_: None) -> tuple[Any, ...]:
    need_x, _, need_weight, need_w1, need_w2, need_extras, *_ = ctx.needs_input_grad
    others = (None,) * 4  # how, keep_h
    if dout_TD is None:
        return (*(None,) * 5, [None] * (ctx.primals - PRIMALS), *others)
    saved = list(ctx.saved_tensors)  # once: checkpointing recomputes at the first look and refuses a second
    primals, kept = saved[: ctx.primals], saved[ctx.primals :]
    needs = [need_x, need_weight, need_w1, need_w2, *(need_extras or ())]
    found = _moe_mlp_backward(dout_TD, primals, kept, *ctx.how, needs)
    grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return (grads[0], None, *grads[1:PRIMALS], grads[PRIMALS:], *others)


def _no_forward_mode(tensors: Sequence[Tensor]) -> None:
    # PyTorch would take an op without such a derivative for a constant
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "fastexperts.moe_mlp: forward-mode differentiation (torch.func.jvp, dual tensors) got a tangent; "
            "only backward is served. Use experts_implementation='eager' for it."
        )


def _no_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(
        "fastexperts.moe_mlp: `create_graph` got True; it needs False, since there is no second derivative. "
        "Use experts_implementation='eager' for double backward."
    )


_moe_mlp.autograd(_backward, setup_context=_save_for_backward)
_moe_mlp_backward.autograd(_no_double_backward)
