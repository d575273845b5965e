"""One layer of frozen experts with LoRA of both projections, and who can compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peers import PEERS
from problems import Problem, transformers_experts
from torch import Tensor, nn

import fastexperts
from fastexperts.weights import Lora, Weight

TARGETS = ("gate_up_proj", "down_proj")
FACTORS = ("a1", "b1", "a2", "b2")
FROZEN, SPLIT, PEFT, OURS = "frozen", "split", "peft", "fastexperts"
NAMES = (FROZEN, OURS, PEFT, SPLIT)


@dataclass(frozen=True)
class Adapted:
    """A problem whose experts are frozen, and PEFT's adapter of them: W + 2 B A of rank r, nothing zero.

    wrapper: what `get_peft_model` put in the place of the experts. factors: its parameters, in their own
    layout. stacked: the same values as [E, r, in] and [E, out, r] in the dtype of x, leaves of their own.
    """

    problem: Problem
    rank: int
    wrapper: Any
    factors: tuple[Tensor, ...]
    stacked: tuple[Tensor, ...]

    @classmethod
    def make(cls, problem: Problem, rank: int) -> Adapted:
        """By `get_peft_model` with its defaults: factors in fp32 whatever the experts are in."""
        from peft import LoraConfig, get_peft_model

        for w in (problem.w1_EGD, problem.w2_EDF):
            w.requires_grad_(False)
        model, model.mlp = nn.Module(), nn.Module()
        model.mlp.experts = transformers_experts(problem, OURS)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_parameters=[f"mlp.experts.{name}" for name in TARGETS]
        )
        with torch.device(problem.x_TD.device):
            wrapper = get_peft_model(model, config).base_model.model.mlp.experts
        by_name = {m.parameter_name: m for m in wrapper.modules() if hasattr(m, "parameter_name")}
        factors = tuple(
            getattr(by_name[name], which)["default"].weight
            for name in TARGETS
            for which in ("lora_A", "lora_B")
        )
        generator = torch.Generator(problem.x_TD.device).manual_seed(3)
        for factor, scale in zip(factors, (1.0, 0.25, 1.0, 0.25), strict=True):
            fan = rank if scale < 1 else factor.shape[1]
            drawn = torch.randn(factor.shape, generator=generator, device=factor.device)
            # values of the experts' dtype: rounding them is no error of an implementation
            factor.data.copy_(drawn.mul_(scale * fan**-0.5).to(problem.w1_EGD.dtype))
        values = stacked(factors, problem.shape.experts)
        leaves = tuple(t.detach().to(problem.x_TD.dtype).contiguous().requires_grad_() for t in values)
        return cls(problem, rank, wrapper, factors, leaves)

    def frozen(self) -> Tensor:
        """Our layer, no adapter."""
        return self._experts(OURS, self.wrapper.get_base_layer())

    def wrapped(self, implementation: str) -> Tensor:
        """What a model calls: PEFT's wrapper over the experts."""
        return self._experts(implementation, self.wrapper)

    def _experts(self, implementation: str, module: nn.Module) -> Tensor:
        problem = self.problem
        self.wrapper.get_base_layer().config._experts_implementation = implementation
        return module(problem.x_TD, problem.ids_TK, problem.weight_TK)

    def split(self) -> Tensor:
        """Two more grouped GEMMs a projection, x W^T + 2 (x A^T) B^T, on rows sorted by expert."""
        problem = self.problem
        a1, b1, a2, b2 = self.stacked
        tokens, top_k = problem.ids_TK.shape
        pair_of_row = problem.ids_TK.flatten().argsort(stable=True)
        row_of_pair = torch.empty_like(pair_of_row)
        row_of_pair[pair_of_row] = torch.arange(len(pair_of_row), device=pair_of_row.device)
        counts = torch.bincount(problem.ids_TK.flatten(), minlength=problem.shape.experts)
        ends = counts.cumsum(0).to(torch.int32)

        def product(rows: Tensor, w: Tensor) -> Tensor:
            return torch._grouped_mm(rows, w.transpose(1, 2), offs=ends)

        # index_select: its backward adds, that of x[index] sorts first
        x = problem.x_TD.index_select(0, pair_of_row // top_k)
        gate, up = (product(x, problem.w1_EGD) + 2 * product(product(x, a1), b1)).chunk(2, dim=-1)
        a = nn.functional.silu(gate) * up
        y = product(a, problem.w2_EDF) + 2 * product(product(a, a2), b2)
        y = y.index_select(0, row_of_pair).view(tokens, top_k, -1)
        return (y * problem.weight_TK.to(y.dtype)[..., None]).sum(1)

    def folded(self, name: str) -> Tensor:
        """A peer's layer on weights folded as PEFT folds them, W' = W + 2 B A."""
        a1, b1, a2, b2 = self.stacked
        w1 = torch.baddbmm(self.problem.w1_EGD, b1, a1, alpha=2)
        w2 = torch.baddbmm(self.problem.w2_EDF, b2, a2, alpha=2)
        return PEERS[name](replace(self.problem, w1_EGD=w1, w2_EDF=w2))()


@dataclass(frozen=True)
class Contestant:
    """An implementation on an adapted layer."""

    name: str
    adapted: Adapted

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """x, routing weights, and the factors where there are any."""
        problem = self.adapted.problem
        factors = {FROZEN: (), OURS: self.adapted.factors, PEFT: self.adapted.factors}
        return problem.x_TD, problem.weight_TK, *factors.get(self.name, self.adapted.stacked)

    def forward(self) -> Tensor:
        """out, with what backward needs kept."""
        calls: dict[str, Callable[[], Tensor]] = {
            FROZEN: self.adapted.frozen,
            OURS: lambda: self.adapted.wrapped(OURS),
            PEFT: lambda: self.adapted.wrapped("grouped_mm"),
            SPLIT: self.adapted.split,
        }
        return calls.get(self.name, lambda: self.adapted.folded(self.name))()

    def step(self) -> tuple[Tensor, ...]:
        """out and the gradients of the leaves."""
        out_TD = self.forward()
        return out_TD, *torch.autograd.grad(out_TD, self.leaves, self.adapted.problem.dout_TD)

    def results(self) -> tuple[Tensor, ...]:
        """A step's, factors stacked by expert."""
        out_TD, dx, dweight, *dfactors = self.step()
        if self.name in (OURS, PEFT):
            dfactors = stacked(dfactors, self.adapted.problem.shape.experts)
        return out_TD.detach(), dx, dweight, *dfactors


def stacked(factors: tuple[Tensor, ...] | list[Tensor], experts: int) -> list[Tensor]:
    """PEFT's A [E * r, in], by expert, and B [out, r * E], by rank, as [E, r, in] and [E, out, r]."""
    a1, b1, a2, b2 = factors
    return [
        view
        for a, b in ((a1, b1), (a2, b2))
        for view in (a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1))
    ]


