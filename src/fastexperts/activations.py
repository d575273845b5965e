"""Activations of an expert as data: one formula, its rows, and the derivative.

    gated      a = f(min(g, limit)) * (clamp(u, -limit, limit) + up_shift)      h = [g, u]
    non-gated  a = f(min(g, limit))                                             h = g

`f` is one of `FUNCTIONS`. The Triton kernels read the same fields (kernels/activation.py), so that a new
gate is a new row here and not a new kernel. A clamp passes the gradient where its input lies inside, bounds
included, as `torch.clamp` does.

Legend: P rows, F expert intermediate dim, G columns of h (2F gated, F otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastexperts.errors import refuse

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _silu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * x)
    return x * s, s * (1 + alpha * x * (1 - s))


def _gelu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    t = torch.tanh(_SQRT_2_OVER_PI * (x + _GELU_CUBIC * x**3))
    slope = _SQRT_2_OVER_PI * (1 + 3 * _GELU_CUBIC * x * x)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


def _relu(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu2(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r = torch.relu(x)
    return r * r, 2 * r


FUNCTIONS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
}
"""name -> (x, alpha) -> (f(x), f'(x)); only silu reads alpha: x * sigmoid(alpha * x)."""


@dataclass(frozen=True)
class Activation:
    """One row: which `f`, gated or not, and its constants."""

    fn: str
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    up_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.fn not in list(FUNCTIONS):  # a list: what has no hash is refused like any other
            raise refuse(
                "Activation",
                "fn",
                got=repr(self.fn),
                needs=f"one of {', '.join(FUNCTIONS)}",
                way_out="Add a row to fastexperts.activations.FUNCTIONS and kernels/activation.py.",
            )
        if not self.limit > 0:
            raise refuse(
                "Activation",
                "limit",
                got=self.limit,
                needs="a positive number",
                way_out="Use inf for no clamp.",
            )
        if self.alpha != 1.0 and self.fn != "silu":
            raise refuse(
                "Activation",
                "alpha",
                got=self.alpha,
                needs=f"1.0 for {self.fn}",
                way_out="Only silu is scaled.",
            )

    @property
    def parts(self) -> int:
        """Projections that h holds side by side: 2 (gate, up) or 1."""
        return 2 if self.gated else 1

    @property
    def params(self) -> list[float]:
        """The floats as they travel through the ops' schema: [alpha, limit, up_shift]."""
        return [self.alpha, self.limit, self.up_shift]

    @staticmethod
    def of(fn: str, gated: bool, params: list[float]) -> Activation:
        """The inverse of (`fn`, `gated`, `params`)."""
        return Activation(fn, gated, *params)

    def forward(self, h_PG: Tensor) -> Tensor:
        """a_PF, in the dtype of `h_PG`. Plain differentiable PyTorch."""
        if not self.gated:
            return FUNCTIONS[self.fn](h_PG.clamp(max=self.limit), self.alpha)[0]
        g_PF, u_PF = h_PG.chunk(2, dim=-1)
        f_PF, _ = FUNCTIONS[self.fn](g_PF.clamp(max=self.limit), self.alpha)
        return f_PF * (u_PF.clamp(-self.limit, self.limit) + self.up_shift)

    def vjp(self, h_PG: Tensor, da_PF: Tensor) -> tuple[Tensor, Tensor]:
        """(a_PF, dh_PG): the activation recomputed from h, and the gradient of h."""
        g_PF, *rest = h_PG.chunk(self.parts, dim=-1)
        f_PF, df_PF = FUNCTIONS[self.fn](g_PF.clamp(max=self.limit), self.alpha)
        df_PF = df_PF * (g_PF <= self.limit)
        if not self.gated:
            return f_PF, da_PF * df_PF
        (u_PF,) = rest
        up_PF = u_PF.clamp(-self.limit, self.limit) + self.up_shift
        dg_PF, du_PF = da_PF * up_PF * df_PF, da_PF * f_PF * (u_PF.abs() <= self.limit)
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
"""Names accepted wherever an `Activation` is; clamped gates are `dataclasses.replace(SWIGLU, limit=...)`."""


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
            way_out="Other gates are Activation(fn=..., gated=..., alpha=..., limit=..., up_shift=...).",
        )
    return ACTIVATIONS[activation]
