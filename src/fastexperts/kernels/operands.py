"""How a matrix reaches a kernel: as a tensor descriptor where the hardware and its strides allow, else as a
pointer.
"""

from __future__ import annotations

import functools
import threading

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastexperts import settings

_thread = threading.local()


def enter_context(device: torch.device) -> None:
    """Make the CUDA context current in this thread, once. Triton encodes descriptors through the driver,
    which finds none in autograd's threads before their first launch ("invalid device context").
    """
    if device.type == "cuda" and not hasattr(_thread, "entered"):
        torch.empty(1, device=device).zero_()
        _thread.entered = True


def operand(tensor: Tensor, block: list[int], parts: int = 1) -> TensorDescriptor | Tensor:
    """`tensor` as a descriptor of `block`, or itself.

    Descriptors need 16-byte bases and strides, the last one 1, and blocks that start on 16 bytes: with
    `parts` side by side in the last dimension, each part too.
    """
    aligned_parts = tensor.shape[-1] // parts * tensor.element_size() % 16 == 0 or parts == 1
    if settings.allow_tma() and has_tma(tensor.device) and describable(tensor) and aligned_parts:
        enter_context(tensor.device)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
    return tensor


def is_descriptor(value: TensorDescriptor | Tensor) -> bool:
    return isinstance(value, TensorDescriptor)


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
    return rows if describable(rows) else rows.contiguous()


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


def accumulator(dtype: torch.dtype) -> triton.language.dtype:
    """fp32 sums, fp64 ones for fp64: the lane that proves formulas."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def precision(dtype: torch.dtype) -> str:
    """Triton's default for an fp32 dot is TF32, which is off by 1e-3 unseen."""
    return "ieee" if dtype in (torch.float32, torch.float64) else "tf32"