def loop_fp64(adapted: Adapted, with_adapter: bool = True) -> tuple[Tensor, ...]:
    """As `Contestant.results`, by a loop over experts in fp64 on folded weights: one expert at a time, so
    that no more than one is in fp64.
    """
    problem = adapted.problem
    x, weight = (t.detach().double().requires_grad_() for t in (problem.x_TD, problem.weight_TK))
    dout_TD, out_TD = problem.dout_TD.double(), torch.zeros_like(x, requires_grad=False)
    grads: list[list[Tensor]] = [[], [], [], []]
    for e in range(problem.shape.experts):
        a1, b1, a2, b2 = (t.detach()[e : e + 1].double().requires_grad_() for t in adapted.stacked)
        w1, w2 = (w.detach()[e : e + 1].double() for w in (problem.w1_EGD, problem.w2_EDF))
        ids_TK = torch.where(problem.ids_TK == e, 0, -1)
        lora1, lora2 = (Lora(a1, b1, 2.0), Lora(a2, b2, 2.0)) if with_adapter else (None, None)
        out = fastexperts.moe_mlp_reference(x, ids_TK, weight, Weight(w1, lora=lora1), Weight(w2, lora=lora2))
        out.backward(dout_TD)
        out_TD += out.detach()
        if with_adapter:
            for of_factor, factor in zip(grads, (a1, b1, a2, b2), strict=True):
                of_factor.append(factor.grad)
    return out_TD, x.grad, weight.grad, *(torch.cat(of_factor) for of_factor in grads if of_factor)
