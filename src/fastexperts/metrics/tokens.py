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
        batch = _batch(args, kwargs)
        if batch is None:
            return
        counts = count(*batch, self._spans, causal=self._causal)
        self._counts = counts if self._counts is None else self._counts + counts


class TrainedTokens:
    """Tells modules inside of `model` which rows of their input are tokens that are trained on.

    Those of a forward with gradients, without padding (told as by `TokenMeter`), and not those that gradient
    checkpointing computes once more. Neither needs host synchronisation.
    """

    def __init__(self, model: Any) -> None:
        # Some losses call the decoder by itself, past the model.
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        self._outer: list[nn.Module] = [model] if decoder is model else [model, decoder]
        self._handles: list[RemovableHandle] = []
        self._forget()

    def start(self) -> None:
        """Watch the batches."""
        for module in self._outer:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def counts(self, module: nn.Module) -> bool:
        """Whether the forward of `module` that is running trains."""
        # In a backward, a forward is gradient checkpointing's recomputation: its tokens are counted. The
        # first pass may run without gradients, so it is the model's call that tells.
        return module.training and self._trains and torch._C._current_graph_task_id() == -1

    def keep(self, rows: int, device: torch.device) -> Tensor | None:
        """[rows] bool on `device`, False for padding; None where all count, or rows are no batch's tokens."""
        if self._keep is None or self._keep.numel() != rows:
            return None
        return self._keep.to(device)

    def _forget(self) -> None:
        self._depth, self._trains = 0, True
        self._keep: Tensor | None = None

    @torch.compiler.disable
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0:
            self._trains = torch.is_grad_enabled()
        if self._keep is None:
            batch = _batch(args, kwargs)
            no_padding = batch is None or (batch[0] is None and batch[1] is None)
            self._keep = None if no_padding or batch is None else documents(*batch)[0].reshape(-1)
        self._depth += 1

    @torch.compiler.disable
    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self._forget()


Batch = tuple[Tensor | None, Tensor | None, Tensor]
"""(mask, positions, all true) of a batch, each [B, S]; None for what it does not have."""


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch | None:
    """What of a model's arguments tells its tokens; None if there are none."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    batch, length = tokens.shape[:2]
    return (
        _of_shape(kwargs.get("attention_mask"), batch, length),
        _of_shape(kwargs.get("position_ids"), batch, length),
        torch.ones(batch, length, dtype=torch.bool, device=tokens.device),
    )


def documents(
    mask_BS: Tensor | None, position_BS: Tensor | None, all_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of B rows of S tokens: is it no padding; its number in its document, from 1; is it the last."""
    keep_BS = all_BS if mask_BS is None else mask_BS.bool()
    seen_BS = keep_BS.long().cumsum(1) if position_BS is None else position_BS.long() + 1
    # A document ends where the next token is no successor: it is another one's, padding, or there is none.
    successor_BS = (seen_BS[:, 1:] == seen_BS[:, :-1] + 1) & keep_BS[:, 1:]
    end_BS = keep_BS & ~nn.functional.pad(successor_BS, (0, 1))
    if position_BS is not None and mask_BS is None:
        alone_BS = end_BS & (seen_BS == 1)
        keep_BS, end_BS = keep_BS & ~alone_BS, end_BS & ~alone_BS
    return keep_BS, seen_BS, end_BS


def count(
    mask_BS: Tensor | None, position_BS: Tensor | None, all_BS: Tensor, spans: Sequence[Span], *, causal: bool
) -> Tensor:
    """(tokens, keys met in each of `spans`) of a batch of B rows of S, `[1 + spans]` int64 on its device."""
    keep_BS, seen_BS, end_BS = documents(mask_BS, position_BS, all_BS)
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
