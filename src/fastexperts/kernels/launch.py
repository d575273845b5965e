"""Launches, planned once: what a launch is, but for its tensors' addresses and numbers of rows, follows from
their layouts, and a `Plan` holds it.

Triton works out from all arguments of every launch which compiled kernel they need: on the H100's host more
time than a small kernel runs (docs/log.md). A plan asks it once.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastexperts import settings

R = TypeVar("R")
FAR = 1 << 30  # more rows than the ring's descriptors reach
View = Callable[[Tensor], Any]  # how a tensor becomes an argument of a kernel

_every_made: list[dict[Any, Any]] = []  # the caches of `planned`, for `forgotten`


@dataclass
class Plan:
    """A launch of `kernel`, whose arguments are tensors, `scalars`, then whatever varies, then `constants`.

    views: per tensor, what makes it an argument; None passes it as a pointer.
    blocks: of the output, per row tile or in all; the caller makes a grid of it.
    """

    kernel: JITFunction
    views: tuple[View | None, ...]
    scalars: tuple[int, ...]
    constants: dict[str, Any]
    blocks: int = 1
    most_programs: int = 0  # 0: as many as there are blocks
    warps: int = 4
    stages: int = 3
    _compiled: Any = field(default=None, repr=False)

    def programs(self, row_tiles: int = 1) -> int:
        blocks = row_tiles * self.blocks
        return min(blocks, self.most_programs or blocks)

    def __call__(self, grid: tuple[int, ...], tensors: tuple[Tensor, ...], *varying: int) -> None:
        """tensors: in the order of the kernel's arguments. varying: integers that the kernel does not
        specialise on.
        """
        if 0 in grid:
            return
        enter_context(tensors[0].device)
        views = zip(tensors, self.views, strict=True)
        arguments = (*[view(t) if view else t for t, view in views], *self.scalars, *varying)
        (self.again if self._compiled else self.first)(grid, arguments)

    def first(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        # the interpreter compiles nothing and returns None
        self._compiled = self.kernel[grid](
            *arguments, **self.constants, num_warps=self.warps, num_stages=self.stages
        )

    def again(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        compiled, size = self._compiled, (*grid, 1, 1)[:3]
        before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # chains of hooks, as profilers have them, or whatever somebody has set in their place
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            compiled[size](*arguments, *self.constants.values())
            return
        # the same call without metadata and hooks: less of the host's time
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        handles = compiled.function, compiled.packed_metadata
        compiled.run(*size, stream, *handles, None, None, None, *arguments, *self.constants.values())


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """`make(*tensors, **options)`, called once for all tensors that differ in addresses alone, and matrices
    and vectors in their numbers of rows (on one side of `FAR`): what it returns may depend on anything else
    of theirs.
    """
    made: dict[object, R] = {}
    _every_made.append(made)

    @functools.wraps(make)
    def find(*tensors: Tensor | None, **options: Any) -> R:
        key = (*[t if t is None else _layout(t) for t in tensors], *options.values(), settings.allow_tma())
        if key not in made:
            made[key] = make(*tensors, **options)
        return made[key]

    return find


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Everything is planned anew inside, and again afterwards: for tools that change tiles."""
    for made in _every_made:
        made.clear()
    try:
        yield
    finally:
        for made in _every_made:
            made.clear()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    dims: tuple[Any, ...] = tensor.shape
    if len(dims) <= 2:
        rows, *others = dims
        dims = (*others, rows > 0, rows > FAR)
    return dims, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, tensor.device


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`. triton.cdiv takes 5 us of the host."""
    return -(-size // block)


class Described:
    """The `View` that makes a tensor descriptor: `like` this one, of another tensor.

    ragged: the rows are no bound of it, so that their number does not matter.
    """

    def __init__(self, like: TensorDescriptor, ragged: bool = False) -> None:
        self._type = type(like)
        self._ragged = ragged
        self._fields = {**vars(like), "base": None}

    def __call__(self, tensor: Tensor) -> TensorDescriptor:
        # not by its constructor, whose checks hold for the first one and cost as much as the launch
        descriptor = object.__new__(self._type)
        vars(descriptor).update(self._fields, base=tensor)
        if not self._ragged:
            descriptor.shape = [tensor.shape[0], *descriptor.shape[1:]]  # not len(), a function in Python
        return descriptor


_thread = threading.local()


def enter_context(device: torch.device) -> None:
    """Make the CUDA context of `device` current in this thread, once. Triton encodes descriptors through
    the driver, which finds none in autograd's threads before their first launch ("invalid device context").
    """
    if device.type == "cuda" and getattr(_thread, "entered", None) != device:
        torch.empty(1, device=device).zero_()
        _thread.entered = device
