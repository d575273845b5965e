"""Every step of the layer as a call on operands of the right scale, with its FLOPs and least bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Shape, routing
from torch import Tensor

from fastexperts import ops

SWIGLU = ("silu", [1.0, float("inf"), 0.0])


@dataclass(frozen=True)
class Pass:
    """`flops` of the matrix products; `bytes` each operand read once and each result written once."""

    flops: int
    bytes: int
    call: Callable[[], Tensor]


def layer_passes(
    shape: Shape, tokens: int, kind: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Pass]:
    """name -> `Pass`, forward first, in the order of a training step with all gradients."""
    device, d, f, e, k = "cuda", shape.dim_d, shape.dim_f, shape.experts, shape.top_k
    ids_TK, weight_TK = routing(shape, tokens, kind, device)
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, device=device, dtype=dtype, generator=generator)

    x_TD = normal(tokens, d)
    w1_ECFD, w2_EDF = normal(e, 2, f, d) / d**0.5, normal(e, d, f) / f**0.5
    block_m = ops.block_m(x_TD.device, dtype)
    row, pair, offsets, schedule = ops.route(ids_TK, e, block_m)
    h_PG, a_PF = ops.up(x_TD, w1_ECFD, pair, offsets, schedule, k, *SWIGLU, True)
    x_PD = ops.gather(x_TD, row, pair, k)

    def dh() -> tuple[Tensor, Tensor, Tensor]:
        return ops.dh(x_PD, w2_EDF, h_PG, weight_TK, row, pair, offsets, schedule, *SWIGLU, True, True, True)

    dh_PG, wa_PF, _ = dh()
    gemm, pairs, size = 2 * tokens * k * d * f, tokens * k, dtype.itemsize
    x_bytes, rows_d, rows_f, w = size * tokens * d, size * pairs * d, size * pairs * f, size * e * d * f
    gather = Pass(0, x_bytes + rows_d, lambda: ops.gather(x_TD, row, pair, k))
    combine = Pass(0, x_bytes + rows_d, lambda: ops.combine(x_PD, weight_TK, row, k, dtype))
    return {
        "route": Pass(0, 16 * pairs, lambda: ops.route(ids_TK, e, block_m)[0]),
        "up": Pass(
            2 * gemm,
            x_bytes + 2 * w + 3 * rows_f,
            lambda: ops.up(x_TD, w1_ECFD, pair, offsets, schedule, k, *SWIGLU, True)[0],
        ),
        "down": Pass(gemm, rows_f + w + rows_d, lambda: ops.down(a_PF, w2_EDF, offsets, schedule)),
        "combine": combine,
        "gather dout": gather,
        "dh": Pass(gemm, rows_d + w + 5 * rows_f, lambda: dh()[0]),
        "dw2": Pass(gemm, rows_d + rows_f + w, lambda: ops.dw2(x_PD, wa_PF, offsets, w2_EDF)),
        "dx": Pass(2 * gemm, 2 * rows_f + 2 * w + rows_d, lambda: ops.dx(dh_PG, w1_ECFD, offsets, schedule)),
        "combine dx": combine,
        "gather x": gather,
        "dw1": Pass(2 * gemm, rows_d + 2 * rows_f + 2 * w, lambda: ops.dw1(dh_PG, x_PD, offsets, w1_ECFD)),
    }
