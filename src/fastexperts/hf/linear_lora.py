"""LoRA of linear layers, PEFT's modules, at the price of its products in the layer's own dtype.

    xa = x A^T                     y = x W^T + bias + s xa B^T
    dxa = dy B                     dx = dy W + s dxa A
    dA = s dxa^T x                 dB = s dy^T xa

PEFT keeps its factors in fp32 beside a bf16 weight, and computes the whole update in fp32 on a copy of x.
Here factors are cast, the update is added within its product, and gradients of factors are summed in fp32.
Legend: T rows of x, I in and O out features, R the rank. Plain PyTorch, on any device.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastexperts.dtypes import DTYPES, accumulator
from fastexperts.errors import refuse
from fastexperts.hf import liger

NONE_FOUND = "no LoRA of linear layers here; if an adapter is made later, call optimize after get_peft_model"


class LoraForward(liger.Forward):
    """The layer and its one active adapter as one function; PEFT's own forward for any other state.

    The state is looked at in each call: adapters may be switched, disabled, merged, deleted at any time.
    """

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if args or kwargs or obstacle(module):
            return self.stock(x, *args, **kwargs)
        (name,) = _active(module)
        base, a_RI, b_OR = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
        dtype = _product_dtype(x, base.weight, base.bias, a_RI, b_OR)
        if dtype is None:
            return self.stock(x)
        return lora_linear(x, base.weight, base.bias, a_RI, b_OR, module.scaling[name], dtype)

    def __str__(self) -> str:
        return "LoRA by products in the dtype of the layer's"


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of the linear layers that PEFT has LoRA on."""
    if find_spec("peft") is None:
        return {}
    from peft.tuners.lora.layer import LoraLayer

    found = ((name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer))
    return {name: m for name, m in found if isinstance(m.get_base_layer(), nn.Linear)}


def forward_of(module: Any, where: str) -> LoraForward:
    """The forward for `module`; raises FastexpertsError if its adapter is not served in training."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear:
        got = f"that of another class of {type(module).__module__}"
    elif liger.is_patched(module):
        got = "a forward put on the instance"
    else:
        got = obstacle(module, training=True)
    if got:
        raise refuse(
            type(module).__name__,
            "forward",
            got=got,
            needs="one active adapter of plain LoRA, without dropout, on a plain linear layer",
            way_out="It keeps PEFT's forward; call optimize again after a change.",
        )
    return LoraForward(module, where)


def obstacle(module: Any, training: bool = False) -> str:
    """What of the state of `module`, a LoRA layer of PEFT's, is not served; "" if all is.

    training: count a dropout that is off, as in eval(), for on.
    """
    if module.disable_adapters or module.merged:
        return "adapters that are disabled or merged"
    active = _active(module)
    if len(active) != 1:
        return f"{len(active)} active adapters"
    (name,) = active
    if name in module.lora_variant:
        return f"an adapter of {type(module.lora_variant[name]).__name__}"
    if not module.cast_input_dtype_enabled:
        return "inputs that are not to be cast"
    if not isinstance(module.scaling[name], float | int):
        return "a scale that is no number"
    dropout = module.lora_dropout[name]
    if _drops(dropout, training):
        return f"{dropout} in training"
    if module.lora_B[name].bias is not None:
        return "a bias of the adapter"
    layers = (module.base_layer, module.lora_A[name], module.lora_B[name])
    if any(type(layer) is not nn.Linear or _is_watched(layer) for layer in layers):
        return "a quantised, sharded or wrapped layer, or hooks on it"
    return ""


def _active(module: Any) -> list[str]:
    """Which of the active adapters this layer has."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _drops(dropout: nn.Module, training: bool) -> bool:
    """Whether `dropout`, nn.Identity for none, may change anything."""
    if type(dropout) is nn.Dropout:
        return dropout.p > 0 and (training or dropout.training)
    return type(dropout) is not nn.Identity


