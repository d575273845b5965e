"""How many tokens each expert gets: counted where the experts are called, whatever router a family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class ExpertLoad:
    """Counts routed tokens per layer and expert while `model` trains; a context manager.

    The experts' input is read, `experts(hidden_states, top_k_index, top_k_weights)`: every family in
    transformers' experts interface has it. Not counted: evaluation, the recomputation of gradient
    checkpointing, padding (where the batch has an attention mask), and ids that are no local expert.
    Counting needs no host synchronisation; `counts` does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if _is_experts(module)}
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._counts: dict[str, Tensor] = {}
        self._keep: Tensor | None = None

    def __enter__(self) -> ExpertLoad:
        hook = self._model.register_forward_pre_hook(self._note_padding, with_kwargs=True)
        self._handles.append(hook)
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_pre_hook(self._counter(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._keep = None

    def counts(self) -> Tensor:
        """Routed tokens so far, `[layers, experts]` int64 on the CPU; layers in the model's order.

        A model whose layers differ in their number of experts gets columns of zeros on the right.
        """
        sizes = [int(module.num_experts) for module in self.layers.values()]
        table = torch.zeros(len(sizes), max(sizes, default=0), dtype=torch.int64)
        for row, (name, size) in enumerate(zip(self.layers, sizes, strict=True)):
            if name in self._counts:
                table[row, :size] = self._counts[name][:size].cpu()
        return table

    def _note_padding(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._keep = mask.reshape(-1).bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _counter(self, name: str) -> Any:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # In a backward, a forward is gradient checkpointing's recomputation: its tokens are counted.
            if not module.training or torch._C._current_graph_task_id() != -1:
                return
            index_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
            self._add(name, int(module.num_experts), index_TK.detach())

        return count

    def _add(self, name: str, experts: int, index_TK: Tensor) -> None:
        counts = self._counts.get(name)
        if counts is None:
            # One more bin takes what is not counted, so that nothing is selected and nothing synchronised.
            counts = self._counts[name] = torch.zeros(experts + 1, dtype=torch.int64, device=index_TK.device)
        valid_TK = (index_TK >= 0) & (index_TK < experts)
        if self._keep is not None and self._keep.numel() == index_TK.shape[0]:
            valid_TK = valid_TK & self._keep[:, None].to(index_TK.device)
        bins = torch.where(valid_TK, index_TK, experts).reshape(-1)
        counts.scatter_add_(0, bins, torch.ones_like(bins))


def _is_experts(module: nn.Module) -> bool:
    # What transformers' use_experts_implementation sets on each instance.
    return "is_concatenated" in vars(module) and hasattr(module, "num_experts")


def imbalance(counts_LE: Tensor) -> list[float]:
    """Per layer, the busiest expert's load over the mean load: 1 is even, the number of experts the worst."""
    counts = counts_LE.double()
    return (counts.amax(1) / counts.mean(1).clamp(min=torch.finfo(torch.float64).tiny)).tolist()
