"""How many tokens each expert gets: counted where the experts are called, whatever router a family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastexperts.metrics.gathered import Gathered
from fastexperts.metrics.tokens import TrainedTokens

GATHERED = 1 << 21
"""Ids that are counted at once: 16 MB."""


class ExpertLoad:
    """Counts routed tokens per layer and expert while `model` trains; a context manager.

    The experts' input is read, `experts(hidden_states, top_k_index, top_k_weights)`: every family in
    transformers' experts interface has it. Not counted: evaluation, forwards without gradients, the
    recomputation of gradient checkpointing, padding, and ids that are no expert. Counting needs no host
    synchronisation; `counts` does.
    """

    def __init__(self, model: nn.Module, tokens: TrainedTokens | None = None) -> None:
        """tokens: what tells the trained ones, if somebody else starts and stops it; default: its own."""
        self.layers: dict[str, Any] = {
            n: module for n, module in model.named_modules() if _is_experts(module)
        }
        self.experts = [_experts(module) for module in self.layers.values()]
        """Experts of each layer, on all processes if they are spread over several."""
        self.top_k: dict[str, int] = {}
        """Experts of a token, by layer, once one has been seen."""
        self._tokens, self._owns_tokens = tokens or TrainedTokens(model), tokens is None
        self._handles: list[RemovableHandle] = []
        self._columns = 1 + max(self.experts, default=0)
        self._tables: dict[torch.device, Tensor] = {}
        self._gathered = Gathered(self._count, GATHERED)

    def __enter__(self) -> ExpertLoad:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Count from here on."""
        if self._owns_tokens:
            self._tokens.start()
        for row, (name, module) in enumerate(self.layers.items()):
            hook = self._counter(row, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def stop(self) -> None:
        """Count no more; what was counted stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._owns_tokens:
            self._tokens.stop()

    def counts(self) -> Tensor:
        """Routed tokens so far, `[layers, experts]` int64 on the CPU; layers in the model's order.

        A model whose layers differ in their number of experts gets columns of zeros on the right.
        """
        return self.table(torch.device("cpu"))

    def table(self, device: torch.device) -> Tensor:
        """`counts` on `device`: nothing waits for it if it is the model's."""
        self._gathered.flush()
        shape = len(self.experts), self._columns - 1
        table_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        for counts_LE in self._tables.values():
            table_LE += counts_LE[:, :-1].to(device)
        return table_LE

    def reset(self) -> None:
        """Start again from zero."""
        self._gathered.clear()
        for counts_LE in self._tables.values():
            counts_LE.zero_()

    def _counter(self, row: int, name: str) -> Any:
        @torch.compiler.disable
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._tokens.counts(module):
                index_TK = (args[1] if len(args) > 1 else kwargs["top_k_index"]).detach()
                self.top_k[name] = index_TK.shape[-1]
                keep_T = self._tokens.keep(index_TK.shape[0], index_TK.device)
                self._gathered.add(row, index_TK, keep_T, self.experts[row])

        return count

    def _count(self, first: int, index_LTK: Tensor, keep_T: Tensor | None, experts: Any) -> None:
        """The ids of layers from row `first` on, with `experts` each."""
        device, columns = index_LTK.device, self._columns
        if device not in self._tables:
            # One more column takes what is not counted, so that nothing is selected and nothing synchronised.
            shape = len(self.experts), columns
            self._tables[device] = torch.zeros(shape, dtype=torch.int64, device=device)
        valid_LTK = (index_LTK >= 0) & (index_LTK < experts)
        if keep_T is not None:
            valid_LTK = valid_LTK & keep_T[:, None]
        row_L11 = torch.arange(first, first + len(index_LTK), device=device)[:, None, None]
        bins = torch.where(valid_LTK, index_LTK, columns - 1).add(row_L11 * columns).reshape(-1)
        self._tables[device].view(-1).scatter_add_(0, bins, torch.ones_like(bins))


def _is_experts(module: nn.Module) -> bool:
    # What transformers' use_experts_implementation sets on each instance.
    return "is_concatenated" in vars(module) and hasattr(module, "num_experts")


def _experts(module: Any) -> int:
    """The number of experts among which ids given to `module` choose."""
    if not getattr(module, "_is_expert_parallel", False):
        return int(module.num_experts)
    # `num_experts` is then of this process alone, while ids passed to the module are of all processes, as a
    # DTensor's shape is. A parametrization, as LoRA adds one, is not evaluated.
    down = module._parameters.get("down_proj")
    return int((module.parametrizations["down_proj"].original if down is None else down).shape[0])
