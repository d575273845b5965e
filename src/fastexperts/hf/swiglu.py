"""Dense MLPs (shared experts too) that compute down(silu(gate(x)) * up(x)), with Liger's product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastexperts.activations import SWIGLU
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import liger
from fastexperts.hf.gate import activation_of
from fastexperts.hf.inventory import label_of

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SwigluForward(liger.Forward):
    """The three projections of the module, whatever wraps them, with Liger's product between them."""

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return self.stock(x)
        module = self.module
        return module.down_proj(liger.silu_mul(module.gate_proj(x), module.up_proj(x)))

    def __str__(self) -> str:
        return "Liger SwiGLU"


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of the MLPs with a gate."""
    return {name: module for name, module in model.named_modules() if _has_projections(module)}


def _has_projections(module: nn.Module) -> bool:
    return all(name in module._modules for name in PROJECTIONS)


def forward_of(module: Any, where: str) -> SwigluForward:
    """Liger's forward for `module`; raises FastexpertsError if it computes something else."""
    cls = type(module).__name__
    if liger.is_patched(module):
        got = "a forward put on the instance"
    else:
        try:
            activation = activation_of(_Gate(module))
        except FastexpertsError as e:
            raise _refusal(cls, "a function of gate and up that fastexperts does not know") from e
        if activation == SWIGLU:
            return SwigluForward(module, where)
        got = f"the activation {label_of(activation)}"
    raise _refusal(cls, got)


class _Gate:
    """The MLP to `gate`, which finds activations: its own forward, whose projections pass their halves on."""

    has_gate = is_concatenated = True

    def __init__(self, module: Any) -> None:
        self.module = module
        self.gate_proj = lambda h_PG: h_PG.chunk(2, dim=-1)[0]
        self.up_proj = lambda h_PG: h_PG.chunk(2, dim=-1)[1]
        self.down_proj = lambda a_PF: a_PF

    def _apply_gate(self, h_PG: Tensor) -> Tensor:
        return type(self.module).forward(self, h_PG)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _refusal(cls: str, got: str) -> FastexpertsError:
    return refuse(
        cls,
        "forward",
        got=got,
        needs="down_proj(silu(gate_proj(x)) * up_proj(x)) and nothing else",
        way_out="It keeps the forward of its class.",
    )
