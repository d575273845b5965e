"""Developer's tool: PyTorch's attention kernels at the cuts' shapes, causal and without padding, in turn.

    python benchmarks/attention.py

For hf/attention.py, which chooses among them: TF/s forward and forward + backward, half of the scores
counted, and the relative difference of the output and dq from the first that runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import take_turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
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


def calls(heads: Heads, kind: SDPBackend, tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """ "forward" and "step", which gives (out, dq, dk, dv)."""
    q, k, v, dout = tensors

    def forward() -> Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.query != heads.key)

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    return {"forward": forward, "step": step}


def compared(
    heads: Heads, batch: int, length: int, device: str, dtype: torch.dtype, backends: dict[str, SDPBackend]
) -> tuple[dict[tuple[str, str], Callable[[], Any]], list[str]]:
    """((backend, call) -> call, of those that run; what is said of differences and of those that do not)."""
    tensors, running, said, first = heads.tensors(batch, length, device, dtype), {}, [], None
    for name, kind in backends.items():
        made = calls(heads, kind, tensors)
        try:
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


def main() -> None:
    batch, length = 4, 4096
    for model, heads in HEADS.items():
        # math builds the whole scores: tens of GB
        few = {name: kind for name, kind in BACKENDS.items() if name != "math"}
        running, said = compared(heads, batch, length, "cuda", torch.bfloat16, few)
        print(f"{model}, {heads}: {'; '.join(said)}", flush=True)
        flops = heads.flops(batch, length)
        for (name, call), times in take_turns(running).items():
            work = flops * (3.5 if call == "step" else 1)  # backward: scores once more, and four products
            print(f"  {name:10} {call:8} {times.ms:7.3f} ms {work / times.ms / 1e9:5.0f} TF/s", flush=True)


if __name__ == "__main__":
    main()
