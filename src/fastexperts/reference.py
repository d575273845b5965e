"""The oracle: a plain loop over experts in differentiable PyTorch, any dtype.

It shares two things with the fast path, and tests hold both to something else: `Activation.forward`, to
transformers' own activations (tests/test_activations.py), and the view `Weight.out_in`, to indexing element
by element (tests/test_weights.py).

Legend: T tokens, K top-k, E experts, D model dim, F expert intermediate dim, G = 2F gated, else F.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastexperts.activations import SWIGLU, Activation, resolve
from fastexperts.weights import Weight, as_weight


def folded(weight: Weight) -> Weight:
    """`weight` with its update built and added, in the dtype of the weight."""
    if weight.lora is None:
        return weight
    delta = weight.lora.scale * torch.bmm(weight.lora.b, weight.lora.a)
    return replace(weight, w=weight.out_in + delta.to(weight.w.dtype), transposed=False, lora=None)


def moe_mlp_reference(
    x_TD: Tensor,
    ids_TK: Tensor,
    weight_TK: Tensor,
    w1: Tensor | Weight,
    w2: Tensor | Weight,
    *,
    activation: str | Activation = SWIGLU,
) -> Tensor:
    """out_TD[t] = sum_k weight[t, k] * (w2[e] act(w1[e] x[t] + b1[e]) + b2[e]) with e = ids[t, k]; ids
    outside [0, E) add nothing.

    The arguments mean what they mean in `fastexperts.moe_mlp`. Every operation runs in the dtypes given: pass
    fp64 tensors for the truth, or bf16 ones for what a plain PyTorch loop makes of bf16.
    """
    activation = resolve(activation, "moe_mlp_reference")
    w1, w2 = folded(as_weight(w1)), folded(as_weight(w2))
    w1_EGD, w2_EDF = w1.out_in, w2.out_in
    out_TD = torch.zeros_like(x_TD)
    for e in range(w2_EDF.shape[0]):
        t, k = torch.where(ids_TK == e)
        h = nnf.linear(x_TD[t], w1_EGD[e], None if w1.bias is None else w1.bias[e])
        y = nnf.linear(activation.forward(h), w2_EDF[e], None if w2.bias is None else w2.bias[e])
        out_TD = out_TD.index_add(0, t, (y * weight_TK[t, k, None]).to(out_TD.dtype))
    return out_TD
