"""One layer to compute, who can compute it, and the dense products that are its limit."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from peers import PEERS
from shapes import Shape, routing
from torch import Tensor
from torch.nn import Parameter

import fastexperts

GRADIENTS = ("x", "weight", "w1", "w2")
TRANSFORMERS = ("eager", "grouped_mm", "fastexperts")


def _normal(generator: torch.Generator, dtype: torch.dtype, *dims: int) -> Tensor:
    return torch.randn(*dims, device=generator.device, dtype=dtype, generator=generator)


@dataclass(frozen=True)
class Problem:
    """One layer: tokens, routing, weights and the gradient of the output. fp32 routing weights."""

    shape: Shape
    routing: str
    x_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor
    w1_EGD: Tensor
    w2_EDF: Tensor
    dout_TD: Tensor

    @classmethod
    def make(cls, shape: Shape, tokens: int, kind: str, experts: tuple[Tensor, Tensor]) -> Problem:
        """With the weights of `make_experts`."""
        w1, w2 = experts
        generator = torch.Generator(w1.device).manual_seed(1)
        ids_TK, weight_TK = routing(shape, tokens, kind, str(w1.device))
        x_TD, dout_TD = (_normal(generator, w1.dtype, tokens, shape.dim_d) for _ in range(2))
        return cls(shape, kind, Parameter(x_TD), ids_TK, Parameter(weight_TK), w1, w2, dout_TD)

    @property
    def tokens(self) -> int:
        return self.ids_TK.shape[0]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_TD, self.weight_TK, self.w1_EGD, self.w2_EDF

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in `dtype`; routing weights stay as they are."""
        x, w1, w2 = (Parameter(t.detach().to(dtype)) for t in (self.x_TD, self.w1_EGD, self.w2_EDF))
        return replace(self, x_TD=x, w1_EGD=w1, w2_EDF=w2, dout_TD=self.dout_TD.to(dtype))

    def backward(self, out_TD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_TD, self.leaves, self.dout_TD)


def make_experts(shape: Shape, dtype: torch.dtype, device: str = "cuda") -> tuple[Parameter, Parameter]:
    """(w1_EGD, w2_EDF) under which pre-activations and the experts' outputs are about N(0, 1)."""
    generator, d, f, e = torch.Generator(device).manual_seed(0), shape.dim_d, shape.dim_f, shape.experts
    w1 = _normal(generator, dtype, e, 2 * f, d).mul_(d**-0.5)
    return Parameter(w1), Parameter(_normal(generator, dtype, e, d, f).mul_(f**-0.5))


@dataclass(frozen=True)
class Implementation:
    """One contestant. fp32: fp32 weights and tokens under bf16 autocast; pointers: no tensor descriptors."""

    base: str
    fp32: bool = False
    pointers: bool = False

    @classmethod
    def parse(cls, name: str) -> Implementation:
        """base[-fp32][-pointers]"""
        base, *options = name.split("-")
        known = [*TRANSFORMERS, *PEERS]
        if base not in known or not set(options) <= {"fp32", "pointers"}:
            raise SystemExit(f"no implementation {name!r}: one of {', '.join(known)}, with -fp32, -pointers")
        return cls(base, fp32="fp32" in options, pointers="pointers" in options)

    def bind(self, problem: Problem) -> Bound:
        call = PEERS[self.base](problem) if self.base in PEERS else _transformers_layer(problem, self.base)
        return Bound(self, problem, call)


@dataclass(frozen=True)
class Bound:
    """An implementation on a problem, under its conditions."""

    implementation: Implementation
    problem: Problem
    call: Callable[[], Tensor]

    def forward(self) -> Tensor:
        """out, with what backward needs kept."""
        with _pointers(self.implementation.pointers):
            return self._out()

    def step(self) -> tuple[Tensor, ...]:
        """out and the gradients of x, routing weights, w1 and w2."""
        with _pointers(self.implementation.pointers):
            out_TD = self._out()
            return out_TD, *self.problem.backward(out_TD)

    def _out(self) -> Tensor:
        device = self.problem.x_TD.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.implementation.fp32):
            return self.call()


@contextlib.contextmanager
def _pointers(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    before = os.environ.get("FASTEXPERTS_TMA")
    os.environ["FASTEXPERTS_TMA"] = "0"
    try:
        yield
    finally:
        del os.environ["FASTEXPERTS_TMA"]
        if before is not None:
            os.environ["FASTEXPERTS_TMA"] = before


def transformers_experts(problem: Problem, implementation: str) -> torch.nn.Module:
    """Transformers' Qwen3-MoE experts under `implementation`, on the problem's own tensors."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.dim_d,
        moe_intermediate_size=shape.dim_f,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = problem.w1_EGD, problem.w2_EDF
    return experts


def _transformers_layer(problem: Problem, implementation: str) -> Callable[[], Tensor]:
    experts = transformers_experts(problem, implementation)
    return lambda: experts(problem.x_TD, problem.ids_TK, problem.weight_TK)


def loop_fp64(problem: Problem) -> tuple[Tensor, ...]:
    """Output and gradients of the plain loop over experts, in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in problem.leaves]
    x, weight, w1, w2 = leaves
    out = fastexperts.moe_mlp_reference(x, problem.ids_TK, weight, w1, w2)
    return out.detach(), *torch.autograd.grad(out, leaves, problem.dout_TD.double())


def deviations(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """|result - truth| / |truth|, Frobenius, of the output and of each gradient."""
    names = ("out", *GRADIENTS)
    return {name: relative(*pair) for name, *pair in zip(names, results, truth, strict=True)}


def relative(value: Tensor, truth: Tensor) -> float:
    rows = max(1, (1 << 26) // max(1, truth[0].numel()))  # fp64 copies of 64 M elements at a time
    difference = norm = 0.0
    for part, of_truth in zip(value.detach().split(rows), truth.detach().split(rows), strict=True):
        difference += (part.double() - of_truth.double()).square().sum()
        norm += of_truth.double().square().sum()
    return float((difference / norm).sqrt())


def dense_products(shape: Shape, tokens: int, device: str = "cuda") -> dict[str, Callable[[], Tensor]]:
    """The six GEMMs of the same FLOPs over all P rows, plain cuBLAS in bf16: named as the pass that each
    bounds, forward first.
    """
    rows, d, f = tokens * shape.top_k, shape.dim_d, shape.dim_f
    generator = torch.Generator(device).manual_seed(2)
    dims = ((rows, d), (rows, f), (rows, 2 * f), (rows, d), (2 * f, d), (d, f))
    x, h, dy, do, w1, w2 = (_normal(generator, torch.bfloat16, *of) for of in dims)
    return {
        "up": lambda: x @ w1.T,
        "down": lambda: h @ w2.T,
        "dh": lambda: do @ w2,
        "dw2": lambda: do.T @ h,
        "dx": lambda: dy @ w1,
        "dw1": lambda: dy.T @ x,
    }
