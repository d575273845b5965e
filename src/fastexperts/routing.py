"""Which token goes to which expert, in which row: `Routing`, and its plain PyTorch construction.

Legend: T tokens, K top-k, P = T*K pairs (pair = t*K + k), E experts, S tiles of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastexperts.errors import FastexpertsError, refuse


@dataclass(frozen=True)
class Routing:
    """Rows are pairs sorted by expert, ties in pair order. Integer tensors (int32), all on the device of the
    ids.

    Example, T = 3, K = 2, E = 3, ids [[2, 0], [0, 3], [2, 2]] (3 is a sentinel: no expert here), block_m = 2:

        row_of_pair_P  [2, 0, 1, -1, 3, 4]    pair 0 (token 0, expert 2) lies in row 2
        pair_of_row_P  [1, 2, 0, 4, 5, -1]    row 0 holds pair 1; row 5 holds nothing
        offsets_E1     [0, 2, 2, 5]           expert 0: rows 0-1, expert 1: none, expert 2: rows 2-4
        schedule_S3    [[3, 2, 0], [0, 0, 2], [2, 2, 5], [2, 4, 5], ...]

    row_of_pair_P: row of a pair, -1 for a pair without an expert; injective elsewhere.
    pair_of_row_P: its inverse on rows [0, offsets_E1[E]); -1 in the rows behind.
    offsets_E1: rows [offsets[e], offsets[e+1]) belong to expert e; offsets[0] = 0, not decreasing.
    schedule_S3: entry 0 is (live tiles, block_m, 0); entry 1 + i is (expert, first row, end of the expert's
        rows) of tile i. A tile covers up to block_m rows and never crosses into the next expert; entries
        behind the live ones are undefined. The 0 counts the blocks that a launch has claimed while it runs
        (kernels/ring.py), and is 0 again after it.
    """

    row_of_pair_P: Tensor
    pair_of_row_P: Tensor
    offsets_E1: Tensor
    schedule_S3: Tensor
    top_k: int

    def __post_init__(self) -> None:
        if self.row_of_pair_P.shape != self.pair_of_row_P.shape or self.row_of_pair_P.dim() != 1:
            raise FastexpertsError(
                f"Routing: `row_of_pair_P` {tuple(self.row_of_pair_P.shape)} and `pair_of_row_P` "
                f"{tuple(self.pair_of_row_P.shape)} need one shape [P]. Take both from one call of `route`."
            )
        if self.top_k < 1 or self.row_of_pair_P.shape[0] % self.top_k:
            raise FastexpertsError(
                f"Routing: `top_k` {self.top_k} does not divide {self.row_of_pair_P.shape[0]} pairs. "
                "Give the K of the ids that were routed."
            )

    @classmethod
    def of(cls, tensors: Sequence[Tensor], top_k: int) -> Routing:
        """The inverse of (`tensors`, `top_k`)."""
        row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3 = tensors
        return cls(row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3, top_k)

    @property
    def num_pairs(self) -> int:
        """P"""
        return self.row_of_pair_P.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor fields in order, as they travel through an op's schema."""
        return [self.row_of_pair_P, self.pair_of_row_P, self.offsets_E1, self.schedule_S3]


def schedule_length(num_pairs: int, num_experts: int, block_m: int) -> int:
    """S: entry 0 and the most tiles that any routing of `num_pairs` rows over `num_experts` can need."""
    least = min if type(num_pairs) is int else torch.sym_min  # the latter under torch.compile
    return 1 + num_pairs // block_m + least(num_pairs, num_experts)


def route_torch(ids_TK: Tensor, num_experts: int, block_m: int) -> Routing:
    """`Routing` in plain PyTorch, without host synchronisation; the kernels' reference."""
    ids_P = ids_TK.reshape(-1).long()
    num_pairs, device = ids_P.numel(), ids_P.device
    bucket_P = torch.where((ids_P >= 0) & (ids_P < num_experts), ids_P, num_experts)
    order_P = torch.argsort(bucket_P, stable=True)
    has_row_P = bucket_P[order_P] < num_experts
    pair_of_row_P = torch.where(has_row_P, order_P, -1)
    row_of_pair_P = torch.full_like(order_P, -1).scatter(
        0, order_P, torch.where(has_row_P, torch.arange(num_pairs, device=device), -1)
    )
    count_E = torch.zeros(num_experts + 1, dtype=torch.long, device=device)
    count_E = count_E.scatter_add(0, bucket_P, torch.ones_like(bucket_P))[:num_experts]
    offsets_E1 = torch.nn.functional.pad(count_E.cumsum(0), (1, 0))

    tiles_E = (count_E + block_m - 1) // block_m
    end_E = tiles_E.cumsum(0)
    tile_S = torch.arange(schedule_length(num_pairs, num_experts, block_m) - 1, device=device)
    expert_S = torch.searchsorted(end_E, tile_S, right=True).clamp(max=num_experts - 1)
    first_S = offsets_E1[expert_S] + (tile_S - (end_E - tiles_E)[expert_S]) * block_m
    head_13 = torch.stack([end_E[-1], torch.full_like(end_E[-1], block_m), torch.zeros_like(end_E[-1])])[None]
    schedule_S3 = torch.cat([head_13, torch.stack([expert_S, first_S, offsets_E1[expert_S + 1]], dim=1)])
    tensors = (row_of_pair_P, pair_of_row_P, offsets_E1, schedule_S3)
    return Routing.of([tensor.to(torch.int32) for tensor in tensors], ids_TK.shape[1])


def check_ids(ids_TK: Tensor, num_experts: int) -> None:
    """Raise if an id is neither an expert [0, E) nor a sentinel (-1 or E). Synchronises with the device."""
    wrong = (ids_TK < -1) | (ids_TK > num_experts)
    if wrong.any():
        raise refuse(
            "moe_mlp",
            "ids_TK",
            got=f"the id {int(ids_TK[wrong][0])}",
            needs=f"ids in [0, {num_experts}), or the sentinels -1 and {num_experts}",
            way_out="Check the router's number of experts (this check is on because FASTEXPERTS_CHECK=1).",
        )
