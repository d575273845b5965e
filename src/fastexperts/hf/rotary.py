"""Attention whose rotary embedding Liger's kernel computes, found by comparing numbers.

Attention calls its rotation as a global of its modeling file, which is another to the instance (scoped.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import liger
from fastexperts.hf.scoped import ScopedForward, globals_of

ROTATION = re.compile(r"apply_\w*rotary\w*")
TOLERANCE = 1e-5
POSITIONS, HEADS, HEAD_DIM = 5, (4, 2), 16  # of the comparison; HEADS of queries and of keys


@dataclass(frozen=True)
class Rotation:
    """A modeling file's rotation of (q, k) by tables (cos, sin), and Liger's wherever it is the same.

    once: a table has a column for two dims of a head (the second half of the usual one repeats the first).
    partial: a table narrower than a head rotates its first dims.
    """

    theirs: Callable[..., Any]
    where: str
    once: bool
    partial: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._takes(*args, **kwargs):
            return self.theirs(*args, **kwargs)
        q, k, cos, sin = args
        rotary_dim = cos.shape[-1] * (2 if self.once else 1)
        return liger.rope(liger.promoted(q, cos), liger.promoted(k, cos), cos, sin, rotary_dim)

    def __str__(self) -> str:
        return "Liger rotary embedding"

    def _takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether these are q, k [B, H, S, d], cos and sin [B, S, *] of what was compared, on the device."""
        if len(args) != 4 or kwargs not in ({}, {"unsqueeze_dim": 1}):
            return False
        q, k, cos, _ = args
        rotary_dim, head_dim = cos.shape[-1] * (2 if self.once else 1), q.shape[-1]
        dims = q.dim() == k.dim() == 4 and cos.dim() == 3 and k.shape[-1] == head_dim
        width = rotary_dim == head_dim or (self.partial and rotary_dim < head_dim)
        return (
            dims and width and q.device.type == self.where and q.dtype == k.dtype and q.dtype in liger.DTYPES
        )


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of those whose forward calls a rotation by its name."""
    return {name: module for name, module in model.named_modules() if _rotations(module)}


def _rotations(module: Any) -> dict[str, Any]:
    """The rotations among the globals that the forward of the class of `module` reads."""
    return {name: value for name, value in globals_of(module).items() if ROTATION.fullmatch(name)}


def forward_of(module: Any, where: str) -> ScopedForward:
    """Liger's rotation for the attention `module`; raises FastexpertsError if its own is another."""
    cls, rotations = type(module).__name__, _rotations(module)
    if liger.is_patched(module):
        raise _refusal(cls, "a forward put on the instance")
    if len(rotations) != 1:
        raise _refusal(cls, f"several rotations to choose from: {', '.join(rotations)}")
    ((name, theirs),) = rotations.items()
    # The tables of a whole head and of half of one; then those of half the columns.
    whole, half = (_same(theirs, width, width) for width in (HEAD_DIM, HEAD_DIM // 2))
    once = not half and _same(theirs, HEAD_DIM // 2, HEAD_DIM)
    if not (whole or once):
        raise _refusal(cls, f"{name}, which rotates otherwise")
    return ScopedForward(module, where, {name: Rotation(theirs, where, once, partial=half)})


def _same(theirs: Callable[..., Any], width: int, rotary_dim: int) -> bool:
    """Whether `theirs`, by tables of `width` columns, rotates as `_formula` does, in values and gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        q, k = (draw(1, heads, POSITIONS, HEAD_DIM) for heads in HEADS)
        angle = draw(1, POSITIONS, rotary_dim // 2).repeat(1, 1, 2)[..., :width]
        tables = 1.5 * angle.cos(), 1.5 * angle.sin()  # some families scale them
        with torch.autocast("cpu", enabled=False):
            got = _with_gradients(lambda *heads: [_formula(h, *tables, rotary_dim) for h in heads], q, k)
            try:
                wanted = _with_gradients(lambda *heads: theirs(*heads, *tables), q, k)
            except Exception:  # noqa: BLE001 - what takes other arguments rotates otherwise
                return False
    pairs = zip(got, wanted, strict=False)
    return all(a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)


def _formula(heads: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """What Liger's kernel computes: the first half of the rotated dims against the second."""
    half = rotary_dim // 2
    cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]
    first, second, rest = heads[..., :half], heads[..., half:rotary_dim], heads[..., rotary_dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _with_gradients(rotate: Callable[..., Any], q: Tensor, k: Tensor) -> list[Tensor]:
    leaves = [heads.clone().requires_grad_() for heads in (q, k)]
    out = list(rotate(*leaves))
    douts = [torch.linspace(-1, 1, heads.numel()).view(heads.shape) for heads in out]
    return [*(heads.detach() for heads in out), *torch.autograd.grad(out, leaves, douts)]


def _refusal(cls: str, got: str) -> FastexpertsError:
    return refuse(
        cls,
        "forward",
        got=got,
        needs="one rotation of q and k by halves, over the first dims of each head",
        way_out="It keeps the forward of its class.",
    )
