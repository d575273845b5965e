"""Tile choices as data: TABLE[architecture, bytes per element][pass], and RINGS[pass] on Hopper. Nothing is
tuned at run time.

A developer's tool measures candidates (benchmarks/tune.py). `m` of the row-tiled passes is fixed
per (architecture, bytes): the schedule of a routing is made for it, and a token's result does not depend on
its batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from fastexperts import settings
from fastexperts.errors import refuse

PASSES = ("up", "down", "dh", "dx", "dw", "shrink", "dfactor")


@dataclass(frozen=True)
class Tile:
    """One program's block [m, n] of the output, `k` of the contraction a step; `group` row tiles share L2.

    programs_per_sm: 0 is a program per block, else a persistent grid; flatten: its two loops pipelined as
    one; subtiles: column slices of the epilogue. Of "dfactor", `m` is the rank up to which blocks have `n`
    columns (a higher one has fewer), and there is a program per block.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 4
    group: int = 8
    programs_per_sm: int = 1
    flatten: bool = False
    subtiles: int = 1

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tile: `{name}` got {value}; it needs a power of two. Round it.")


@dataclass(frozen=True)
class Ring:
    """A Hopper kernel's slots (48 KB each: blocks of 128 x 64 and 64 x 256), its L2 group, and staging
    buffers of 8 KB a consumer. producer_registers: of 504 a thread, the consumers share the rest.

    alone_mb: from how many MB of an expert's matrix on, and below how many, a row tile of `up`, `down`, `dh`
    or `dx` walks the columns alone, a group of 1: L2 can hold the matrix for the tile after it (docs/log.md).
    """

    stages: int = 4
    group: int = 8
    alone_mb: tuple[int, int] = (0, 0)
    buffers: int = 2
    producer_registers: int = 40

    def __post_init__(self) -> None:
        if self.buffers not in (1, 2):
            # a block's stores are an even number, so that two buffers alternate across blocks as within one
            raise ValueError(
                f"Ring: `buffers` got {self.buffers}; it needs 1 or 2. More would be overwritten."
            )

    def group_of(self, matrix_bytes: int) -> int:
        """`group`, or 1 where row tiles walk alone."""
        least, most = self.alone_mb
        return 1 if least <= matrix_bytes / 1e6 < most else self.group


# Where these run, m of the tables below is 128 and n of "dh" 256, as in a ring's blocks: they share schedules
# and the partial sums of dweight.
RINGS: dict[str, Ring] = {
    # below 20 MB the gathered rows of `up` want company (docs/log.md)
    "up": Ring(group=16, alone_mb=(20, 32), producer_registers=56),
    "down": Ring(group=4, alone_mb=(10, 32)),
    # h takes 64 KB
    "dh": Ring(stages=3, group=4, alone_mb=(10, 32), buffers=1, producer_registers=48),
    "dx": Ring(group=4, alone_mb=(10, 32)),
    "dw1": Ring(group=4, producer_registers=56),
    "dw2": Ring(group=8, producer_registers=56),
}


def narrowed(tile: Tile, **dims: int) -> Tile:
    """`tile`, no larger than a product with this few rows (`m`) and columns (`n`) needs."""
    fitting = {
        name: min(getattr(tile, name), max(16, 1 << (dim - 1).bit_length())) for name, dim in dims.items()
    }
    return replace(tile, **fitting, subtiles=1 if fitting["n"] < tile.n else tile.subtiles)


def fitted(size: int, dim: int) -> int:
    """`size` of a block, or less: until the blocks of `dim` have an eighth behind its end at most."""
    size = min(size, max(16, 1 << (dim - 1).bit_length()))
    while size > 64 and -dim % size > dim // 8:
        size //= 2
    return size


def _small(m: int, warps: int = 4) -> dict[str, Tile]:
    return dict.fromkeys(PASSES, Tile(m, m, 32, warps=warps, stages=2, subtiles=2))


_INTERPRETED = _small(32) | {"dfactor": Tile(32, 128, 32)}

