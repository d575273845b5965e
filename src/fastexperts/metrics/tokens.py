"""How many tokens a model trains on, and how many keys their queries meet, read off its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastexperts.metrics.mixers import Span


class TokenMeter:
    """Counts tokens, and for each of `spans` the keys that they meet, while `model` trains.

    A micro-batch is one call of `model`, whatever wraps it. Not counted: evaluation, forwards without
    gradients, the recomputation of gradient checkpointing, and padding, which `attention_mask` tells.
    Documents that are packed into one row are told by `position_ids`, which begin at 0 in each; there,
    without a mask, a document of a single token is not counted, since padding looks like one. Counting
    needs no host synchronisation; `take` does.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Span] = (), *, causal: bool = True) -> None:
        """causal: count the keys up to a query itself, as far as `spans` say so; else all of its document."""
        self._spans, self._causal = tuple(spans), causal
        self._counts: Tensor | None = None
        self._handle: RemovableHandle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self) -> tuple[int, dict[Span, int]]:
        """(tokens, keys met by span) since the last call, of this process."""
        counts = [0] * (1 + len(self._spans)) if self._counts is None else self._counts.tolist()
        self._counts = None
        return counts[0], dict(zip(self._spans, counts[1:], strict=True))

    def stop(self) -> None:
        """Count no more."""
        self._handle.remove()

    @torch.compiler.disable
    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In a backward, a forward is gradient checkpointing's recomputation: its tokens are counted.
        if not (module.training and torch.is_grad_enabled()) or torch._C._current_graph_task_id() != -1:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return
        batch, length = tokens.shape[:2]
        counts = count(
            _of_shape(kwargs.get("attention_mask"), batch, length),
            _of_shape(kwargs.get("position_ids"), batch, length),
            torch.ones(batch, length, dtype=torch.bool, device=tokens.device),
            self._spans,
            causal=self._causal,
        )
        self._counts = counts if self._counts is None else self._counts + counts


def count(
    mask_BS: Tensor | None, position_BS: Tensor | None, all_BS: Tensor, spans: Sequence[Span], *, causal: bool
) -> Tensor:
    """(tokens, keys met in each of `spans`) of a batch of B rows of S, `[1 + spans]` int64 on its device."""
    keep_BS = all_BS if mask_BS is None else mask_BS.bool()
    seen_BS = keep_BS.long().cumsum(1) if position_BS is None else position_BS.long() + 1
    # A document ends where the next token is no successor: it is another one's, padding, or there is none.
    successor_BS = (seen_BS[:, 1:] == seen_BS[:, :-1] + 1) & keep_BS[:, 1:]
    end_BS = keep_BS & ~nn.functional.pad(successor_BS, (0, 1))
    if position_BS is not None and mask_BS is None:
        alone_BS = end_BS & (seen_BS == 1)
        keep_BS, end_BS = keep_BS & ~alone_BS, end_BS & ~alone_BS
    counts = [keep_BS.sum()]
    for span in spans:
        met_BS = span.met(seen_BS)
        charged_BS = keep_BS * met_BS if causal and span.causal else end_BS * seen_BS * met_BS
        counts.append(charged_BS.sum())
    return torch.stack(counts)


def _of_shape(value: Any, batch: int, length: int) -> Tensor | None:
    """`value` [batch, length], expanded if it is one row for all; None if it is something else."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != length:
        return None
    return value.expand(batch, length) if value.shape[0] in (1, batch) else None
