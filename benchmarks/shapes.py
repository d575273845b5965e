"""Expert-layer shapes of published models, and the routings that benchmarks and GPU tests use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """D hidden dim, F expert intermediate dim, E experts (local ones where a model never fits a card), K
    top-k.
    """

    name: str
    dim_d: int
    dim_f: int
    experts: int
    top_k: int

    def forward_flops(self, tokens: int) -> int:
        """6*T*K*D*F: gate, up and down, two operations each. Backward with all gradients adds twice that."""
        return 6 * tokens * self.top_k * self.dim_d * self.dim_f


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("qwen3-235b", 4096, 1536, 128, 8),
        Shape("glm4.5-air", 4096, 1408, 128, 8),
        Shape("dots1", 4096, 1408, 128, 6),
        Shape("ernie4.5-21b", 2560, 1536, 64, 6),
        Shape("olmoe", 2048, 1024, 64, 8),
        Shape("deepseek-v3-e32", 7168, 2048, 32, 8),
        Shape("mixtral", 4096, 14336, 8, 2),
    )
}


@dataclass(frozen=True)
class Special:
    """A layer whose experts are not plain SwiGLU, or not stored as most are. activation: a name in
    fastexperts.ACTIVATIONS; stored: transposed, gate and up in turn, as gpt_oss.
    """

    shape: Shape
    activation: str = "swiglu"
    limit: float = math.inf
    stored: bool = False
    bias: bool = False

    @property
    def parts(self) -> int:
        return 1 if self.activation == "relu2" else 2


SPECIALS = {
    special.shape.name: special
    for special in (
        Special(Shape("gpt-oss-20b", 2880, 2880, 32, 4), "gpt_oss", 7.0, stored=True, bias=True),
        Special(Shape("gpt-oss-120b", 2880, 2880, 128, 4), "gpt_oss", 7.0, stored=True, bias=True),
        Special(Shape("qwen3-next-80b", 2048, 512, 512, 10)),
        Special(Shape("deepseek-v4", 4096, 2048, 256, 6), limit=10.0),
        Special(Shape("gemma4-26b", 2816, 704, 128, 8), "geglu_tanh"),
        Special(Shape("nemotron-3-nano", 2688, 1856, 128, 6), "relu2"),
        Special(Shape("minimax-m2", 3072, 1536, 256, 8)),
    )
}


def routing(shape: Shape, tokens: int, kind: str, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids_TK, weight_TK fp32), distinct experts in a token.

    "balanced": top-k of iid normal logits. "skewed": Gumbel top-k with p_e proportional to 1 / rank.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    logits_TE = torch.randn(tokens, shape.experts, generator=generator, device=device)
    if kind == "skewed":
        uniform_TE = torch.rand(tokens, shape.experts, generator=generator, device=device).clamp(
            1e-9, 1 - 1e-7
        )
        rank_E = torch.arange(1, shape.experts + 1, device=device)
        logits_TE = -torch.log(rank_E) - torch.log(-torch.log(uniform_TE))
    elif kind != "balanced":
        raise ValueError(f"routing: `kind` got {kind!r}; it needs 'balanced' or 'skewed'.")
    values_TK, ids_TK = logits_TE.topk(shape.top_k, dim=-1)
    return ids_TK, values_TK.softmax(-1)
