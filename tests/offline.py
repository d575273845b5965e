"""Compiles kernels for GPUs that are not here: every launch inside `offline(arch)` compiles and does not run.

For the compiler's verdict (it compiles, registers, spills, shared memory) without a card. Not under
TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Driver:
    """What JITFunction.run asks of a driver when it only compiles."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def offline(arch: int, hopper: bool = False) -> Iterator[list[tuple[str, Any]]]:
    """Yield the list of (kernel name, compiled kernel) that fills as launches are made with CPU or meta
    tensors; through the kernels for Hopper or not.
    """
    from fastexperts.kernels import (
        grouped_dw,
        grouped_mm,
        hopper_dw,
        hopper_mm,
        launch,
        operands,
        ring,
        tiles,
    )

    compiled: list[tuple[str, Any]] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    def key(device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
        return ("gpu" if dtype.itemsize > 2 else f"sm{arch}", dtype.itemsize)

    with (
        launch.forgotten(),
        mock.patch.object(launch.Plan, "again", lambda plan, grid, arguments: plan.first(grid, arguments)),
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "_key", key),
        mock.patch.object(operands, "has_tma", return_value=arch >= 90),
        mock.patch.object(grouped_mm, "processors", return_value=132),
        mock.patch.object(grouped_dw, "processors", return_value=132),
        mock.patch.object(hopper_mm, "processors", return_value=132),
        mock.patch.object(hopper_dw, "processors", return_value=132),
        mock.patch.object(ring, "_is_hopper", return_value=hopper),
    ):
        yield compiled
