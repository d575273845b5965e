"""Which backend computes: the Triton kernels on a GPU, PyTorch's grouped GEMM (cpu.py) elsewhere;
FASTEXPERTS_BACKEND overrides.

`Backend` lists the primitives that moe.py composes, one per line of its dataflow. They are plain functions:
torch.library sees the layer whole (ops.py), because a dispatch of each costs more host time than its launch.

Legend: T tokens, K top-k, P = T*K rows, E experts, D model dim, F expert intermediate dim, C parts of h (2
gated, 1 otherwise), G = C*F. Rows behind offsets_E1[E] are undefined in every [P, ...] tensor and never read.
"""

from __future__ import annotations

import contextlib
from typing import Protocol, cast

import torch
from torch import Tensor

from fastexperts import cpu, settings
from fastexperts.activations import Activation
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.routing import Routing
from fastexperts.weights import Step


class Backend(Protocol):
    """The primitives. Each is forward-only and reads its tensors where they lie."""

    @staticmethod
    def block_m(device: torch.device, dtype: torch.dtype) -> int:
        """Rows per tile of the schedule that this backend walks for (`device`, `dtype`)."""

    @staticmethod
    def route(ids_TK: Tensor, num_experts: int, block_m: int) -> Routing:
        """Rows sorted by expert, without host synchronisation."""

    @staticmethod
    def up(
        x_TD: Tensor,
        w1_EGD: Tensor,
        bias_EG: Tensor | None,
        routing: Routing,
        activation: Activation,
        keep_h: bool,
        more: Step | None = None,
    ) -> tuple[Tensor, Tensor]:
        """h_PG = x_TD[token of row] @ w1^T + bias and a_PF = act(h_PG); h is [0, G] unless `keep_h`."""

    @staticmethod
    def down(
        a_PF: Tensor, w2_EDF: Tensor, bias_ED: Tensor | None, routing: Routing, more: Step | None = None
    ) -> Tensor:
        """y_PD = a_PF @ w2^T + bias."""

    @staticmethod
    def combine(y_PD: Tensor, weight_TK: Tensor | None, routing: Routing, dtype: torch.dtype) -> Tensor:
        """out_TD = sum_k weight_TK * y_PD[row of (t, k)], k ascending, fp32 sums (fp64 for fp64); no weight
        means 1.
        """

    @staticmethod
    def dh(
        dout_TD: Tensor,
        w2_EDF: Tensor,
        h_PG: Tensor,
        weight_TK: Tensor,
        routing: Routing,
        activation: Activation,
        needs: tuple[bool, bool, bool],
        more: Step | None = None,
        plus_TK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """v_PF = dout_TD[token of row] @ w2, then (dh_PG, wa_PF, dweight_TK); of what `needs` does not ask
        for comes back 0 rows.

        dh = act'(h) * (weight * v), wa = weight * act(h), dweight = plus + sum_F v * act(h).
        """

    @staticmethod
    def dx(dh_PG: Tensor, w1_EGD: Tensor, routing: Routing, more: Step | None = None) -> Tensor:
        """dx_PD = dh_PG @ w1."""

    @staticmethod
    def shrink(rows: Tensor, factor_ERK: Tensor, routing: Routing, tokens: bool) -> Tensor:
        """rows_PR = rows @ factor^T for a factor with few outputs; `tokens`: rows holds tokens, of rows taken
        as in `up`.
        """

    @staticmethod
    def dw(
        left: Tensor,
        right: Tensor,
        routing: Routing,
        like_EMN: Tensor,
        tokens: str = "",
    ) -> Tensor:
        """dw[e] = left_PM[rows of e]^T @ right_PN[rows of e], strides and dtype as `like`; `tokens`: "left"
        or "right" holds tokens, of rows taken as in `up`.
        """

    @staticmethod
    def dfactor(
        rows: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool, scale: float = 1.0
    ) -> Tensor:
        """dfactor[e] = scale * against[rows of e]^T @ rows[rows of e], of the first r columns of `against`,
        laid out as `like` and in its dtype; `tokens` as in `shrink`.
        """

    @staticmethod
    def shrink_dfactor(
        rows: Tensor, factor_ERN: Tensor, against_PR: Tensor, routing: Routing, like_ErN: Tensor, tokens: bool
    ) -> tuple[Tensor, Tensor]:
        """(shrink, dfactor) of `rows`, which may be read once for both."""

    @staticmethod
    def weigh(rows_PR: Tensor, weight_TK: Tensor, routing: Routing) -> Tensor:
        """Each row times its pair's weight; for few columns."""

    @staticmethod
    def pack(
        a_ErK: Tensor, b_ENr: Tensor, scale: float, rank: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(scale * a [E, R, K], b [E, N, R]) in `dtype`, contiguous, 0 behind r: an update's factors as
        products read them.
        """

    @staticmethod
    def db(rows: Tensor, weight_TK: Tensor | None, routing: Routing, like_EN: Tensor) -> Tensor:
        """db[e] = sum of rows_PN over the rows of e, dtype as `like`. With a weight, rows holds tokens and
        each is taken times its pair's weight.
        """


def name(device: torch.device) -> str:
    """ "triton" or "torch" for tensors on `device`; raises where an explicit request cannot be served."""
    requested = settings.backend()
    if requested == "torch" or (requested == "auto" and device.type != "cuda"):
        return "torch"
    if device.type == "cpu" and not settings.interpreted():
        raise refuse(
            "fastexperts",
            "FASTEXPERTS_BACKEND",
            got="'triton' for CPU tensors",
            needs="CUDA tensors, or TRITON_INTERPRET=1",
            way_out="Unset FASTEXPERTS_BACKEND to run PyTorch's grouped GEMM on the CPU.",
        )
    return "triton"


def load(device: torch.device) -> Backend:
    """The backend for tensors on `device`."""
    if name(device) == "torch":
        return cast(Backend, cpu)
    try:
        from fastexperts import kernels
    except ImportError as e:
        raise FastexpertsError(
            f"fastexperts: `triton` could not be imported ({e}); CUDA tensors need it. Install triton, or "
            "set FASTEXPERTS_BACKEND=torch for PyTorch's grouped GEMM."
        ) from e
    return cast(Backend, kernels)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current one: Triton launches there, whatever device its tensors are on. A model that
    accelerate spread over several GPUs calls its layers wherever they are.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