def _is_watched(layer: nn.Module) -> bool:
    """Whether something hangs on calls of `layer`, which is not called here."""
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    backward = layer._backward_hooks or layer._backward_pre_hooks
    return bool(before or after or backward or "forward" in vars(layer))


def _product_dtype(x: Tensor, weight: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """The dtype that F.linear would give for x and `weight`; None for operands that are PEFT's to judge."""
    operands = [x, weight, *(other for other in others if other is not None)]
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or any(w.device != x.device for w in operands):
        return None
    # DTensors, quantised and other tensors with a say of their own in what a product is
    if any(type(w) not in (Tensor, nn.Parameter) for w in operands[1:]):
        return None
    dtypes = {operand.dtype for operand in operands}
    if not dtypes.issubset(DTYPES):
        return None
    if torch.is_autocast_enabled(kind):
        return None if torch.float64 in dtypes else torch.get_autocast_dtype(kind)
    bias = others[0]
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    return weight.dtype if same else None


def lora_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T [..., O] in `dtype`, to which all operands are cast; x [..., I].

    Gradients have the dtypes of their operands; those of weights are summed in fp32 (fp64 for fp64). Kept for
    them are x as cast, x A^T, and the factors as cast, so that writing over one of another dtype before the
    backward changes nothing there. A second derivative raises RuntimeError.
    """
    x_TI = x.to(dtype).reshape(-1, x.shape[-1])
    y_TO: Tensor = _LoraLinear.apply(x_TI, weight_OI, bias_O, a_RI, b_OR, scale)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class _LoraLinear(torch.autograd.Function):
    """Products in the dtype of x. The weight is kept as it is and cast again: no copy of it is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        dtype = x_TI.dtype
        a, b = a_RI.to(dtype), b_OR.to(dtype)
        bias = None if bias_O is None else bias_O.to(dtype)
        y_TO = nn.functional.linear(x_TI, weight_OI.to(dtype), bias)
        xa_TR = x_TI @ a.mT
        # out of place while torch.compile traces: PyTorch 2.11 loses the gradient of an output written over
        plus = torch.addmm if torch.compiler.is_compiling() else Tensor.addmm_
        y_TO = plus(y_TO, xa_TR, b.mT, alpha=scale)
        need_x, need_weight, _, need_a, need_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x_TI if need_weight or need_a else None,
            xa_TR if need_b else None,
            weight_OI,
            a if need_x else None,
            b if need_x or need_a else None,
        )
        ctx.scale = scale
        ctx.dtypes = [None if operand is None else operand.dtype for operand in (bias_O, a_RI, b_OR)]
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, xa_TR, weight_OI, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        bias_dtype, a_dtype, b_dtype = ctx.dtypes
        dx = dweight = dbias = da = db = None
        with torch.autocast(dy_TO.device.type, enabled=False):
            if need_x or need_a:
                dxa_TR = dy_TO @ b
            if need_x:
                dx = (dy_TO @ weight_OI.to(dy_TO.dtype)).addmm_(dxa_TR, a, alpha=ctx.scale)
            if need_weight:
                dweight = _summed(dy_TO, x_TI).to(weight_OI.dtype)
            if need_bias:
                dbias = dy_TO.sum(0, dtype=bias_dtype)
            if need_a:
                da = _summed(dxa_TR, x_TI).mul_(ctx.scale).to(a_dtype)
            if need_b:
                db = _summed(dy_TO, xa_TR).mul_(ctx.scale).to(b_dtype)
        return dx, dweight, dbias, da, db, None


def _summed(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """left^T right [M, N], a sum over T rows, in the dtype of sums."""
    wide = accumulator(left_TM.dtype)
    if left_TM.is_cuda and left_TM.dtype.itemsize == 2:
        # addmm, which scales as well, takes out_dtype too, but neither Inductor nor FlopCounterMode knows it
        return torch.mm(left_TM.mT, right_TN, out_dtype=wide)
    return left_TM.to(wide).mT @ right_TN.to(wide)
