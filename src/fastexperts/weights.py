"""`Weight`: one expert projection of a layer as it is stored, and the one view that the ops compute with.

Layouts are strides. `parts()` gives every stored form as one (E, C, F, D) view (C = 2 for gate and up, else
1) and never copies, so that kernels know one layout and gradients come back in the parameter's own.

    stored                                   view
    [E, 2F, D] gate rows, then up rows       unflatten(1, (C, F))
    [E, 2F, D] interleaved gate0 up0 ...     unflatten(1, (F, C)).transpose(1, 2)
    transposed=True: [E, D, 2F]              transpose(1, 2) first
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastexperts.errors import refuse


@dataclass(frozen=True)
class Weight:
    """An expert projection: `w` [E, out, in], or [E, in, out] when `transposed`; `interleaved` concerns gate
    and up.
    """

    w: Tensor
    transposed: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.w, Tensor):
            raise refuse(
                "Weight",
                "w",
                got=type(self.w).__name__,
                needs="a torch.Tensor",
                way_out="Convert it with torch.as_tensor.",
            )
        if self.w.dim() != 3:
            raise refuse(
                "Weight",
                "w",
                got=f"{self.w.dim()} dimensions {tuple(self.w.shape)}",
                needs="3 dimensions [experts, out, in]",
                way_out="Stack the experts' matrices along a new first dimension.",
            )

    @property
    def out_in(self) -> Tensor:
        """The [E, out, in] view."""
        return self.w.transpose(1, 2) if self.transposed else self.w

    def parts(self, count: int) -> Tensor:
        """The (E, `count`, out / `count`, in) view."""
        w = self.out_in
        if w.shape[1] % count:
            raise refuse(
                "Weight",
                "w",
                got=f"{w.shape[1]} output rows in {tuple(self.w.shape)}",
                needs=f"a multiple of {count} (gate and up)",
                way_out="Use a non-gated activation, or transposed=True if the last dimension is the output.",
            )
        half = w.shape[1] // count
        if self.interleaved:
            return w.unflatten(1, (half, count)).transpose(1, 2)
        return w.unflatten(1, (count, half))


def as_weight(w: Tensor | Weight) -> Weight:
    """A `Weight` as it is, or a tensor in the canonical layout as one."""
    return w if isinstance(w, Weight) else Weight(w)
