"""Liger's kernels: where they run, and the autograd functions that the parts of `optimize` call.

They run on CUDA, as our own do. Liger writes over its operands in two places, which
is kept from showing here: rotary embeddings rotate copies, and what SwiGLU has saved serves one backward.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts import settings
from fastexperts.errors import refuse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = 8
"""How many times the hidden states' size a chunk of logits may have. Each chunk reads the head's weight and
reads and writes its gradient in fp32: for Qwen3's vocabulary and 16,384 tokens 64 chunks of 2.5 GB at 1.
"""


def device_type(model: nn.Module) -> str:
    """Where `model` will train: on CUDA where there is a card, though it may lie on the CPU or meta yet."""
    return "cuda" if torch.cuda.is_available() else next(model.parameters()).device.type


def missing(where: str) -> str:
    """Why Liger's kernels do not run for tensors on device type `where`; empty if they do."""
    if where != "cuda":
        return "no CUDA device"
    if settings.backend() == "torch":
        return "FASTEXPERTS_BACKEND is torch"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'fastexperts[train]')"
    return ""


class Forward:
    """What stands in the place of a module's forward, on the instance.

    An object and no closure: copied and pickled with its module, it knows the copy. Tensors that the kernels
    do not take (another device, fp64) go to the forward of the class.
    """

    def __init__(self, module: Any, where: str) -> None:
        self.module, self.where = module, where

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:  # Trainer and generate() ask which inputs there are
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels take `x`."""
        return x.device.type == self.where and x.dtype in DTYPES

    def put(self) -> None:
        """Take the place."""
        vars(self.module)["forward"] = self


def restore(model: nn.Module) -> int:
    """Give every module of `model` that has a `Forward` its class's back; returns how many there were."""
    changed = [module for module in model.modules() if isinstance(vars(module).get("forward"), Forward)]
    for module in changed:
        del vars(module)["forward"]
    return len(changed)


def is_patched(module: nn.Module) -> bool:
    """Whether something that is not ours stands in the place of the forward of `module`."""
    return "forward" in vars(module) and not isinstance(vars(module)["forward"], Forward)


def promoted(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the dtype of a product with `other`, which Liger's kernels would keep in that of `x`.

    Under autocast it stays: what reads the result casts it down again.
    """
    if x.dtype == other.dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.promote_types(x.dtype, other.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    """x / rms(x) * (offset + weight), over the last dim."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place: the gradient that comes in may be that of a residual branch as well.
    return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False, None)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """q and k [B, H, S, d], the first `rotary_dim` of each head rotated; cos, sin [B or 1, S, *]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(_apart(q), _apart(k), cos, sin, None, 1, rotary_dim)


def _apart(heads: Tensor) -> Tensor:
    """A copy where the kernel, which sees [B, S, H, d], would rotate in place what others may hold."""
    rows = heads.transpose(1, 2)
    return rows.clone().transpose(1, 2) if rows.is_contiguous() else heads


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; its backward runs once and overwrites `gate` and `up`."""
    return _SiluMul.apply(gate, up)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import swiglu_forward

        gate, up = gate.contiguous(), up.contiguous()
        _, _, product = swiglu_forward(gate, up)
        ctx.save_for_backward(gate, up)
        ctx.done = False
        return product

    @staticmethod
    def backward(ctx: Any, dproduct: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.swiglu import swiglu_backward

        if ctx.done:
            raise refuse(
                "optimize",
                "retain_graph",
                got="a second backward through shared_experts",
                needs="one: Liger's kernel writes the gradients over what it has saved",
                way_out="Pass parts={'shared_experts': False}.",
            )
        ctx.done = True
        return swiglu_backward(*ctx.saved_tensors, dproduct.contiguous())


def summed_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, ignore_index: int
) -> Tensor:
    """The sum of the cross entropies of hidden @ weight^T + bias, logits in chunks, sums in fp32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    plain = (None, ignore_index, 0.0, 0.0, "sum", None, False, torch.float32)
    no_metrics = (False, False, False, None, None)
    return LigerFusedLinearCrossEntropyFunction.apply(
        hidden_TD, weight_VD, target_T, bias_V, *plain, *no_metrics, CHUNKS
    )[0]
