"""Every op of a training step of our layer, as a call on operands of the right scale.

The one benchmark that knows the primitives of backend.Backend.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from problems import Problem
from torch import Tensor

from fastexperts import backend
from fastexperts.activations import SWIGLU
from fastexperts.routing import Routing

# names of the grouped GEMMs among our kernels; _sum_dweight is none
PRODUCT = re.compile(r"(grouped|hopper)_(mm|dw)$")


@dataclass(frozen=True)
class Pass:
    """`flops` of the matrix products; `bytes`: each operand read once, each result written once; `tile`: its
    name in kernels/tiles.py.
    """

    name: str
    tile: str | None
    flops: int
    bytes: int
    call: Callable[[], object]


def is_product(kernel: str) -> bool:
    """Whether the GPU kernel of this name is a grouped GEMM of ours."""
    return PRODUCT.search(kernel) is not None


def tensors(values: object) -> list[Tensor]:
    """The tensors in (nested) lists, tuples and routings of arguments or results."""
    if isinstance(values, Routing):
        values = values.tensors
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in tensors(value)]
    return []


def least_bytes(read: Iterable[Tensor], written: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*read, *written))


def layer_passes(problem: Problem) -> dict[str, Pass]:
    """name -> `Pass` in the order of a training step with all gradients; products as in `dense_products`."""
    shape, ids_TK, dtype = problem.shape, problem.ids_TK, problem.x_TD.dtype
    x_TD, weight_TK, w1_EGD, w2_EDF = (leaf.detach() for leaf in problem.leaves)
    dout_TD, k = problem.dout_TD, shape.top_k
    passes: dict[str, Pass] = {}

    def add(name: str, op: Callable, *args: object, tile: str | None = None, parts: int = 0, like: int = 0):
        """Append the pass op(*args) and return its results. parts: products of 2*P*D*F operations; like: how
        many of the last arguments only tell strides.
        """
        flops = 2 * parts * problem.tokens * k * shape.dim_d * shape.dim_f
        results = op(*args)
        read = tensors(args[: len(args) - like])
        passes[name] = Pass(name, tile, flops, least_bytes(read, tensors(results)), lambda: op(*args))
        return results

    ops = backend.load(x_TD.device)
    routing = add("route", ops.route, ids_TK, shape.experts, ops.block_m(x_TD.device, dtype))
    h_PG, a_PF = add("up", ops.up, x_TD, w1_EGD, None, routing, SWIGLU, True, tile="up", parts=2)
    y_PD = add("down", ops.down, a_PF, w2_EDF, None, routing, tile="down", parts=1)
    add("combine", ops.combine, y_PD, weight_TK, routing, dtype)
    every = (True, True, True)
    dh_PG, wa_PF, _ = add(
        "dh", ops.dh, dout_TD, w2_EDF, h_PG, weight_TK, routing, SWIGLU, every, tile="dh", parts=1
    )
    add("dw2", partial(ops.dw, tokens="left"), dout_TD, wa_PF, routing, w2_EDF, tile="dw", parts=1, like=1)
    dx_PD = add("dx", ops.dx, dh_PG, w1_EGD, routing, tile="dx", parts=2)
    add("combine dx", ops.combine, dx_PD, None, routing, dtype)
    add("dw1", partial(ops.dw, tokens="right"), dh_PG, x_TD, routing, w1_EGD, tile="dw", parts=2, like=1)
    return passes
