"""One call of moe_mlp on a GPU at the shapes of real models, by the error rule: the truth in fp64, expert by
expert, so that at most one is ever in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from support import Error, gates_first, in_turn, load_benchmark
from torch import Tensor

from fastexperts import Activation, Weight, moe_mlp, moe_mlp_reference

shapes = load_benchmark("shapes")


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call, weights in the canonical layout; routing weights are fp32, as routers give them.

    stored: as gpt_oss stores its experts, transposed, gate and up in turn.
    """

    x: Tensor
    ids: Tensor
    weight: Tensor
    w1: Tensor
    w2: Tensor
    dout: Tensor
    b1: Tensor | None = None
    b2: Tensor | None = None
    activation: str | Activation = "swiglu"
    stored: bool = False

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("x", "weight", "w1", "w2", "b1", "b2")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def build(
    shape: Any,
    tokens: int,
    kind: str = "balanced",
    dtype: torch.dtype = torch.bfloat16,
    weights: torch.dtype | None = None,
    seed: int = 0,
    *,
    parts: int = 2,
    bias: bool = False,
    device: str = "cuda",
    **options: Any,
) -> Inputs:
    """Pre-activations, v and each expert's outputs are about N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    d, f, e = shape.dim_d, shape.dim_f, shape.experts

    def normal(*dims: int, of: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(*dims, generator=generator, device=device, dtype=of).mul_(scale)

    ids, weight = shapes.routing(shape, tokens, kind, device, seed)
    return Inputs(
        x=normal(tokens, d, of=dtype),
        ids=ids,
        weight=weight,
        w1=normal(e, parts * f, d, of=weights or dtype, scale=d**-0.5),
        w2=normal(e, d, f, of=weights or dtype, scale=f**-0.5),
        dout=normal(tokens, d, of=dtype),
        b1=normal(e, parts * f, of=weights or dtype) if bias else None,
        b2=normal(e, d, of=weights or dtype) if bias else None,
        **options,
    )


def ours(inputs: Inputs, function: Any = moe_mlp, **options: Any) -> dict[str, Tensor]:
    """{"out", "dx", ...}; gradients of weights in the canonical layout."""
    leaves, activation = dict(inputs.leaves), inputs.activation
    if inputs.stored:
        assert isinstance(activation, Activation)
        activation = replace(activation, interleaved=True)
        leaves["w1"], leaves["w2"] = in_turn(leaves["w1"]).mT.contiguous(), leaves["w2"].mT.contiguous()
        if "b1" in leaves:
            leaves["b1"] = in_turn(leaves["b1"])
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    w1 = Weight(leaves["w1"], inputs.stored, leaves.get("b1"))
    w2 = Weight(leaves["w2"], inputs.stored, leaves.get("b2"))
    out = function(leaves["x"], inputs.ids, leaves["weight"], w1, w2, activation=activation, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    result = {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}
    if inputs.stored:
        result["dw1"], result["dw2"] = gates_first(result["dw1"].mT), result["dw2"].mT
        if "db1" in result:
            result["db1"] = gates_first(result["db1"])
    return result


class Loop:
    """The loop reference run expert by expert in one dtype."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype | None) -> None:
        self.inputs, self.dtype = inputs, dtype
        self.x, self.weight = (self._leaf(leaf) for leaf in (inputs.x, inputs.weight))
        self.out = torch.zeros_like(self.x)

    def _leaf(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype or tensor.dtype, copy=True).requires_grad_()

    def expert(self, e: int) -> dict[str, Tensor]:
        """Gradients of what expert `e` owns; adds its part to out and to the gradients of x and weight."""
        leaves = self.inputs.leaves
        own = {name: self._leaf(leaves[name][e : e + 1]) for name in leaves if name not in ("x", "weight")}
        w1, w2 = Weight(own["w1"], bias=own.get("b1")), Weight(own["w2"], bias=own.get("b2"))
        ids = torch.where(self.inputs.ids == e, 0, -1)
        out = moe_mlp_reference(self.x, ids, self.weight, w1, w2, activation=self.inputs.activation)
        out.backward(self.inputs.dout.to(out.dtype))
        self.out = self.out.detach() + out.detach()
        return {name: leaf.grad for name, leaf in own.items()}


def check(inputs: Inputs, out: dict[str, Tensor], dtype: torch.dtype, *, autocast: bool = False) -> None:
    """Every tensor of `out` by the rule of numerics.md."""
    eager, ref = Loop(inputs, None), Loop(inputs, torch.float64)
    errors = {name: Error(name, dtype) for name in out}
    for e in range(inputs.w1.shape[0]):
        with torch.autocast(inputs.x.device.type, dtype=dtype, enabled=autocast):
            of_eager = eager.expert(e)
        for name, of_ref in ref.expert(e).items():
            errors[f"d{name}"].add(out[f"d{name}"][e : e + 1], of_eager[name], of_ref)
    errors["out"].add(out["out"], eager.out, ref.out)
    errors["dx"].add(out["dx"], eager.x.grad, ref.x.grad)
    errors["dweight"].add(out["dweight"], eager.weight.grad, ref.weight.grad)
    for error in errors.values():
        error.check()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
