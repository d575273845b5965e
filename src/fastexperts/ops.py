"""The forward-only primitives as torch.library ops: schema, shapes (fake), and which backend runs them.

Each op is one line of the dataflow in moe.py. On a GPU the Triton kernels run, elsewhere PyTorch's grouped
GEMM (cpu.py); FASTEXPERTS_BACKEND overrides. No op is differentiable by itself: `moe_mlp` owns the formula,
and a second derivative raises.

Legend: T tokens, K top-k, P = T*K rows, E experts, D model dim, F expert intermediate dim, C parts of h (2
gated, 1 otherwise), G = C*F. Rows behind offsets_E1[E] are undefined in every [P, ...] tensor and never read.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from fastexperts import cpu, settings
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.routing import check_ids


def backend_of(device: torch.device) -> str:
    """ "triton" or "torch" for tensors on `device`; raises where an explicit request cannot be served."""
    requested = settings.backend()
    if requested == "torch" or (requested == "auto" and device.type != "cuda"):
        return "torch"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise refuse(
            "fastexperts",
            "FASTEXPERTS_BACKEND",
            got="'triton' for CPU tensors",
            needs="CUDA tensors, or TRITON_INTERPRET=1",
            way_out="Unset FASTEXPERTS_BACKEND to run PyTorch's grouped GEMM on the CPU.",
        )
    return "triton"


def _implementation(tensor: Tensor) -> ModuleType:
    if backend_of(tensor.device) == "torch":
        return cpu
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        # Triton launches on the current device and its stream, whatever the tensors' device is
        raise refuse(
            "fastexperts",
            "device",
            got=f"tensors on {tensor.device} while cuda:{torch.cuda.current_device()} is the current device",
            needs="tensors on the current device",
            way_out="Call it inside `with torch.cuda.device(x.device):`.",
        )
    try:
        from fastexperts import kernels
    except ImportError as e:
        raise FastexpertsError(
            f"fastexperts: `triton` could not be imported ({e}); CUDA tensors need it. Install triton, or "
            "set FASTEXPERTS_BACKEND=torch for PyTorch's grouped GEMM."
        ) from e
    return kernels


def block_m(device: torch.device, dtype: torch.dtype) -> int:
    """Rows per tile of the schedule that the kernels for (`device`, `dtype`) walk."""
    if backend_of(device) == "torch":
        return 128
    from fastexperts.kernels import tiles

    return tiles.block_m(device, dtype)


@torch.library.custom_op("fastexperts::route", mutates_args=())
def route(ids_TK: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `Routing`: (row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3)."""
    if settings.check_ids():  # here and not in moe_mlp: the body of an op runs under torch.compile too
        check_ids(ids_TK, num_experts)
    return _implementation(ids_TK).route(ids_TK, num_experts, block_m)


