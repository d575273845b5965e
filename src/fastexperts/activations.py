"""Activations of an expert as data: one formula, its rows, and the derivative.

    gated      a = f(min(g, limit)) * (cap(clamp(u, -limit, limit), up_cap) + up_shift)      h = [g, u]
    non-gated  a = f(min(g, limit))                                                          h = g

`f` is one of `FUNCTIONS`, cap(x, c) = c tanh(x / c). The Triton kernels read the same fields
(kernels/activation.py), so that a new gate is a new row here and not a new kernel. A clamp passes the
gradient where its input lies inside, bounds included, as `torch.clamp` does.

Legend: P rows, F expert intermediate dim, G columns of h (2F gated, F otherwise).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastexperts.errors import refuse

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def capped(x: Tensor, cap: float) -> tuple[Tensor, Tensor | float]:
    """(cap * tanh(x / cap), its derivative), or x and 1 for an infinite cap."""
    if math.isinf(cap):
        return x, 1.0
    t = torch.tanh(x / cap)
    return cap * t, 1 - t * t


def _silu(x: Tensor, alpha: float, cap: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * x)
    linear, slope = capped(x, cap)
    return linear * s, s * (slope + alpha * linear * (1 - s))


def _gelu(x: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    t = torch.tanh(_SQRT_2_OVER_PI * (x + _GELU_CUBIC * x**3))
    slope = _SQRT_2_OVER_PI * (1 + 3 * _GELU_CUBIC * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


def _relu(x: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu2(x: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    r = torch.relu(x)
    return r * r, 2 * r


FUNCTIONS: dict[str, Callable[[Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}
"""name -> (x, alpha, cap) -> (f(x), f'(x)); only silu reads them: cap(x) * sigmoid(alpha * x)."""


@dataclass(frozen=True)
class Activation:
    """One row: which `f`, gated or not, its constants, and how gate and up share the columns of h."""

    fn: str
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    up_shift: float = 0.0
    gate_cap: float = math.inf
    up_cap: float = math.inf
    interleaved: bool = False
    """h, and so the rows of w1 and its bias, alternate: g0 u0 g1 u1 ... Otherwise all gates come first."""

    def __post_init__(self) -> None:
        if self.fn not in list(FUNCTIONS):  # a list: what has no hash is refused like any other
            raise refuse(
                "Activation",
                "fn",
                got=repr(self.fn),
                needs=f"one of {', '.join(FUNCTIONS)}",
                way_out="Add a row to fastexperts.activations.FUNCTIONS and kernels/activation.py.",
            )
        for name in ("alpha", "limit", "up_shift", "gate_cap", "up_cap"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise refuse(
                    "Activation",
                    name,
                    got=repr(value),
                    needs="a number",
                    way_out="Leave it out for none.",
                )
        for name in ("limit", "gate_cap", "up_cap"):
            if not getattr(self, name) > 0:
                raise refuse(
                    "Activation",
                    name,
                    got=getattr(self, name),
                    needs="a positive number",
                    way_out="Use inf for no bound.",
                )
        for name, neutral in (("alpha", 1.0), ("gate_cap", math.inf)):
            if getattr(self, name) != neutral and self.fn != "silu":
                raise refuse(
                    "Activation",
                    name,
                    got=getattr(self, name),
                    needs=f"{neutral} for {self.fn}",
                    way_out="Only silu is scaled and capped.",
                )
        for name, neutral in (("up_shift", 0.0), ("up_cap", math.inf), ("interleaved", False)):
            if getattr(self, name) != neutral and not self.gated:
                raise refuse(
                    "Activation",
                    name,
                    got=getattr(self, name),
                    needs=f"{neutral} without a gate",
                    way_out="It is about the up projection beside a gate.",
                )

    @property
    def parts(self) -> int:
        """Projections that h holds side by side: 2 (gate, up) or 1."""
        return 2 if self.gated else 1

    @property
    def params(self) -> tuple[float, ...]:
        """The fields behind `fn` as they travel through the ops' schema."""
        bounds = (self.limit, self.up_shift, self.gate_cap, self.up_cap)
        return (float(self.gated), self.alpha, *bounds, float(self.interleaved))

    @staticmethod
    @functools.cache
    def of(fn: str, params: tuple[float, ...]) -> Activation:
        """The inverse of (`fn`, `params`)."""
        gated, alpha, limit, up_shift, gate_cap, up_cap, interleaved = params
        return Activation(fn, bool(gated), alpha, limit, up_shift, gate_cap, up_cap, bool(interleaved))

    def split(self, h_PG: Tensor) -> tuple[Tensor, Tensor]:
        """Views (g_PF, u_PF) of a gated h."""
        if self.interleaved:
            return h_PG[..., ::2], h_PG[..., 1::2]
        g_PF, u_PF = h_PG.chunk(2, dim=-1)
        return g_PF, u_PF

    def forward(self, h_PG: Tensor) -> Tensor:
        """a_PF, in the dtype of `h_PG`. Plain differentiable PyTorch."""
        g_PF, u_PF = self.split(h_PG) if self.gated else (h_PG, None)
        f_PF, _ = FUNCTIONS[self.fn](g_PF.clamp(max=self.limit), self.alpha, self.gate_cap)
        if u_PF is None:
            return f_PF
        up_PF, _ = capped(u_PF.clamp(-self.limit, self.limit), self.up_cap)
        return f_PF * (up_PF + self.up_shift)

    def vjp(self, h_PG: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor]:
        """(a_PF, dh_PG): the activation recomputed from h, and the gradient of h."""
        g_PF, u_PF = self.split(h_PG) if self.gated else (h_PG, None)
        f_PF, df_PF = FUNCTIONS[self.fn](g_PF.clamp(max=self.limit), self.alpha, self.gate_cap)
        df_PF = df_PF * (g_PF <= self.limit)
        if u_PF is None:
            return f_PF, da_PF * df_PF
        up_PF, dup_PF = capped(u_PF.clamp(-self.limit, self.limit), self.up_cap)
        up_PF = up_PF + self.up_shift
        dg_PF = da_PF * up_PF * df_PF
        du_PF = da_PF * f_PF * dup_PF * (u_PF.abs() <= self.limit)
        if self.interleaved:
            return f_PF * up_PF, torch.stack([dg_PF, du_PF], dim=-1).flatten(-2)
        return f_PF * up_PF, torch.cat([dg_PF, du_PF], dim=-1)


SWIGLU = Activation("silu")
GEGLU = Activation("gelu")
GEGLU_TANH = Activation("gelu_tanh")
REGLU = Activation("relu")
GPT_OSS = Activation("silu", alpha=1.702, limit=7.0, up_shift=1.0)
RELU2 = Activation("relu2", gated=False)

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": SWIGLU,
    "geglu": GEGLU,
    "geglu_tanh": GEGLU_TANH,
    "reglu": REGLU,
    "gpt_oss": GPT_OSS,
    "relu2": RELU2,
    "silu": Activation("silu", gated=False),
    "gelu": Activation("gelu", gated=False),
    "gelu_tanh": Activation("gelu_tanh", gated=False),
}
"""Names accepted wherever an `Activation` is; other rows are `dataclasses.replace(SWIGLU, limit=...)`."""


def resolve(activation: object, where: str) -> Activation:
    """The `Activation` meant by a name or by itself."""
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise refuse(
            where,
            "activation",
            got=repr(activation),
            needs=f"an Activation or one of {', '.join(ACTIVATIONS)}",
            way_out="Other gates are Activation(fn=..., gated=..., alpha=..., limit=..., ...).",
        )
    return ACTIVATIONS[activation]
