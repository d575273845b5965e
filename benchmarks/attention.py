"""Developer's tool: PyTorch's attention kernels at the cuts' shapes, in turn.

    python benchmarks/attention.py

Causal, and of one model with a padding mask: ms and TF/s forward and forward + backward, half of the scores
counted, and the relative difference of the output and dq from the first that runs. "sdpa" is what PyTorch
takes by itself. Then the price of a new shape: the first forward + backward of a length, and the second.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import take_turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Heads:
    """Of an attention: query and key heads, dims of a key and of a value."""

    query: int
    key: int
    dim_key: int = 128
    dim_value: int = 128

    def flops(self, batch: int, length: int) -> float:
        """Of a causal forward: scores and values, each key up to the query."""
        return batch * self.query * (self.dim_key + self.dim_value) * length * (length + 1)

    def tensors(self, batch: int, length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(q, k, v, dout), heads side by side in memory as projections give them."""
        generator = torch.Generator(device).manual_seed(0)

        def make(heads: int, dim: int) -> Tensor:
            shape = batch, length, heads, dim
            return torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)

        q, k, v = make(self.query, self.dim_key), make(self.key, self.dim_key), make(self.key, self.dim_value)
        return *(t.requires_grad_() for t in (q, k, v)), make(self.query, self.dim_value)


HEADS = {
    "qwen3-30b-a3b": Heads(32, 4),
    "glm4.5-air": Heads(96, 8),
    "ernie4.5-21b-a3b": Heads(20, 4),
    "dots1": Heads(32, 32),
    "deepseek-v3": Heads(128, 128, 192),
}
MASKED = HEADS["qwen3-30b-a3b"]  # also measured with a padding mask, and at new lengths


BATCH, LENGTH = 4, 4096
NEW_LENGTHS = 1009, 2003


def padding(batch: int, length: int, device: str) -> Tensor:
    """[B, 1, S, S] as transformers gives it: causal, without the last i eighths of the i-th of `batch`."""
    lengths = length - torch.arange(batch, device=device) * length // 8
    there = torch.arange(length, device=device) < lengths[:, None]
    return torch.ones(length, length, dtype=torch.bool, device=device).tril() & there[:, None, None, :]


def calls(
    kind: SDPBackend | None, tensors: tuple[Tensor, ...], mask: Tensor | None = None
) -> dict[str, Callable[[], Any]]:
    """ "forward" and "step", which gives (out, dq, dk, dv); with a mask keys and values are repeated, as
    transformers does.
    """
    q, k, v, dout = tensors
    times = q.shape[1] // k.shape[1]

    def forward() -> Tensor:
        with contextlib.nullcontext() if kind is None else sdpa_kernel(kind):
            if mask is None:
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=times > 1)
            repeated = (heads.repeat_interleave(times, dim=1) for heads in (k, v))
            return scaled_dot_product_attention(q, *repeated, attn_mask=mask)

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return {"forward": forward, "step": step}


def compared(
    tensors: tuple[Tensor, ...], backends: dict[str, SDPBackend | None], mask: Tensor | None = None
) -> tuple[dict[tuple[str, str], Callable[[], Any]], list[str]]:
    """((backend, call) -> call, of those that run; what is said of differences and of those that do not)."""
    running, said, first = {}, [], None
    for name, kind in backends.items():
        made = calls(kind, tensors, mask)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why it does not take each of the others
                out, dq, *_ = made["step"]()
        except RuntimeError as error:
            said.append(f"{name}: {' '.join(str(error).split())[:100]}")
            continue
        first = first or (out, dq)
        pairs = zip((out, dq), first, strict=True)
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in pairs]
        said.append(f"{name}: out {errors[0]:.0e}, dq {errors[1]:.0e}")
        running |= {(name, call): function for call, function in made.items()}
    return running, said


def new_shape(kind: SDPBackend | None, tensors: tuple[Tensor, ...]) -> tuple[float, float]:
    """ms of the first step of these shapes in the process, the host's included, and of the second."""
    step, clocks = calls(kind, tensors)["step"], [1e3 * time.perf_counter()]
    for _ in range(2):
        float(step()[0].sum())  # waits for the device
        clocks.append(1e3 * time.perf_counter())
    return clocks[1] - clocks[0], clocks[2] - clocks[1]


def main() -> None:
    # math builds the whole scores: tens of GB
    few = {name: kind for name, kind in BACKENDS.items() if name != "math"}
    for model, heads in HEADS.items():
        tensors = heads.tensors(BATCH, LENGTH, "cuda", torch.bfloat16)
        for mask in (None, padding(BATCH, LENGTH, "cuda")) if heads == MASKED else (None,):
            running, said = compared(tensors, few, mask)
            print(f"{model}, {heads}{', mask' if mask is not None else ''}: {'; '.join(said)}", flush=True)
            flops = heads.flops(BATCH, LENGTH)
            for (name, call), times in take_turns(running).items():
                work = flops * (3.5 if call == "step" else 1)  # backward: scores once more, and four products
                print(
                    f"  {name:10} {call:8} {times.ms:7.3f} ms {work / times.ms / 1e9:5.0f} TF/s", flush=True
                )
    for length in NEW_LENGTHS:
        tensors = MASKED.tensors(BATCH, length, "cuda", torch.bfloat16)
        for name in ("flash", "cudnn"):
            first, second = new_shape(BACKENDS[name], tensors)
            print(f"length {length}, {name}: first step {first:.1f} ms, second {second:.1f}", flush=True)


if __name__ == "__main__":
    main()
