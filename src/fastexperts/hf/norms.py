"""RMS norms of a model whose formula Liger's kernel computes, found by comparing numbers.

A candidate is a module with one 1-D parameter `weight` and an epsilon. A copy of it with random weights runs
on a few rows beside each formula of `FORMULAS`, in fp32 with gradients and in bf16: there the formulas differ
by where they round. No weight of the model is read, so it may be on the meta device or sharded.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import liger

FORMULAS = tuple(itertools.product((0.0, 1.0), ("llama", "gemma")))
"""(offset, casting): weights count from 0 or 1; and meet the rounded row, or all is fp32 until the end."""

ROWS = 16
TOLERANCE = 1e-5
ROUNDED_ELSEWHERE = (
    1 / 64
)  # of the elements in bf16: another order of the sum; the wrong casting moves a third


class NormForward(liger.Forward):
    """Liger's RMSNorm with the weight of the module."""

    def __init__(self, module: Any, where: str, eps: float, offset: float, casting: str) -> None:
        super().__init__(module, where)
        self.eps, self.offset, self.casting = eps, offset, casting

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if not self.takes(hidden_states):
            return self.stock(hidden_states)
        weight = self.module.weight
        if self.casting == "llama":  # where the product with the weight comes after the rounding
            hidden_states = liger.promoted(hidden_states, weight)
        return liger.rms_norm(hidden_states, weight, self.eps, self.offset, self.casting)

    def __str__(self) -> str:
        return f"Liger RMSNorm, offset {self.offset:g}, {self.casting} casting"


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of what may be an RMS norm."""
    return {name: module for name, module in model.named_modules() if _may_be_norm(module)}


def _may_be_norm(module: Any) -> bool:
    parameters = {name: p for name, p in module.named_parameters() if p is not None}
    alone = parameters.keys() == {"weight"} and not any(True for _ in module.buffers())
    return alone and parameters["weight"].dim() == 1 and bool(_epsilons(module))


def _epsilons(module: Any) -> list[float]:
    return [value for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]


def forward_of(module: Any, where: str) -> NormForward:
    """Liger's forward for `module`; raises FastexpertsError if it computes another formula."""
    cls = type(module).__name__
    if liger.is_patched(module):
        raise _refusal(cls, "a forward put on the instance")
    parameters = inspect.signature(type(module).forward).parameters
    if len(parameters) != 2:
        raise _refusal(cls, f"a forward of {', '.join(list(parameters)[1:])}")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            twin, x_RD = _probe(module)
            for eps, (offset, casting) in itertools.product(_epsilons(module), FORMULAS):
                if _same(twin, x_RD, eps, offset, casting):
                    return NormForward(module, where, eps, offset, casting)
    except Exception as e:
        raise _refusal(cls, f"{type(e).__name__} ({e}) on {ROWS} rows") from e
    raise _refusal(cls, "another function of its rows than x / rms(x) * (0 or 1 + weight)")


def _probe(module: Any) -> tuple[Any, Tensor]:
    """A copy of `module` on the CPU with random weights, and rows from the size of its epsilon up."""
    generator = torch.Generator().manual_seed(0)
    dim = module.weight.numel()
    weight_D = torch.randn(dim, generator=generator)
    # What is the weight's value is left behind: it may be sharded, or not there at all.
    twin = copy.copy(module)
    vars(twin).update(_parameters={"weight": nn.Parameter(weight_D)})
    vars(twin).pop("forward", None)
    scale_R1 = torch.logspace(math.log10(_epsilons(module)[0] ** 0.5 or 1e-3), 1, ROWS)[:, None]
    return twin, torch.randn(ROWS, dim, generator=generator) * scale_R1


def _same(twin: Any, x_RD: Tensor, eps: float, offset: float, casting: str) -> bool:
    """Whether the forward of the class of `twin` is the formula, in values, gradients and roundings."""

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        twin._parameters["weight"] = weight
        return type(twin).forward(twin, x)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return _formula(x, weight, eps, offset, casting)

    weight_D = twin._parameters["weight"].detach()
    with torch.autocast("cpu", enabled=False):
        wanted, got = (_with_gradients(f, x_RD, weight_D) for f in (theirs, formula))
        if not all(_near(a, b) for a, b in zip(got, wanted, strict=True)):
            return False
        low = torch.bfloat16
        pairs = ((x_RD.to(low), weight_D.to(low)), (x_RD.to(low), weight_D))
        return all(_rounds_alike(formula(x, w), theirs(x, w)) for x, w in pairs)


def _formula(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (offset + weight) * y.to(x.dtype)
    return ((offset + weight.float()) * y).to(x.dtype)


def _with_gradients(function: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    y = function(*leaves)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def _near(got: Tensor, wanted: Tensor) -> bool:
    """Row by row, so that those of the size of the epsilon count as much."""
    same = got.shape == wanted.shape and got.dtype == wanted.dtype
    return same and bool(((got - wanted).norm(dim=-1) <= TOLERANCE * wanted.norm(dim=-1)).all())


def _rounds_alike(got: Tensor, wanted: Tensor) -> bool:
    differing = (got != wanted).double().mean().item() if got.dtype == wanted.dtype else 1.0
    return differing <= ROUNDED_ELSEWHERE


def _refusal(cls: str, got: str) -> FastexpertsError:
    return refuse(
        cls,
        "forward",
        got=got,
        needs="the RMS norm of one tensor",
        way_out="It keeps the forward of its class.",
    )
