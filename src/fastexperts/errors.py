"""The one exception users meet, and the one form of its message."""

from __future__ import annotations


class FastexpertsError(ValueError):
    """Raised for a request that cannot be served; the message names argument, got, needed and the way out."""


def refuse(where: str, argument: str, *, got: object, needs: str, way_out: str) -> FastexpertsError:
    """Build the error for `argument` of `where`: what it got, what it needs, and how to get out of it."""
    return FastexpertsError(f"{where}: `{argument}` got {got}; it needs {needs}. {way_out}")
