"""Liger's kernels in tests: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Scalar(float):
    """A number as a compiled kernel sees it, with `.to(dtype)`; the interpreter's is a plain float."""

    def to(self, dtype: Any) -> Scalar:
        return self


def run_liger(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let Liger's kernels run on `DEVICE`, which is returned. Our own stay on PyTorch's backend on a CPU."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    if DEVICE == "cuda":
        return DEVICE
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    import fastexperts.hf.liger

    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter, "_implicit_cvt", lambda arg: Scalar(arg) if type(arg) is float else convert(arg)
    )
    # libdevice's give None in the interpreter, which puts its own functions into `tl` while a kernel runs
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # noqa: PLW0108
    monkeypatch.setattr(fastexperts.hf.liger, "missing", lambda where: "")
    return DEVICE


class Alive(TorchDispatchMode):
    """Counts the bytes that ops have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return out

    def bytes(self, collect: bool = True) -> int:
        if collect:
            gc.collect()
        return sum(size for reference, size in self.made.values() if not reference.expired())


def step(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """{"loss", each parameter}: of one training step, the loss and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
