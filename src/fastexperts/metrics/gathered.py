"""What hooks of a model's layers see, gathered over layers: a few operations on stacks of tensors cost the
host less than many on each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Take = Callable[[int, Tensor, Tensor | None, Hashable], None]


class Gathered:
    """Gives `take` the tensors of layers that follow each other as one: (the first one's row, alike tensors
    [layers, ...], which of their rows count or None for all, their kind).

    At most `elements` at once, and all there are at `flush`.
    """

    def __init__(self, take: Take, elements: int) -> None:
        self._take, self._elements = take, elements
        self._tensors: list[Tensor] = []
        self._first = 0
        self._keep_T: Tensor | None = None
        self._kind: Hashable = None

    def add(self, row: int, tensor: Tensor, keep_T: Tensor | None, kind: Hashable = None) -> None:
        """`tensor` is kept until it is taken. Layers of one batch share the object `keep_T`."""
        if self._tensors and not self._goes_on(row, tensor, keep_T, kind):
            self.flush()
        if not self._tensors:
            self._first, self._keep_T, self._kind = row, keep_T, kind
        self._tensors.append(tensor)
        if len(self._tensors) * tensor.numel() >= self._elements:
            self.flush()

    def flush(self) -> None:
        """Have taken what is there."""
        if self._tensors:
            tensors, self._tensors = self._tensors, []
            self._take(self._first, torch.stack(tensors), self._keep_T, self._kind)
        self._keep_T = None

    def clear(self) -> None:
        """Forget what is there."""
        self._tensors, self._keep_T = [], None

    def _goes_on(self, row: int, tensor: Tensor, keep_T: Tensor | None, kind: Hashable) -> bool:
        last = self._tensors[-1]
        alike = (tensor.shape, tensor.dtype, tensor.device) == (last.shape, last.dtype, last.device)
        follows = row == self._first + len(self._tensors)
        return alike and follows and keep_T is self._keep_T and kind == self._kind
