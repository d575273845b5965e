"""The dtypes that fastexperts computes in, and what each is accumulated in."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
