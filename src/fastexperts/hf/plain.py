"""What our ops can read: whole floating tensors in the memory of this process; anything else is refused.

FSDP2, tensor parallelism and expert parallelism keep a parameter as a `DTensor`, DeepSpeed ZeRO-3 as an empty
tensor, and put a plain one in its place for the length of the forward. So a parameter may be sharded, and
what a call reads may not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastexperts.dtypes import DTYPES
from fastexperts.errors import refuse


def check_kind(module: Any, name: str, w: Any) -> None:
    """Raise FastexpertsError unless `w` is a floating tensor, plain or sharded."""
    if w.dtype not in DTYPES:
        raise refuse(
            type(module).__name__,
            name,
            got=str(w.dtype).removeprefix("torch."),
            needs="bfloat16, float16, float32 or float64 (no quantised experts so far)",
            way_out="Load the model dequantised, or use experts_implementation='grouped_mm'.",
        )
    if is_traceable_wrapper_subclass(w) and not is_dtensor(w):
        raise refuse(
            type(module).__name__,
            name,
            got=f"a {type(w).__name__}",
            needs="a plain tensor, or a DTensor (quantised tensors are not served so far)",
            way_out="Load the model dequantised, or use experts_implementation='grouped_mm' or 'eager'.",
        )


def check_plain(module: Any, name: str, w: Any) -> None:
    """Raise FastexpertsError unless `w`, which a forward is about to read, is whole, plain and floating."""
    check_kind(module, name, w)
    if is_dtensor(w):
        raise refuse(
            type(module).__name__,
            name,
            got=f"a DTensor of {list(w.shape)}, {w.placements}",
            needs="the plain tensor that FSDP2, tensor or expert parallelism puts in its place for a forward",
            way_out="Shard the decoder layer around it, with from_pretrained(distributed_config=...), "
            "accelerate or fully_shard, and call the model.",
        )
    if hasattr(w, "ds_id") and w.numel() == 0:
        raise refuse(
            type(module).__name__,
            name,
            got="a parameter that DeepSpeed ZeRO-3 has partitioned: none of it is here",
            needs="the whole parameter, which DeepSpeed gathers around a module's call",
            way_out="Call the module, not its forward method, or call inside "
            "deepspeed.zero.GatheredParameters; else use ZeRO-2 or FSDP2.",
        )


def is_dtensor(w: Any) -> bool:
    """Whether `w` is a part of a tensor over several processes, which only torch.distributed makes."""
    if not is_traceable_wrapper_subclass(w) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(w, DTensor)
