"""The primitives of backend.Backend as Triton kernels, one file per operation. Importing this package imports
Triton.

Kernel locals: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ block; every pointer argument names its
shape.
"""

from fastexperts.kernels.combine import combine, weigh
from fastexperts.kernels.copy_scaled import pack
from fastexperts.kernels.grouped_dw import dw
from fastexperts.kernels.grouped_mm import dh, down, dx, shrink, up
from fastexperts.kernels.low_rank import dfactor, shrink_dfactor
from fastexperts.kernels.routing import route
from fastexperts.kernels.sum_rows import db
from fastexperts.kernels.tiles import block_m

__all__ = [
    "block_m",
    "combine",
    "db",
    "dfactor",
    "dh",
    "down",
    "dw",
    "dx",
    "pack",
    "route",
    "shrink",
    "shrink_dfactor",
    "up",
    "weigh",
]
