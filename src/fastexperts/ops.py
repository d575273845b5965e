"""The layer of moe.py as PyTorch sees it: `moe_mlp`, over two torch.library ops that torch.compile,
checkpoint policies and profilers see whole, with the one autograd formula between them.

Ops take no objects and return no None: an activation travels as a name and floats; of their results an absent
tensor is an empty one.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

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

PRIMALS = ("x", "weight", "w1", "w2", "bias1", "bias2", "a1", "b1", "a2", "b2")
"""What may get a gradient, in this order; from the biases on, None where a projection has no such thing."""

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
    loras = (w1.lora, w2.lora)
    factors = [factor for lora in loras for factor in ((None, None) if lora is None else (lora.a, lora.b))]
    numbers = [*activation.params, *(1.0 if lora is None else lora.scale for lora in loras)]
    tensors = (x_TD, ids_TK, weight_TK, w1.out_in, w2.out_in, w1.bias, w2.bias, *factors)
    if forward_ad._current_level >= 0:
        _no_forward_mode([tensor for tensor in tensors if tensor is not None])
    keep_h = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out_TD, *_ = _moe_mlp(*tensors, activation.fn, numbers, dtype, keep_h)
    return out_TD


def restored(
    primals: Sequence[Any], act: str, numbers: Sequence[float], routing: Routing, dtype: torch.dtype
) -> Layer:
    """The `Layer` behind an op's flat arguments. primals: `PRIMALS` but x. numbers: the activation's, and the
    scales of the two updates.
    """
    weight_TK, w1_EGD, w2_EDF, bias1, bias2, a1, b1, a2, b2 = primals
    *params, scale1, scale2 = numbers
    update1, update2 = (
        None if a is None or b is None else Update(Lora(a, b, scale), dtype)
        for a, b, scale in ((a1, b1, scale1), (a2, b2, scale2))
    )
    activation = Activation.of(act, tuple(params))
    return Layer(weight_TK, w1_EGD, w2_EDF, bias1, bias2, update1, update2, routing, activation, dtype)


@op(NAME)
def _moe_mlp(  # noqa: PLR0913 - lists of tensors cost the host a search for them in each call
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1_EGD: Tensor,
    w2_EDF: Tensor,
    bias1_EG: Tensor | None,
    bias2_ED: Tensor | None,
    a1_ERD: Tensor | None,
    b1_EGR: Tensor | None,
    a2_ERF: Tensor | None,
    b2_EDR: Tensor | None,
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    keep_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out_TD, h_PG, xa_PR, ya_PR, and the four tensors of the routing); h is [0, G] unless `keep_h`."""
    num_experts = w2_EDF.shape[0]
    primals = (weight_TK, w1_EGD, w2_EDF, bias1_EG, bias2_ED, a1_ERD, b1_EGR, a2_ERF, b2_EDR)

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
            layer = restored(primals, act, numbers, routing, dtype)
            return *forward(x_TD, layer, keep_h, unread, rows), *routing.tensors

    through = through_of(NAME)
    return compute() if through is None else through(compute)  # type: ignore[return-value]


@_moe_mlp.fake
def _(x_TD: Tensor, ids_TK: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, w1_EGD, _, _, _, a1_ERD, _, a2_ERF, _, _, _, dtype, keep_h = others
    num_experts, dim_g, _ = w1_EGD.shape
    num_pairs = ids_TK.numel()
    block_m = backend.load(x_TD.device).block_m(x_TD.device, dtype)

    def integers(*shape: int) -> Tensor:
        return ids_TK.new_empty(shape, dtype=torch.int32)

    def rows(a: Tensor | None) -> Tensor:
        return x_TD.new_empty(0 if a is None else (num_pairs, padded(a.shape[1])), dtype=dtype)

    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty((num_pairs if keep_h else 0, dim_g), dtype=dtype),
        rows(a1_ERD),
        rows(a2_ERF),
        integers(num_pairs),
        integers(num_pairs),
        integers(num_experts + 1),
        integers(schedule_length(num_pairs, num_experts, block_m), 3),
    )


@op("moe_mlp_backward")
def _moe_mlp_backward(
    dout_TD: Tensor,
    primals: list[Tensor | None],
    kept: list[Tensor],
    act: str,
    numbers: list[float],
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of `PRIMALS`, empty where not needed. kept: h, xa, ya, and the routing."""
    x_TD, weight_TK, *_ = cast(list[Tensor], primals)
    routing = Routing.of(kept[3:], weight_TK.shape[1])
    with backend.current(x_TD.device):
        layer = restored(primals[1:], act, numbers, routing, dtype)
        found = backward(dout_TD, x_TD, layer, kept[:3], needs)
        return [x_TD.new_empty(0) if grad is None else grad for grad in found]


@_moe_mlp_backward.fake
def _(dout_TD: Tensor, primals: list[Tensor | None], *others: Any) -> list[Tensor]:
    needs = others[-1]
    parameters = ("w1", "w2", "a1", "b1", "a2", "b2")  # whose gradients are laid out as they are

    def grad(name: str, primal: Tensor | None, need: bool) -> Tensor:
        if primal is None or not need:
            return dout_TD.new_empty(0)
        return torch.empty_like(primal) if name in parameters else primal.new_empty(primal.shape)

    return [grad(*one) for one in zip(PRIMALS, primals, needs, strict=True)]


@_moe_mlp.differentiable
class _MoeMlp(torch.autograd.Function):
    """The op and its derivative."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *args: Any) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _moe_mlp.below_autograd(keys, *args)
        _, *kept = results
        x_TD, _, *primals, act, numbers, dtype, _ = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(x_TD, *primals, *kept)
        ctx.how = act, numbers, dtype
        return results

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor | None, *_: None) -> tuple[Any, ...]:
        _, *needs = ctx.needs_input_grad[: 2 + len(PRIMALS)]  # keys
        del needs[1]  # ids
        others = (None,) * 4  # how, keep_h
        if dout_TD is None:
            return (None,) * (2 + len(PRIMALS) + len(others))
        # once: checkpointing recomputes at the first look and refuses a second
        saved = list(ctx.saved_tensors)
        primals, kept = saved[: len(PRIMALS)], saved[len(PRIMALS) :]
        found = _moe_mlp_backward(dout_TD, primals, kept, *ctx.how, needs)
        dx_TD, *grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
        return (None, dx_TD, None, *grads, *others)


def _no_forward_mode(tensors: Sequence[Tensor]) -> None:
    # PyTorch would take an op without such a derivative for a constant
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            "fastexperts.moe_mlp: forward-mode differentiation (torch.func.jvp, dual tensors) got a tangent; "
            "only backward is served. Use experts_implementation='eager' for it."
        )


@_moe_mlp_backward.no_derivative
def _no_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(
        "fastexperts.moe_mlp: `create_graph` got True; it needs False, since there is no second derivative. "
        "Use experts_implementation='eager' for double backward."
    )