TABLE: dict[tuple[str, int], dict[str, Tile]] = {
    ("sm90", 2): {
        "up": Tile(128, 128, 64, programs_per_sm=0, subtiles=4),
        "down": Tile(128, 256, 64, stages=3, flatten=True, subtiles=4),
        "dh": Tile(128, 256, 64, stages=3, programs_per_sm=0, subtiles=8),
        "dx": Tile(128, 256, 64, stages=3, group=16, flatten=True, subtiles=2),
        "dw": Tile(128, 256, 64, stages=3, subtiles=2),
        "shrink": Tile(128, 128, 64, warps=4, programs_per_sm=0),
        "dfactor": Tile(64, 256, 64),
    },
    ("sm90 pointers", 2): {  # not flattened: address arithmetic does not pipeline across blocks
        "up": Tile(128, 128, 64, programs_per_sm=0, subtiles=4),
        "down": Tile(128, 256, 64, stages=3, programs_per_sm=0, subtiles=4),
        "dh": Tile(128, 256, 64, stages=3, programs_per_sm=0, subtiles=8),
        "dx": Tile(128, 256, 64, stages=3, programs_per_sm=0, subtiles=2),
        "dw": Tile(128, 256, 64, stages=3, subtiles=2),
        "shrink": Tile(128, 128, 64, warps=4, programs_per_sm=0),
        "dfactor": Tile(64, 256, 64),
    },
    ("sm80", 2): {
        "up": Tile(128, 64, 64, stages=3),
        "down": Tile(128, 128, 64, stages=3),
        "dh": Tile(128, 128, 32, stages=3, subtiles=4),
        "dx": Tile(128, 128, 64, stages=3),
        "dw": Tile(128, 128, 32, stages=3),
        "shrink": Tile(128, 128, 32, stages=3),
        "dfactor": Tile(32, 128, 64, warps=4, stages=3),
    },
    ("gpu", 4): _small(64, warps=8),  # 4 warps spill: up 13 KB a thread
    ("gpu", 8): _small(16),
    ("interpreter", 2): _INTERPRETED,
    ("interpreter", 4): _INTERPRETED,
    ("interpreter", 8): _INTERPRETED,
}


# by what shared memory holds: 227 KB a block in 9 and 10, about 100 in 8.6, 8.9 and 12
_ARCHITECTURES = {8: "sm80", 9: "sm90", 10: "sm90", 12: "sm80"}


def tile(device: torch.device, dtype: torch.dtype, name: str) -> Tile:
    """The tile of pass `name` (one of `PASSES`) for tensors of `dtype` on `device`."""
    return TABLE[_key(device, dtype)][name]


def block_m(device: torch.device, dtype: torch.dtype) -> int:
    """Rows per tile, the same for every row-tiled pass."""
    return tile(device, dtype, "up").m


def _key(device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    interpreted = device.type == "cpu" or settings.interpreted()
    if interpreted and dtype == torch.bfloat16:
        raise refuse(
            "fastexperts",
            "TRITON_INTERPRET",
            got="1, for bfloat16",
            needs="float16, float32 or float64: Triton's interpreter computes bf16 wrongly",
            way_out="Unset it and FASTEXPERTS_BACKEND.",
        )
    if interpreted:
        return "interpreter", dtype.itemsize
    if dtype.itemsize > 2:
        return "gpu", dtype.itemsize
    arch = _architecture(device)
    return ("sm90 pointers" if arch == "sm90" and not settings.allow_tma() else arch), 2


@functools.cache
def _architecture(device: torch.device) -> str:
    major = torch.cuda.get_device_capability(device)[0]
    if torch.version.hip or major not in _ARCHITECTURES:
        raise refuse(
            "fastexperts",
            "device",
            got=torch.cuda.get_device_name(device),
            needs="an NVIDIA GPU of compute capability 8, 9, 10 or 12",
            way_out="Set FASTEXPERTS_BACKEND=torch for PyTorch's grouped GEMM.",
        )
    return _ARCHITECTURES[major]
