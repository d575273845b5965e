"""Fast MoE layers of others that import on this machine: name -> problem -> call."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def _liger(problem: Any) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda: LigerFusedMoEFunction.apply(
        problem.x_TD, problem.w1_EGD, problem.w2_EDF, problem.ids_TK.int(), problem.weight_TK
    )


def _scattermoe(problem: Any) -> Callable[[], Tensor]:
    """Its GLUMLP: two parallel_linear calls, routing weights in the dtype of x."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    top_k = problem.shape.top_k

    def call() -> Tensor:
        order = flatten_sort_count(problem.ids_TK, num_experts=problem.shape.experts)
        w1, w2 = problem.w1_EGD.permute(0, 2, 1), problem.w2_EDF.permute(0, 2, 1)
        gate, up = parallel_linear(problem.x_TD, w1, top_k, *order, grouped_out=True).chunk(2, dim=-1)
        a = torch.nn.functional.silu(gate) * up
        weight_TK = problem.weight_TK.to(problem.x_TD.dtype)
        return parallel_linear(a, w2, 1, *order, grouped_in=True, gates=weight_TK)

    return call


def _sonicmoe(problem: Any) -> Callable[[], Tensor]:
    """As transformers calls it: the stored layout (gate rows, then up rows), fp32 routing weights."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    tokens, top_k = problem.ids_TK.shape
    token_P = torch.arange(tokens, device="cuda", dtype=torch.int32).repeat_interleave(top_k)

    def call() -> Tensor:
        out_TD, _ = moe_general_routing_inputs(
            problem.x_TD,
            problem.weight_TK.reshape(-1),
            token_P,
            problem.ids_TK.reshape(-1).int(),
            problem.w1_EGD.permute(1, 2, 0),
            None,
            problem.w2_EDF.permute(1, 2, 0),
            None,
            E=problem.shape.experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=False,
            concat_layout=True,
        )
        return out_TD

    return call


# name -> (module, distribution, adapter)
_ADAPTERS = {
    "liger": ("liger_kernel", "liger-kernel", _liger),
    "scattermoe": ("scattermoe", "scattermoe", _scattermoe),
    "sonicmoe": ("sonicmoe", "sonic-moe", _sonicmoe),
}
PEERS = {name: adapter for name, (module, _, adapter) in _ADAPTERS.items() if find_spec(module)}


def versions() -> dict[str, str]:
    """Of the peers that import here."""
    found = {}
    for name in PEERS:
        module, distribution, _ = _ADAPTERS[name]
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:  # a folder on the path
            found[name] = f"{module} without metadata"
    return found
