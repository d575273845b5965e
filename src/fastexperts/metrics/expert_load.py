"""How many tokens each expert gets: counted where the experts are called, whatever router a family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastexperts.metrics.tokens import TrainedTokens


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
        self._counts: dict[str, Tensor] = {}

    def __enter__(self) -> ExpertLoad:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Count from here on."""
        if self._owns_tokens:
            self._tokens.start()
        for (name, module), experts in zip(self.layers.items(), self.experts, strict=True):
            hook = self._counter(name, experts)
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
        table_LE = torch.zeros(
            len(self.experts), max(self.experts, default=0), dtype=torch.int64, device=device
        )
        for row_E, name, experts in zip(table_LE, self.layers, self.experts, strict=True):
            if name in self._counts:
                row_E[:experts].copy_(self._counts[name][:experts])
        return table_LE

    def reset(self) -> None:
        """Start again from zero."""
        for counts in self._counts.values():
            counts.zero_()

    def _counter(self, name: str, experts: int) -> Any:
        @torch.compiler.disable
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._tokens.counts(module):
                index_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
                self._add(name, experts, index_TK.detach())

        return count

    def _add(self, name: str, experts: int, index_TK: Tensor) -> None:
        self.top_k[name] = index_TK.shape[-1]
        counts = self._counts.get(name)
        if counts is None:
            # One more bin takes what is not counted, so that nothing is selected and nothing synchronised.
            counts = self._counts[name] = torch.zeros(experts + 1, dtype=torch.int64, device=index_TK.device)
        valid_TK = (index_TK >= 0) & (index_TK < experts)
        keep_T = self._tokens.keep(index_TK.shape[0], index_TK.device)
        if keep_T is not None:
            valid_TK = valid_TK & keep_T[:, None]
        bins = torch.where(valid_TK, index_TK, experts).reshape(-1)
        counts.scatter_add_(0, bins, torch.ones_like(bins))


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
