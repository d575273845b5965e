"""PEFT's adapters on fused experts: the factors reach our experts function, and no folded weight is built.

PEFT wraps an experts module in one `ParamWrapper` per adapted parameter. Around each forward it would put
`W + scale * B A` in the place of the parameter, a copy of every expert. Where our function runs, the wrapper
lays its factors on the module instead, for the length of the call; everything else of PEFT stays as it is:
names, files, merging, switching and disabling adapters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastexperts.dtypes import DTYPES
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.inventory import in_interface
from fastexperts.hf.plain import check_plain
from fastexperts.weights import Lora

_ATTRIBUTE = "_fastexperts_lora"
_OURS = "_fastexperts_hands_over"


def install(name: str) -> None:
    """Let PEFT's wrappers hand their factors to modules whose experts implementation is `name`; idempotent.

    Without PEFT there is nothing to do: one that is installed later needs `register()` again.
    """
    if find_spec("peft") is None:
        return
    from peft.tuners.lora.layer import ParamWrapper

    if not hasattr(ParamWrapper._activate_lora, _OURS):
        ParamWrapper._activate_lora = _handing_over(ParamWrapper._activate_lora, name)


def take_update(module: Any, parameter: str) -> Lora | None:
    """What active adapters add to a parameter of `module` in this call, as [E, r, in] and [E, out, r].

    It can be taken once: what is still there when the call ends was not read, and the wrapper raises.
    """
    updates = module.__dict__.get(_ATTRIBUTE, {}).pop(parameter, None)
    return Lora.of(updates) if updates else None


def _handing_over(fold: Callable[..., Any], name: str) -> Callable[..., Any]:
    @contextlib.contextmanager
    @functools.wraps(fold)
    def activate(wrapper: Any, active_adapters: list[str]) -> Iterator[None]:
        module, parameter = wrapper.get_base_layer(), wrapper.parameter_name
        adapters = [adapter for adapter in active_adapters if adapter in wrapper.lora_A]
        if not adapters or not _serves(module, parameter, name):
            with fold(wrapper, active_adapters):
                yield
            return
        handed = getattr(module, _ATTRIBUTE, None)
        if handed is None:  # not by setdefault of `__dict__`, which Dynamo of PyTorch 2.11 does not trace
            handed = {}
            setattr(module, _ATTRIBUTE, handed)
        handed[parameter] = [_lora(wrapper, adapter) for adapter in adapters]
        try:
            yield
            if parameter in handed:
                raise _not_read(module, parameter)
        finally:
            handed.pop(parameter, None)

    setattr(activate, _OURS, True)
    return activate


def _not_read(module: Any, parameter: str) -> FastexpertsError:
    return refuse(
        type(module).__name__,
        "forward",
        got=f"one that ended without reading the adapter of {parameter}",
        needs="fastexperts' forward, which the config names: what ran instead leaves the adapter out",
        way_out="Train with use_liger_kernel=False and use_kernels=False and without a patch of the experts, "
        "or call model.set_experts_implementation('eager'), under which PEFT folds the adapter in.",
    )


def _serves(module: Any, parameter: str, name: str) -> bool:
    """Whether our function runs as the forward of `module` and takes the update of `parameter` from here."""
    if not in_interface(module) or module.config._experts_implementation != name:
        return False
    weight = module._parameters.get(parameter)
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return parameter in names and weight is not None and weight.dim() == 3 and weight.dtype in DTYPES


def _lora(wrapper: Any, adapter: str) -> Lora:
    """The factors of an adapter, which PEFT stores by expert, A [E * r, in], and by rank, B [out, r * E]."""
    experts = wrapper.num_experts
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    _check_whole(wrapper.get_base_layer(), experts, {"lora_A": a, "lora_B": b})
    # A faces the inputs in both layouts of the weight: PEFT reads `is_transposed`, since the oldest we serve.
    a_ERI: Tensor = a.unflatten(0, (experts, -1))
    b_EOR: Tensor = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return Lora(a_ERI, b_EOR, wrapper.scaling[adapter])


def _check_whole(module: Any, experts: int, factors: dict[str, Tensor]) -> None:
    """Raise FastexpertsError for factors that are sharded, or that belong to other ranks' experts too."""
    if not torch.compiler.is_compiling():
        for name, factor in factors.items():
            check_plain(module, name, factor)
    local = getattr(module, "num_experts", experts)
    if local != experts:
        raise refuse(
            type(module).__name__,
            "lora_A",
            got=f"an adapter of {experts} experts, {local} of which are on this rank",
            needs="experts that are not sharded by expert: PEFT adapts the whole parameter",
            way_out="Train adapters with FSDP2 and without expert parallelism (ep_size=1).",
        )
