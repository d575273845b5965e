"""The argument checks of `moe_mlp`: one message per mistake, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastexperts.activations import Activation
from fastexperts.dtypes import DTYPES
from fastexperts.errors import refuse
from fastexperts.weights import Weight

_NAMES = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def check_moe_mlp(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1: Weight,
    w2: Weight,
    activation: Activation,
    dtype: torch.dtype | None,
    expert_parallel: bool,
) -> None:
    """Raise FastexpertsError unless types, dtypes, devices and shapes fit each other."""
    tensors = {"x_TD": x_TD, "ids_TK": ids_TK, "weight_TK": weight_TK, "w1": w1.w, "w2": w2.w}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise _error(name, type(tensor).__name__, "a torch.Tensor", "Convert it with torch.as_tensor.")
        if tensor.device != x_TD.device:
            raise _error(
                name,
                f"device {tensor.device}",
                f"device {x_TD.device}, as x_TD",
                f"Move it with .to('{x_TD.device}').",
            )
    for name in ("x_TD", "weight_TK", "w1", "w2"):
        if tensors[name].dtype not in DTYPES:
            way_out = "Cast it with .to(torch.bfloat16); quantised weights are not served."
            raise _error(name, f"dtype {_short(tensors[name].dtype)}", f"one of {_NAMES}", way_out)
    if dtype is not None and dtype not in DTYPES:
        raise _error(
            "dtype", _short(dtype), f"one of {_NAMES}", "Leave it out to compute in the dtype of x_TD."
        )
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise _error("ids_TK", f"dtype {_short(ids_TK.dtype)}", "int64 or int32", "Cast it with .long().")
    for name in ("x_TD", "ids_TK", "weight_TK"):
        if tensors[name].dim() != 2:
            dims = "[tokens, hidden]" if name == "x_TD" else "[tokens, top-k]"
            way_out = "Flatten batch and sequence with .flatten(0, -2)."
            raise _error(name, f"shape {list(tensors[name].shape)}", f"2 dimensions {dims}", way_out)
    _check_shapes(x_TD, ids_TK, weight_TK, w1, w2, activation, expert_parallel)


def _check_shapes(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1: Weight,
    w2: Weight,
    activation: Activation,
    expert_parallel: bool,
) -> None:
    (tokens, dim_d), (num_experts, dim_out, dim_f) = x_TD.shape, w2.out_in.shape
    if ids_TK.shape[0] != tokens:
        raise _error("ids_TK", f"{ids_TK.shape[0]} tokens", f"{tokens}, as x_TD", "Route the same tokens.")
    if weight_TK.shape != ids_TK.shape:
        raise _error(
            "weight_TK",
            f"shape {list(weight_TK.shape)}",
            f"{list(ids_TK.shape)}, as ids_TK",
            "Give a weight per id.",
        )
    if num_experts == 0:
        raise _error("w2", "0 experts", "at least 1", "Pass the weights of the layer's experts.")
    top_k = ids_TK.shape[1]
    if top_k < 1 or (top_k > num_experts and not expert_parallel):
        way_out = (
            "Check the router's top-k; pass expert_parallel=True if w1 and w2 hold only this rank's experts."
        )
        raise _error("ids_TK", f"top-k {top_k}", f"1 to {num_experts} (the experts of w2)", way_out)
    if dim_out != dim_d:
        raise _error("w2", f"output dim {dim_out}", f"{dim_d}, the hidden dim of x_TD", _LAYOUT.format("w2"))
    expected = (num_experts, activation.parts * dim_f, dim_d)
    if tuple(w1.out_in.shape) != expected:
        kind = "gate and up rows" if activation.gated else "up rows only (non-gated)"
        raise _error(
            "w1", f"[E, out, in] {list(w1.out_in.shape)}", f"{list(expected)}: {kind}", _LAYOUT.format("w1")
        )


_LAYOUT = "Weights stored [E, in, out] go in as Weight({}, transposed=True)."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _error(argument: str, got: str, needs: str, way_out: str) -> Exception:
    return refuse("moe_mlp", argument, got=got, needs=needs, way_out=way_out)
