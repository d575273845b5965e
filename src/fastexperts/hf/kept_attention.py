"""Attention whose output a checkpoint keeps: computed again are the projections, not the products of queries
with keys.

PyTorch's sdpa is one function of which autograd sees one node; what that node keeps lies below autograd. The
same kernels are called here with a node of our own, which asks `ops.through_of` for their results as our
layer does. The kernel is PyTorch's choice; calls that none of `KERNELS` takes run as always, again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fastexperts.ops import Results, through_of

ATTENTION = "attention"
"""What `ops.ResultsThrough` calls it."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """One of PyTorch's, of (query, key, value) [B, H, S, d] without a mask and without dropout.

    forward: (query, key, value, causal, scale) -> (output, what else the backward needs).
    backward: (gradient of the output, query, key, value, *results, causal, scale) -> their gradients.
    """

    forward: Callable[..., Results]
    backward: Callable[..., Results]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Results:
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse, seed, offset


def _cudnn_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Results:
    *kept, causal, scale = rest
    lengths = query.shape[2], key.shape[2]
    no_mask, no_lengths = None, (None, None)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, query, key, value, *kept, no_mask, *no_lengths, *lengths, 0.0, causal, scale=scale
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Results:
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return out, lse, seed, offset


def _flash_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Results:
    out, lse, seed, offset, causal, scale = rest
    lengths = query.shape[2], key.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        dout, query, key, value, out, lse, None, None, *lengths, 0.0, causal, seed, offset, scale=scale
    )


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Results:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _on_cpu_backward(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Results:
    *kept, causal, scale = rest
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, query, key, value, *kept, 0.0, causal, scale=scale
    )


KERNELS = {
    ("cuda", SDPBackend.CUDNN_ATTENTION): Kernel(_cudnn, _cudnn_backward),
    ("cuda", SDPBackend.FLASH_ATTENTION): Kernel(_flash, _flash_backward),
    ("cpu", SDPBackend.FLASH_ATTENTION): Kernel(_on_cpu, _on_cpu_backward),
}
"""By device and PyTorch's choice."""

OPS = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Of the kernels, for policies of torch.compile."""


class KeptSdpa(TorchFunctionMode):
    """Inside, sdpa gives what a checkpoint kept of it; everything else is as always."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        called = sdpa if function is scaled_dot_product_attention else function
        return called(*args, **(kwargs or {}))


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, through a node that asks `ops.through_of` where it can."""
    where = query.device.type
    known = any(where == device for device, _ in KERNELS) and attn_mask is None and dropout_p == 0
    if known and torch.is_autocast_enabled(where):  # as autocast does before it
        dtype = torch.get_autocast_dtype(where)
        query, key, value = (t.to(dtype) if t.dtype != torch.float64 else t for t in (query, key, value))
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    # of odd widths CUDA's flash takes padded copies
    if known and (where == "cpu" or query.shape[-1] % 8 == value.shape[-1] % 8 == 0):
        chosen = torch._fused_sdp_choice(*arguments, scale=scale, enable_gqa=enable_gqa)
        kernel = KERNELS.get((where, SDPBackend(chosen)))
        if kernel is not None:
            return _Attention.apply(query, key, value, kernel, is_causal, scale)
    return scaled_dot_product_attention(*arguments, scale=scale, enable_gqa=enable_gqa)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, causal: bool, scale: float | None
    ) -> Tensor:
        def compute() -> Results:
            return tuple(kernel.forward(query, key, value, causal, scale))

        through = through_of(ATTENTION)
        results = compute() if through is None else through(compute)
        ctx.save_for_backward(query, key, value, *results)
        ctx.kernel, ctx.how = kernel, (causal, scale)
        return results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return *ctx.kernel.backward(dout, *ctx.saved_tensors, *ctx.how), None, None, None
