"""`Weight`: one expert projection of a layer as it is stored, with its bias and what an adapter adds to it
(`Lora`).

Layouts are strides: the ops see every projection as [E, out, in], a view and never a copy, and gradients come
back in the parameter's own layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastexperts.dtypes import DTYPES
from fastexperts.errors import refuse

RANK_STEP = 16  # ranks are padded with zeros to a multiple: what a tensor core contracts at once


@dataclass(frozen=True)
class Lora:
    """A low-rank update of an expert projection: w[e] + scale * b[e] @ a[e], never built.

    a: [E, r, in]. b: [E, out, r], its rows in the order of the stored weight's outputs.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, dims in (("a", "[experts, rank, in]"), ("b", "[experts, out, rank]")):
            factor = getattr(self, name)
            if not isinstance(factor, Tensor) or factor.dim() != 3:
                got = list(factor.shape) if isinstance(factor, Tensor) else type(factor).__name__
                raise refuse("Lora", name, got=got, needs=f"a tensor {dims}", way_out="Stack it by expert.")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise refuse(
                "Lora",
                "scale",
                got=type(self.scale).__name__,
                needs="a number: it gets no gradient",
                way_out="Multiply b by it where it is learned.",
            )
        if self.a.shape[0] != self.b.shape[0] or self.a.shape[1] != self.b.shape[2]:
            raise refuse(
                "Lora",
                "b",
                got=f"[experts, out, rank] {list(self.b.shape)}",
                needs=f"the experts and the rank of a, [experts, rank, in] {list(self.a.shape)}",
                way_out="PEFT stores A by expert and B by rank: take its get_delta_factors.",
            )

    @staticmethod
    def of(updates: Sequence[Lora]) -> Lora:
        """The sum of `updates`: their ranks side by side."""
        if len(updates) == 1:
            return updates[0]
        return Lora(
            torch.cat([update.a for update in updates], dim=1),
            torch.cat([update.scale * update.b for update in updates], dim=2),
        )


class Step(NamedTuple):
    """One more step of a product's contraction: acc += rows_PR @ w^T, w stored like the product's own weight
    with R for the contraction. R is a multiple of RANK_STEP.
    """

    rows_PR: Tensor
    w: Tensor


@dataclass(frozen=True)
class Weight:
    """An expert projection: `w` [E, out, in], or [E, in, out] when `transposed`; `bias` [E, out]; `lora`:
    what is added to w. The outputs of w1 are the columns of h, in the activation's order (`interleaved`).
    """

    w: Tensor
    transposed: bool = False
    bias: Tensor | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.w, Tensor):
            raise refuse(
                "Weight",
                "w",
                got=type(self.w).__name__,
                needs="a torch.Tensor",
                way_out="Convert it with torch.as_tensor.",
            )
        if self.w.dim() != 3:
            raise refuse(
                "Weight",
                "w",
                got=f"{self.w.dim()} dimensions {tuple(self.w.shape)}",
                needs="3 dimensions [experts, out, in]",
                way_out="Stack the experts' matrices along a new first dimension.",
            )
        experts, dim_out, dim_in = self.out_in.shape
        if self.bias is not None:
            self._check("bias", self.bias, (experts, dim_out), "Stack the experts' biases, [E, out].")
        lora: object = self.lora
        if lora is not None and not isinstance(lora, Lora):
            raise refuse(
                "Weight",
                "lora",
                got=type(lora).__name__,
                needs="a fastexperts.Lora",
                way_out="Give Lora(a, b, scale).",
            )
        if self.lora is not None:
            rank, way_out = (
                self.lora.a.shape[1],
                "a is [E, r, in] and b is [E, out, r], r >= 1, also for a transposed weight.",
            )
            self._check("lora.a", self.lora.a, (experts, max(1, rank), dim_in), way_out)
            self._check("lora.b", self.lora.b, (experts, dim_out, rank), way_out)

    def _check(self, name: str, tensor: object, shape: tuple[int, ...], way_out: str) -> None:
        """Raise unless `tensor` belongs to a weight of these dims: kernels index both alike."""
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise refuse(
                "Weight",
                name,
                got=list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__,
                needs=f"{list(shape)}, as w is {list(self.out_in.shape)} as [E, out, in]",
                way_out=way_out,
            )
        if tensor.device != self.w.device or tensor.dtype not in DTYPES:
            raise refuse(
                "Weight",
                name,
                got=f"{tensor.dtype} on {tensor.device}",
                needs=f"one of {', '.join(map(str, DTYPES))} on {self.w.device}, as w",
                way_out="Move or cast it with .to(...).",
            )

    @property
    def out_in(self) -> Tensor:
        """The [E, out, in] view."""
        return self.w.transpose(1, 2) if self.transposed else self.w


def as_weight(w: Tensor | Weight) -> Weight:
    """A `Weight` as it is, or a tensor in the canonical layout as one."""
    return w if isinstance(w, Weight) else Weight(w)
