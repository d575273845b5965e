"""What routers say: entropy of their probabilities and size of their logits, read where logits come out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fastexperts.metrics.gathered import Gathered
from fastexperts.metrics.tokens import TrainedTokens

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,  # DeepSeek-V3
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),  # DeepSeek-V4
    "none": lambda p: p,  # Gemma 4 records probabilities as its logits
}
"""Name -> what a router makes of its logits; probabilities are these, divided by their sum."""
GATHERED = 1 << 23
"""Logits whose entropy is taken at once: 32 MB in fp32."""
TOLERANCE = 0.05
"""How far the shares of routing weights may be, relative to their mean, from what a row of SCORES gives."""


@dataclass(frozen=True)
class Router:
    """A module that gives logits, and where in its output they are."""

    module: nn.Module
    index: int


class RouterLogits:
    """Sums, per layer, the entropy of router probabilities and the square of logits while `model` trains.

    transformers names the class of a family's routers, and where their logits are, for its own recording
    (`_can_record_outputs`). What a router makes of its logits is told by the weights that it gives
    (`nearest_score`), once for each class of routers: the one host synchronisation.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], tokens: TrainedTokens) -> None:
        """layers: name -> experts module, as of `ExpertLoad`; tokens: what tells the trained ones."""
        self.routers = find_routers(model, layers)
        """Name of an experts module -> its router; without those that are not found."""
        self.columns: dict[str, int] = {}
        """What a token of each layer chooses among, once one was seen: experts, and what else there is."""
        self._layers, self._tokens = layers, tokens
        self._rows = {name: row for row, name in enumerate(layers)}
        self._handles: list[RemovableHandle] = []
        self._tables: dict[torch.device, Tensor] = {}
        self._logits: dict[str, Tensor] = {}
        self._gathered = Gathered(self._sum, GATHERED)
        self._score: dict[type[nn.Module], str] = {}

    def start(self) -> None:
        """Sum from here on."""
        for name, router in self.routers.items():
            self._handles += [
                router.module.register_forward_hook(self._keep_logits(name, router.index)),
                self._layers[name].register_forward_pre_hook(self._adder(name, router), with_kwargs=True),
            ]

    def stop(self) -> None:
        """Sum no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._logits.clear()

    def table(self, device: torch.device) -> Tensor:
        """[layers, 3] fp64 on `device`: tokens, the sum of their entropies (nats) and of their mean squares.

        The last is NaN where a router gives probabilities and no logits.
        """
        self._gathered.flush()
        table_L3 = torch.zeros(len(self._layers), 3, dtype=torch.float64, device=device)
        for sums_L3 in self._tables.values():
            table_L3 += sums_L3.to(device)
        return table_L3

    def reset(self) -> None:
        """Start again from zero."""
        self._gathered.clear()
        for sums_L3 in self._tables.values():
            sums_L3.zero_()

    def _keep_logits(self, name: str, index: int) -> Any:
        @torch.compiler.disable
        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if self._tokens.counts(self._layers[name]):
                logits = output[index] if isinstance(output, tuple) else output
                self._logits[name] = logits.detach().flatten(0, -2)

        return keep

    def _adder(self, name: str, router: Router) -> Any:
        """A hook of the experts, whose input has the choice that was made of the logits."""

        @torch.compiler.disable
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            logits_TE = self._logits.pop(name, None)
            if logits_TE is None or not self._tokens.counts(module):
                return
            index_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weight_TK = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            kind = type(router.module)
            if kind not in self._score:
                self._score[kind] = nearest_score(logits_TE.float(), index_TK, weight_TK.detach().float())
            self.columns[name] = logits_TE.shape[-1]
            keep_T = self._tokens.keep(logits_TE.shape[0], logits_TE.device)
            self._gathered.add(self._rows[name], logits_TE, keep_T, self._score[kind])

        return add

    def _sum(self, first: int, logits_LTE: Tensor, keep_T: Tensor | None, score: Any) -> None:
        """The logits of layers from row `first` on, of which routers make `score`."""
        device, logits_LTE = logits_LTE.device, logits_LTE.float()
        if device not in self._tables:
            shape = len(self._layers), 3
            self._tables[device] = torch.zeros(shape, dtype=torch.float64, device=device)
        entropy_LT = entropy(SCORES[score](logits_LTE))
        kept_LT = torch.ones_like(entropy_LT) if keep_T is None else keep_T.float().expand_as(entropy_LT)
        square_LT = logits_LTE.square().mean(-1) if score != "none" else torch.full_like(kept_LT, math.nan)
        sums_L3 = torch.stack([kept_LT, kept_LT * entropy_LT, kept_LT * square_LT], dim=-1).sum(1)
        self._tables[device][first : first + len(sums_L3)] += sums_L3


def entropy(scores: Tensor) -> Tensor:
    """Entropy in nats of each row [..., E] of scores, divided by their sum: 0 for one choice, ln E for E
    alike.
    """
    p = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.special.entr(p).sum(-1)


def nearest_score(logits_TE: Tensor, index_TK: Tensor, weight_TK: Tensor) -> str:
    """Of SCORES the name of the one that gives `weight_TK`, up to a factor for each token.

    Softmax where none does: some routers mask or sample (phimoe). Waits for the device.
    """
    index_TK = index_TK.clamp(0, logits_TE.shape[-1] - 1)
    errors = {}
    for name, score in SCORES.items():
        difference_TK = _shares(score(logits_TE).gather(-1, index_TK)) - _shares(weight_TK)
        errors[name] = difference_TK.abs().mean() * weight_TK.shape[-1]
    # Learned scales of experts hide what probabilities are; that they are positive and sum to 1 does not.
    errors["none"] = (logits_TE.sum(-1) - 1).abs().mean() + logits_TE.clamp(max=0).abs().mean()
    found = dict(zip(errors, torch.stack(list(errors.values())).tolist(), strict=True))
    nearest = min(found, key=found.__getitem__)
    return nearest if found[nearest] <= TOLERANCE else "softmax"


def _shares(weight_TK: Tensor) -> Tensor:
    return weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)


def find_routers(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, Router]:
    """Name of an experts module -> its router: beside it, and of a class that transformers records."""
    recorded = dict(_recorded(model))
    beside = {_block(name): name for name in layers}
    found = {}
    for name, module in model.named_modules():
        index = next((recorded[kind] for kind in type(module).__mro__ if kind in recorded), None)
        if index is not None and _block(name) in beside:
            found[beside[_block(name)]] = Router(module, index)
    return found


def _recorded(model: nn.Module) -> Iterator[tuple[type, int]]:
    """(class, index) of the outputs that transformers records as router logits, of sub-models too."""
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                # A bare class stands for the second of its outputs, as in transformers' own reading.
                yield kind, getattr(recorder, "index", 1)


def _block(name: str) -> str:
    """The name of the module that holds `name`, or what PEFT has wrapped around `name`."""
    return re.sub(r"(\.base_layer)+$", "", name).rpartition(".")[0]
