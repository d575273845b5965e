"""What runs and what is touched: spies on operators, backends and operands, and poisoned memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def use_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CPU tensors run through the Triton kernels."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("runs in Triton's interpreter; on a machine with a GPU set TRITON_INTERPRET=1")
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "triton")


class Ops(TorchDispatchMode):
    """Names of the operators dispatched inside, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def spy_backend() -> Iterator[list[tuple[str, str, Any]]]:
    """(backend module, function, result) of each primitive that runs inside, also inside of ops."""
    from fastexperts import backend

    calls: list[tuple[str, str, Any]] = []
    original = backend.load

    def load(device: torch.device) -> SimpleNamespace:
        module = original(device)
        where = module.__name__.rpartition(".")[2]

        def recorded(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                result = getattr(module, name)(*args, **kwargs)
                calls.append((where, name, result))
                return result

            return call

        computing = {name: recorded(name) for name in module.__all__ if name != "block_m"}
        return SimpleNamespace(block_m=module.block_m, **computing)

    with mock.patch.object(backend, "load", load):
        yield calls


@contextlib.contextmanager
def spy_operands() -> Iterator[list[tuple[str, str]]]:
    """("rows" or "weight", "descriptor" or "pointer") of each operand of a grouped GEMM that is planned
    inside, where nothing was planned before; ("all", "ring") of one for Hopper.
    """
    from fastexperts.kernels import grouped_dw, grouped_mm, hopper_dw, hopper_mm, launch, operands

    seen: list[tuple[str, str]] = []

    def operand(tensor: Tensor, *args: Any) -> Any:
        view = operands.operand(tensor, *args)
        seen.append(("rows" if tensor.dim() == 2 else "weight", "descriptor" if view else "pointer"))
        return view

    def ring(plan: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen.append(("all", "ring"))
            return plan(*args, **kwargs)

        return recorded

    with (
        launch.forgotten(),
        mock.patch.object(grouped_mm, "operand", operand),
        mock.patch.object(grouped_dw, "operand", operand),
        mock.patch.object(hopper_mm, "plan", ring(hopper_mm.plan)),
        mock.patch.object(hopper_dw, "plan", ring(hopper_dw.plan)),
    ):
        yield seen


# Poison: memory that nobody wrote is NaN, and so is what lies beside it.

_GUARD = 64  # elements; keeps the 16-byte alignment of every dtype
_NAN = {8: 0x7FF8_0000_0000_BEEF, 4: 0x7FC0_BEEF, 2: 0x7FEF}
_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_UNWRITTEN_INT = -7


def _poisoned(like: Tensor) -> tuple[Tensor, Tensor]:
    """(a tensor of the shape and strides of `like`, its whole memory as integers), all of it poison."""
    size = like.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    fill = _NAN[size] if like.is_floating_point() else _UNWRITTEN_INT
    memory = torch.full((span + 2 * _GUARD,), fill, dtype=_INTEGER[size])
    return memory.view(like.dtype).as_strided(like.shape, like.stride(), _GUARD), memory


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose surroundings are NaN: a read beside it shows."""
    if tensor.device.type != "cpu":
        return tensor
    return _poisoned(tensor)[0].copy_(tensor)


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """What torch.empty, empty_like and new_empty give inside is poison; no guard is overwritten."""
    bands: list[Tensor] = []

    def poisoning(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            plain = original(*args, **kwargs)
            if type(plain) is not Tensor or plain.device.type != "cpu" or plain.element_size() not in _NAN:
                return plain
            tensor, memory = _poisoned(plain)
            bands.extend((memory[:_GUARD], memory[-_GUARD:]))
            return tensor

        return allocate

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield
    assert bands, "nothing was allocated"
    for band in bands:
        poisons = (_NAN[band.element_size()], _UNWRITTEN_INT)
        assert any(bool((band == fill).all()) for fill in poisons), "a kernel wrote beside its output"
