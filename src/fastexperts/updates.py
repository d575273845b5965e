"""`Update`: a `Lora` in a layer that computes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastexperts import backend
from fastexperts.weights import RANK_STEP, Lora


@dataclass(frozen=True)
class Update:
    """`stored`, and its factors as kernels read them, made when they are first asked for: in `dtype`, ranks
    padded to R, columns adjacent, the scale in `a`.
    """

    stored: Lora
    dtype: torch.dtype

    @functools.cached_property
    def _packed(self) -> tuple[Tensor, Tensor]:
        a, b, scale = self.stored.a, self.stored.b, self.stored.scale
        return backend.load(a.device).pack(a, b, scale, padded(a.shape[1]), self.dtype)

    @property
    def a(self) -> Tensor:
        """[E, R, in]"""
        return self._packed[0]

    @property
    def b(self) -> Tensor:
        """[E, out, R]"""
        return self._packed[1]


def padded(rank: int) -> int:
    """The columns that `rank` takes in kernels."""
    return rank + -rank % RANK_STEP
