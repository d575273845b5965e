"""Fast MoE layers of others that import on this machine: name -> problem -> call."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor


def _liger(problem: Any) -> Callable[[], Tensor]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda: LigerFusedMoEFunction.apply(
        problem.x_TD, problem.w1_EGD, problem.w2_EDF, problem.ids_TK.int(), problem.weight_TK
    )


_ADAPTERS = {"liger": ("liger_kernel", _liger)}
PEERS = {name: adapter for name, (module, adapter) in _ADAPTERS.items() if find_spec(module)}
