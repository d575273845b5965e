"""The environment variables of fastexperts, and Triton's TRITON_INTERPRET, all read here and at the time of
the call.

FASTEXPERTS_BACKEND  auto (default) | triton | torch: which implementation of the ops runs.
FASTEXPERTS_CHECK    1: validate expert ids on every call (synchronises with the device).
FASTEXPERTS_TMA      0: use pointer operands where tensor descriptors would be used.
"""

from __future__ import annotations

import os

from fastexperts.errors import refuse

BACKENDS = ("auto", "triton", "torch")


def backend() -> str:
    """The requested implementation, one of `BACKENDS`."""
    value = os.environ.get("FASTEXPERTS_BACKEND", "auto")
    if value not in BACKENDS:
        raise refuse(
            "fastexperts",
            "FASTEXPERTS_BACKEND",
            got=repr(value),
            needs=f"one of {', '.join(BACKENDS)}",
            way_out="Unset it to let the device decide.",
        )
    return value


def check_ids() -> bool:
    """Whether every call validates its expert ids."""
    return _flag("FASTEXPERTS_CHECK", default=False)


def allow_tma() -> bool:
    """Whether kernels may use tensor descriptors where the hardware and the strides allow them."""
    return _flag("FASTEXPERTS_TMA", default=True)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _flag(name: str, *, default: bool) -> bool:
    value = os.environ.get(name)
    if value is None:
        return default
    if value not in ("0", "1"):
        raise refuse(
            "fastexperts", name, got=repr(value), needs="0 or 1", way_out="Unset it for the default."
        )
    return value == "1"
