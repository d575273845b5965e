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
    """`stored`, and its factors as kernels read them, each made when it is first asked for: in `dtype`, ranks
    padded to R, columns adjacent, the scale in `a`.
    """

    stored: Lora
    dtype: torch.dtype

    @functools.cached_property
    def a(self) -> Tensor:
        """[E, R, in]"""
        factor = self.stored.a
        experts, rank, dim_in = factor.shape
        return self._copy(factor, (experts, padded(rank), dim_in), self.stored.scale)

    @functools.cached_property
    def b(self) -> Tensor:
        """[E, out, R]"""
        factor = self.stored.b
        experts, dim_out, rank = factor.shape
        return self._copy(factor, (experts, dim_out, padded(rank)))

    def _copy(self, factor: Tensor, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        out = factor.new_empty(shape, dtype=self.dtype)
        return backend.load(factor.device).copy_scaled(factor, out, scale)


def padded(rank: int) -> int:
    """The columns that `rank` takes in kernels."""
    return rank + -rank % RANK_STEP
