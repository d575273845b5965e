"""How a matrix reaches a kernel: as a tensor descriptor where the hardware and its strides allow, else as a
pointer.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastexperts import settings
from fastexperts.kernels.launch import Described


def operand(tensor: Tensor, block: list[int]) -> Described | None:
    """How tensors laid out like this one reach a kernel: as descriptors of `block`, or (None) as pointers.

    Descriptors need 16-byte bases and strides, the last one 1.
    """
    if settings.allow_tma() and has_tma(tensor.device) and describable(tensor):
        return Described(TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block))
    return None


def describable(tensor: Tensor) -> bool:
    """Whether the copy engine takes its base and strides."""
    *outer, last = tensor.stride()
    size = tensor.element_size()
    return (
        tensor.numel() > 0
        and last == 1
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * size % 16 == 0 for s in outer)
    )


def packed(rows: Tensor) -> Tensor:
    """`rows`, or a contiguous copy where the copy engine or 16-byte copies would not take them."""
    return rows if rows.is_contiguous() or describable(rows) else rows.contiguous()


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether `device` loads through tensor descriptors: Hopper and later, and Triton's interpreter."""
    if device.type == "cpu":
        return True
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 3 for the interpreter, so that persistent loops run more than once there."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def tl_accumulator(dtype: torch.dtype) -> triton.language.dtype:
    """fp32 sums, fp64 ones for fp64: the lane that proves formulas."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def precision(dtype: torch.dtype) -> str:
    """Triton's default for an fp32 dot is TF32, which is off by 1e-3 unseen."""
    return "ieee" if dtype in (torch.float32, torch.float64) else "tf32"
