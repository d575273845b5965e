"""Which attention backend a model trains with, and the calls that cuDNN's kernel is kept from.

PyTorch's sdpa chooses its kernel by the shapes of each call. On Hopper and Blackwell with cuDNN above 9.15 it
takes cuDNN's wherever that can run. Two faults of that one are known: where it gets a mask,

- dq is NaN if the keys are 64 more than a multiple of 128 and a row's scores lie below -88 (pytorch#196678:
  H100, torch 2.11 to 2.13), and
- a mask of another dtype than the query's is read as if it had that dtype (pytorch#191612).

Such calls take PyTorch's other kernels. transformers' attention classes find sdpa in a global of their file,
which is another to the instance (scoped.py): its name, by which models and trainers tell it, stays.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import liger
from fastexperts.hf.kept_attention import ATTENTION, KeptSdpa
from fastexperts.hf.scoped import ScopedForward, globals_of
from fastexperts.ops import through_of

SDPA = "PyTorch's sdpa: flash, where there is no mask; its memory-efficient kernel takes padding and packing"
CUDNN = "PyTorch's sdpa: cuDNN's kernel"
GUARDED = f"{CUDNN}, except for masks with which it errs"
ON_CPU = "PyTorch's sdpa"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"

OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""PyTorch's kernels without cuDNN's."""

CUDNN_FIRST = 91500, (9, 10)
"""Above which version of cuDNN, on cards of which major capability, sdpa asks cuDNN first: torch 2.11 to 2.13
(`check_prefer_cudnn_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""


@dataclass(frozen=True)
class Interface:
    """transformers' attention functions as `forward` finds them, of which sdpa is `guarded` where cuDNN's
    kernel may run, and with `keeps` gives what a checkpoint kept of it.

    They are looked up at each call, so that what is registered later is found, and copies share them.
    """

    forward: FunctionType
    guards: bool = True
    keeps: bool = False

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """As transformers' own."""
        return self._ours(name, self.forward.__globals__[INTERFACE].get_interface(name, default))

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self._ours(name, self.forward.__globals__[INTERFACE][name])

    def __str__(self) -> str:
        return GUARDED if self.guards else ON_CPU

    def _ours(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name != "sdpa":
            return function
        kept = functools.partial(keeping, function) if self.keeps else function
        return functools.partial(guarded, kept) if self.guards else kept


def guarded(
    sdpa: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """transformers' `sdpa` of these arguments; without cuDNN's kernel where that errs.

    The choice depends on shapes and dtypes alone: what runs again in a checkpoint takes the same kernel.
    """
    call = functools.partial(sdpa, module, query, key, value, attention_mask, *args, **kwargs)
    if not cudnn_errs(query, key, attention_mask, kwargs.get("position_bias")):
        return call()
    if torch.compiler.is_compiling():  # which cannot read what the caller has restricted, and traces this
        with sdpa_kernel(OTHERS):
            return call()
    with _without_cudnn:
        return call()


def keeping(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """transformers' sdpa, `function`, of these arguments; in a checkpoint that keeps it, what was kept."""
    if torch.compiler.is_compiling() or through_of(ATTENTION) is None:
        return function(*args, **kwargs)
    with KeptSdpa():
        return function(*args, **kwargs)


class _WithoutCudnn:
    """sdpa without cuDNN's kernel, all else as it was; as it was, too, where there would be none without it.

    The switch is the process's: of threads that are inside at once, the last one out puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = threading.Lock(), 0, True

    def __enter__(self) -> None:
        switches = torch.backends.cuda
        with self._lock:
            if self._inside == 0:
                others = (
                    switches.flash_sdp_enabled(),
                    switches.mem_efficient_sdp_enabled(),
                    switches.math_sdp_enabled(),
                )
                self._was_on = switches.cudnn_sdp_enabled()
                switches.enable_cudnn_sdp(self._was_on and not any(others))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(self._was_on)


_without_cudnn = _WithoutCudnn()


def cudnn_errs(query: Tensor, key: Tensor, *masks: Tensor | None) -> bool:
    """Whether cuDNN's kernel errs for `query` and `key` [B, H, S, d] with those `masks`."""
    dtypes = {mask.dtype for mask in masks if mask is not None}
    return bool(dtypes) and (key.shape[-2] % 128 == 64 or not dtypes <= {torch.bool, query.dtype})


def cudnn_comes_first(where: str) -> bool:
    """Whether PyTorch's sdpa asks cuDNN's kernel first, on this card."""
    version, majors = CUDNN_FIRST
    if where != "cuda" or (torch.backends.cudnn.version() or 0) <= version:
        return False
    return torch.cuda.get_device_capability()[0] in majors


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of those whose forward finds its attention function in transformers' interface."""
    return {name: module for name, module in model.named_modules() if INTERFACE in globals_of(module)}


def forward_of(module: Any, where: str) -> ScopedForward:
    """The forward of `module` with sdpa `guarded`; raises FastexpertsError if another library changed it."""
    if liger.is_patched(module):
        raise _refusal(type(module).__name__)
    return ScopedForward(module, where, {INTERFACE: Interface(type(module).forward)})


def keep(model: Any) -> None:
    """Let the attention of `model` give what a checkpoint kept of it; raises FastexpertsError where it
    cannot.
    """
    check_keepable(model)
    where = liger.device_type(model)
    for module in candidates(model).values():
        put: Any = vars(module).get("forward")
        before = put.others.get(INTERFACE) if isinstance(put, ScopedForward) else None
        guards = isinstance(before, Interface) and before.guards
        interface = Interface(cast(Any, type(module).forward), guards, keeps=True)
        ScopedForward(module, where, {INTERFACE: interface}).put()


def check_keepable(model: Any, switches: bool = False) -> None:
    """Raise unless `keep` takes `model`. switches: `choose` comes before."""
    found, name = candidates(model), model.config.get_text_config()._attn_implementation
    on_sdpa = name == "sdpa" or (switches and name == "eager" and model._supports_sdpa)
    patched = [name for name, module in found.items() if liger.is_patched(module)]
    if on_sdpa and found and not patched:
        return
    what = f"a forward put on the instance of {patched[0]}" if on_sdpa and patched else f"attention by {name}"
    raise refuse(
        "optimize",
        "checkpoint",
        got=f"'keep-attention' for {type(model).__name__} with {what}",
        needs="PyTorch's sdpa, found in transformers' interface by the forward of the class",
        way_out="Pass checkpoint='keep-experts'.",
    )


def keepable(model: Any) -> bool:
    """Whether `keep` takes `model`."""
    try:
        check_keepable(model)
    except FastexpertsError:
        return False
    return True


def _refusal(cls: str) -> FastexpertsError:
    return refuse(
        cls,
        "forward",
        got="a forward put on the instance",
        needs="that of its class, to keep masks with which cuDNN's kernel errs from it",
        way_out="It stays as it is: pad to multiples of 128, or torch.backends.cuda.enable_cudnn_sdp(False).",
    )


def choose(model: Any, where: str) -> tuple[str, bool, str]:
    """(name, whether it is not eager, what and why) of the attention of `model`, switched from eager to sdpa
    where its class has it.

    What was asked for otherwise (flash-attn, flex) stays. A class without sdpa has reasons of its own, such
    as sinks, and stays eager.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if config._attn_implementation == "eager" and model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    found = config._attn_implementation
    if found == "sdpa" and where != "cuda":
        return name, True, ON_CPU
    if found == "sdpa":
        return name, True, CUDNN if cudnn_comes_first(where) else SDPA
    if found == "eager":
        return name, False, "eager: the class has no sdpa"
    return name, True, f"{found}, as loaded"
