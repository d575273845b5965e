"""The forward of a class beside ours, on a few tokens: what no flag, name or gate says shows in numbers, of
the output and of the gradients of tokens and routing weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastexperts.dtypes import DTYPES
from fastexperts.errors import FastexpertsError, refuse

TOKENS = 4
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}  # of the relative error; some classes compute in fp32
ROUGH = 2e-2  # in bf16 and fp16


def has_data(module: nn.Module) -> bool:
    """Whether every parameter of `module` is here and plain: not on the meta device, sharded or quantised."""
    return all(
        p.numel() and p.dtype in DTYPES and not p.is_meta and not is_traceable_wrapper_subclass(p)
        for p in module.parameters()
    )


def check_same(
    module: nn.Module,
    theirs: Callable[..., Any],
    ours: Callable[..., Any],
    *,
    hidden: int,
    ids: int | None,
    way_out: str,
) -> None:
    """Raise FastexpertsError unless two forwards of `module`, which has data, and their gradients agree on a
    few tokens.

    Args:
        hidden: the width of the tokens.
        ids: how many experts a router may name, where the forwards take tokens, ids and weights; None where
            they take hidden states [1, T, hidden] alone.

    Weights that are not finite prove nothing, and pass.
    """
    like = next(module.parameters())
    if like.is_inference():
        raise refuse(
            type(module).__name__,
            "forward",
            got="parameters made under torch.inference_mode(), which no gradient can pass",
            needs="parameters that can be trained",
            way_out="Load the model outside of torch.inference_mode(); its forward may run inside.",
        )
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        x_TD = torch.randn(TOKENS, hidden, generator=generator).to(like)
        score_TE = torch.rand(TOKENS, ids or 1, generator=generator).to(like)
    inputs: tuple[Tensor, ...] = (x_TD[None],)
    if ids is not None:
        weight_TK, ids_TK = score_TE.topk(min(3, ids))
        inputs = (x_TD, ids_TK, weight_TK)
    try:
        with _frozen(module), torch.autocast(like.device.type, enabled=False):
            wanted, got = (_results(forward, inputs) for forward in (theirs, ours))
    except FastexpertsError:
        raise
    except Exception as e:
        raise refuse(
            type(module).__name__,
            "forward",
            got=f"{type(e).__name__} ({e}) on {TOKENS} tokens",
            needs="the arguments and the output of the class that fastexperts knows",
            way_out=way_out,
        ) from e
    tolerance = TOLERANCE.get(like.dtype, ROUGH)
    if not all(tensor.isfinite().all() for tensor in wanted.values()):
        return
    for what, tensor in wanted.items():
        if not _close(got[what], tensor, tolerance):
            raise refuse(
                type(module).__name__,
                "forward",
                got=f"one whose {what} on {TOKENS} tokens is not that of fastexperts",
                needs=f"a relative error of {tolerance} at most: the class, or a patch of it, computes more "
                "than weights, gate and flags say",
                way_out=way_out,
            )


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient inside, and tensors may, whatever the caller has set."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _results(forward: Callable[..., Any], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output of `forward` and the gradients of its floating inputs."""
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = forward(*leaves)
    out = (output[0] if isinstance(output, tuple) else output).double()
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    names = ("gradient of the tokens", "gradient of the routing weights")
    grads = torch.autograd.grad(out, floating, dout)
    return {"output": out.detach(), **{n: g.double() for n, g in zip(names, grads, strict=False)}}


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return got.shape == wanted.shape and bool((got - wanted).norm() <= tolerance * wanted.norm())