@route.register_fake
def _(ids_TK: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_pairs = ids_TK.numel()
    length = 1 + num_pairs // block_m + torch.sym_min(num_pairs, num_experts)
    return (
        ids_TK.new_empty(num_pairs, dtype=torch.int32),
        ids_TK.new_empty(num_pairs, dtype=torch.int32),
        ids_TK.new_empty(num_experts + 1, dtype=torch.int32),
        ids_TK.new_empty((length, 3), dtype=torch.int32),
    )


@torch.library.custom_op("fastexperts::up", mutates_args=())
def up(
    x_TD: Tensor,
    w1_ECFD: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    schedule_S3: Tensor,
    top_k: int,
    act: str,
    params: list[float],
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """h_PG = x_TD[token of row] @ w1^T and a_PF = act(h_PG); h is [0, G] unless `keep_h`."""
    return _implementation(x_TD).up(
        x_TD, w1_ECFD, pair_of_row_P, offsets_E1, schedule_S3, top_k, act, params, keep_h
    )


@up.register_fake
def _(
    x_TD: Tensor,
    w1_ECFD: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    schedule_S3: Tensor,
    top_k: int,
    act: str,
    params: list[float],
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    num_pairs, (_, parts, dim_f, _) = pair_of_row_P.shape[0], w1_ECFD.shape
    return x_TD.new_empty((num_pairs if keep_h else 0, parts * dim_f)), x_TD.new_empty((num_pairs, dim_f))


@torch.library.custom_op("fastexperts::down", mutates_args=())
def down(a_PF: Tensor, w2_EDF: Tensor, offsets_E1: Tensor, schedule_S3: Tensor) -> Tensor:
    """y_PD = a_PF @ w2^T."""
    return _implementation(a_PF).down(a_PF, w2_EDF, offsets_E1, schedule_S3)


@down.register_fake
def _(a_PF: Tensor, w2_EDF: Tensor, offsets_E1: Tensor, schedule_S3: Tensor) -> Tensor:
    return a_PF.new_empty((a_PF.shape[0], w2_EDF.shape[1]))


@torch.library.custom_op("fastexperts::combine", mutates_args=())
def combine(
    y_PD: Tensor, weight_TK: Tensor | None, row_of_pair_P: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    """out_TD = sum_k weight_TK * y_PD[row of (t, k)], k ascending, fp32 sums (fp64 for fp64); no weight
    means 1.
    """
    return _implementation(y_PD).combine(y_PD, weight_TK, row_of_pair_P, top_k, dtype)


@combine.register_fake
def _(
    y_PD: Tensor, weight_TK: Tensor | None, row_of_pair_P: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    return y_PD.new_empty((row_of_pair_P.shape[0] // top_k, y_PD.shape[1]), dtype=dtype)


@torch.library.custom_op("fastexperts::dh", mutates_args=())
def dh(
    dout_TD: Tensor,
    w2_EDF: Tensor,
    h_PG: Tensor,
    weight_TK: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    schedule_S3: Tensor,
    act: str,
    params: list[float],
    need_dh: bool,
    need_wa: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """v_PF = dout_TD[token of row] @ w2, then (dh_PG, wa_PF, dweight_TK); what is not needed comes back
    with 0 rows.

    dh = act'(h) * (weight * v), wa = weight * act(h), dweight = sum_F v * act(h).
    """
    return _implementation(h_PG).dh(
        dout_TD, w2_EDF, h_PG, weight_TK, row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3, act, params,
        need_dh, need_wa, need_dweight,
    )  # fmt: skip


@dh.register_fake
def _(
    dout_TD: Tensor,
    w2_EDF: Tensor,
    h_PG: Tensor,
    weight_TK: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    schedule_S3: Tensor,
    act: str,
    params: list[float],
    need_dh: bool,
    need_wa: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim_f = h_PG.shape[0], w2_EDF.shape[2]
    tokens, top_k = weight_TK.shape
    return (
        torch.empty_like(h_PG[: rows if need_dh else 0]),
        h_PG.new_empty((rows if need_wa else 0, dim_f)),
        weight_TK.new_empty((tokens if need_dweight else 0, top_k)),
    )


@torch.library.custom_op("fastexperts::dx", mutates_args=())
def dx(dh_PG: Tensor, w1_ECFD: Tensor, offsets_E1: Tensor, schedule_S3: Tensor) -> Tensor:
    """dx_PD = dh_PG @ w1."""
    return _implementation(dh_PG).dx(dh_PG, w1_ECFD, offsets_E1, schedule_S3)


@dx.register_fake
def _(dh_PG: Tensor, w1_ECFD: Tensor, offsets_E1: Tensor, schedule_S3: Tensor) -> Tensor:
    return dh_PG.new_empty((dh_PG.shape[0], w1_ECFD.shape[3]))


@torch.library.custom_op("fastexperts::dw1", mutates_args=())
def dw1(
    dh_PG: Tensor,
    x_TD: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    w1_ECFD: Tensor,
) -> Tensor:
    """dw1_ECFD[e] = dh_PG[rows of e]^T @ x_TD[token of rows], in the dtype and the strides of `w1_ECFD`."""
    maps = (row_of_pair_P, pair_of_row_P, offsets_E1, top_k)
    return _implementation(dh_PG).dw(dh_PG, x_TD, *maps, w1_ECFD, False)


@dw1.register_fake
def _(
    dh_PG: Tensor,
    x_TD: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    w1_ECFD: Tensor,
) -> Tensor:
    return torch.empty_like(w1_ECFD)


@torch.library.custom_op("fastexperts::dw2", mutates_args=())
def dw2(
    dout_TD: Tensor,
    wa_PF: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    w2_EDF: Tensor,
) -> Tensor:
    """dw2_EDF[e] = dout_TD[token of rows]^T @ wa_PF[rows of e], in the dtype and the strides of `w2_EDF`."""
    maps = (row_of_pair_P, pair_of_row_P, offsets_E1, top_k)
    return _implementation(wa_PF).dw(dout_TD, wa_PF, *maps, w2_EDF[:, None], True).squeeze(1)


@dw2.register_fake
def _(
    dout_TD: Tensor,
    wa_PF: Tensor,
    row_of_pair_P: Tensor,
    pair_of_row_P: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    w2_EDF: Tensor,
) -> Tensor:
    return torch.empty_like(w2_EDF)


ALL = (route, up, down, combine, dh, dx, dw1, dw2)


def no_double_backward(ctx: object, *grads: Tensor) -> None:
    """The autograd formula of every op: there is none."""
    raise RuntimeError(
        "fastexperts.moe_mlp: `create_graph` got True; it needs False, since there is no second derivative. "
        "Use experts_implementation='eager' for double backward."
    )


for _op in ALL:
    _op.register_autograd(no_double_backward)
