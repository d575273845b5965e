"""Where a decoder's weights stand: what comes before what, as its modules are registered."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from fastexperts.errors import FastexpertsError, refuse

_LISTS = ("layers", "h", "blocks")
LAYER = re.compile(rf"^(?:{'|'.join(_LISTS)})\.(\d+)\.(\w+)")
"""A module inside of a decoder's layer: the layer's index, and the name of its child that it lies in."""
_UNUSED = re.compile(r"(^|\.)(original_module|vision_moe)(\.|$)")
"""What PEFT keeps beside the copy that it trains, and the experts of image tokens (ernie4_5_vl_moe)."""

_WRAPPERS = frozenset(("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"))
"""What FSDP's activation checkpointing, torch.compile and FSDP itself put between a name and its children."""


class Place(NamedTuple):
    """Where a weight stands; a gradient reaches the input of those that stand after something trained.

    `layer` is -1 before the first and inf after the last. `block` numbers a layer's children, norms first.
    `rank` orders the weights of a block: 0 reads the block's input, OUTPUT writes its output.
    """

    layer: float
    block: int
    rank: float


SCORES = 2
"""The rank of attention scores and recurrences, between the projections before and after them."""
OUTPUT = 3
_RANKS = (
    (re.compile(r"(^|_)(o|out|down|c)_proj$|^o_[ab]_proj$|^(wo|w2|fc2|out|dense|dense_4h_to_h)$"), OUTPUT),
    (re.compile(r"(_b_proj|q_gate_proj|conv1d)$|^(x|dt)_proj$"), 1),
)


class Places:
    """The place of each module, from the order in which a model registers its layers and their children."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._order: dict[tuple[int, str], int] = {}
        self._before = True
        self._outside: dict[str, float] = {}
        for name, module in modules.items():
            match = LAYER.match(name)
            if match:
                self._before = False
                # transformers registers a layer's norms last; they come before what they normalise.
                key = (int(match[1]), match[2])
                self._order.setdefault(key, 0 if "norm" in match[2] else len(self._order) + 1)
            else:
                early = self._before or isinstance(module, nn.Embedding)
                self._outside[name] = -1 if early else float("inf")

    def of(self, name: str, label: str = "") -> Place:
        """Where the weights of module `name` stand; `label` tells those that write a block's output."""
        match = LAYER.match(name)
        if match is None:
            return Place(self._outside.get(name, -1), 0, 0)
        return Place(int(match[1]), self._order[int(match[1]), match[2]], _rank(name, label))


def _rank(name: str, label: str) -> float:
    rank = next((rank for pattern, rank in _RANKS if pattern.search(label)), 0)
    return rank + 0.5 * (".lora_B" in name)


def layers_owner(decoder: nn.Module) -> nn.Module:
    """What has the layers as its own child: `decoder`, or what is in it: llama4 gives its whole model."""
    while not any(name in decoder._modules for name in _LISTS):
        inside = [child for child in decoder.children() if any(map(_has_list, child.modules()))]
        if len(inside) != 1:
            raise unknown(f"a {type(decoder).__name__}", f"one list of layers, {' or '.join(_LISTS)}")
        decoder = inside[0]
    return decoder


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(module._modules.get(name), nn.ModuleList) for name in _LISTS)


def modules_of(decoder: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of those that a token goes through."""
    named: dict[str, nn.Module] = {}
    for name, module in decoder.named_modules():
        if not _UNUSED.search(name):
            # A wrapper and what it wraps get one name: the inner one comes last, and stays.
            named[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = module
    return named


def in_indexer(name: str) -> bool:
    """Whether the module only chooses the keys of a sparse attention: no gradient goes through it."""
    return re.search(r"(^|\.)indexer(\.|$)", name) is not None


def unknown(got: str, needs: str) -> FastexpertsError:
    """The error for a module whose products cannot be told."""
    return refuse("count_flops", "model", got=got, needs=needs, way_out="Count this family by hand.")
