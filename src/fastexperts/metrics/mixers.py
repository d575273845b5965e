"""How a decoder mixes its tokens: the keys that a query meets, and the states that a token updates.

transformers' families are told by what their modules have in common: softmax attention carries `scaling` and
`is_causal`, linear attention and state spaces have the attributes in `_RECURRENCES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastexperts.metrics.places import SCORES, Place, Places, modules_of, unknown

_MIXER = re.compile(r"(Attention|Mixer|DeltaNet|Mamba\w*)$")


@dataclass(frozen=True)
class Span:
    """The keys that a query meets: every `stride`-th of its document, up to itself, and at most `limit`."""

    limit: int | None = None
    stride: int = 1
    causal: bool = True

    def met(self, seen: Tensor) -> Tensor:
        """The number of keys, where `seen` are in sight."""
        keys = seen // self.stride
        return keys if self.limit is None else keys.clamp(max=self.limit)


@dataclass(frozen=True)
class Pairs:
    """Products of query-key pairs: `products` multiply-adds for each pair in `span`."""

    span: Span
    products: float
    differentiable: bool
    place: Place


@dataclass(frozen=True)
class State:
    """Products of a token with the state of a linear attention or state space."""

    products: float
    place: Place


class _Recurrence(NamedTuple):
    """How a mixer with these attributes updates its state: `products` times the state's elements."""

    attributes: tuple[str, ...]
    """Their product is the number of the state's elements."""
    products: int
    """2 write k v^T and read q; the delta rule reads k before it writes, 3."""
    name: str = ""
    """Part of the class's name, where softmax attention can have the attributes too."""


_RECURRENCES = (
    _Recurrence(("num_v_heads", "head_k_dim", "head_v_dim"), 3),  # gated delta net
    _Recurrence(("num_heads", "head_dim", "ssm_state_size"), 2),  # Mamba 2
    _Recurrence(("intermediate_size", "ssm_state_size"), 2),  # Mamba
    _Recurrence(("qkv_dim", "head_dim"), 3),  # Kimi's delta attention: qkv_dim = heads * head_dim
    _Recurrence(("num_attention_heads", "head_dim", "head_dim"), 2, name="Lightning"),
)


def pairs(decoder: nn.Module) -> Iterator[Pairs]:
    """The query-key products of `decoder`'s softmax attention and of its indexers."""
    modules = modules_of(decoder)
    places = Places(modules)
    for name, module in modules.items():
        if not _is_attention(module):
            continue
        place = places.of(name)._replace(rank=SCORES)
        qk_dim = _attribute(name, module, "qk_head_dim", "head_dim", "head_size")
        v_dim = _attribute(name, module, "v_head_dim", "head_dim", "head_size")
        heads = _heads(module, v_dim)
        if hasattr(module, "lambda_q1"):  # differential attention: a head's weights meet the values of two
            v_dim *= 2
        for span in _spans(module):
            yield Pairs(span, heads * (qk_dim + v_dim), True, place)
    for name, module in modules.items():
        if type(module).__name__.endswith("Indexer"):
            heads = _attribute(name, module, "n_heads", "num_heads", "index_n_heads")
            dim = _attribute(name, module, "head_dim", "index_head_dim")
            # One product more for each head: the weighted sum of the heads' scores.
            yield Pairs(Span(None, _stride(module)), heads * (dim + 1), False, places.of(name))


def states(decoder: nn.Module) -> Iterator[State]:
    """The products of `decoder`'s linear attention and state spaces, in their recurrent form."""
    modules = modules_of(decoder)
    places = Places(modules)
    for name, module in modules.items():
        rule = _recurrence(module)
        if rule is not None:
            elements = prod(getattr(module, attribute) for attribute in rule.attributes)
            yield State(rule.products * elements, places.of(name)._replace(rank=SCORES))


def is_mixer(module: nn.Module) -> bool:
    """Whether `module` mixes tokens: attention, a recurrence, or a short convolution between projections."""
    return (
        _is_attention(module)
        or _recurrence(module) is not None
        or type(module).__name__.endswith("ShortConv")
    )


def check_mixers(decoder: nn.Module) -> None:
    """Raise FastexpertsError for a module that mixes tokens in a way that is not known here."""
    for name, module in decoder.named_modules():
        if not _MIXER.search(type(module).__name__) or is_mixer(module):
            continue
        if any(isinstance(child, nn.Linear | Conv1D) for child in module.children()):
            raise unknown(
                f"{name}, a {type(module).__name__}",
                "softmax attention, or a linear attention or state space of `mixers._RECURRENCES`",
            )


def _is_attention(module: Any) -> bool:
    return hasattr(module, "scaling") and hasattr(module, "is_causal")


def _recurrence(module: Any) -> _Recurrence | None:
    if not _MIXER.search(type(module).__name__) or _is_attention(module):
        return None
    for rule in _RECURRENCES:
        sizes = [getattr(module, name, None) for name in rule.attributes]
        if rule.name in type(module).__name__ and all(isinstance(size, int) for size in sizes):
            return rule
    return None


def _heads(module: Any, v_dim: int) -> int:
    # The output projection tells them where layers differ, which the config does not in every family.
    for name in ("o_proj", "out_proj", "dense"):
        if hasattr(module, name):
            return int(getattr(module, name).in_features) // v_dim
    return int(getattr(module, "num_heads", None) or module.config.num_attention_heads)


def _spans(module: Any) -> list[Span]:
    causal, window = bool(module.is_causal), _window(module)
    compressor = getattr(module, "compressor", None)
    if compressor is not None:
        chosen = getattr(compressor, "indexer", None)
        far = Span(None if chosen is None else chosen.index_topk, compressor.compress_rate, causal)
        return [Span(window, causal=causal), far]
    indexer = getattr(module, "indexer", None)
    if indexer is not None:
        return [Span(_chosen(indexer), causal=causal)]
    if getattr(module, "skip_topk", False):  # reads the choice of an earlier layer
        return [Span(module.config.index_topk, causal=causal)]
    return [Span(window, causal=causal)]


def _window(module: Any) -> int | None:
    """The attention window in tokens, or None."""
    config = module.config
    kinds = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    kind = kinds[index] if kinds and index is not None and index < len(kinds) else None
    local = [getattr(module, name) for name in ("is_sliding", "is_local_attention") if hasattr(module, name)]
    if False in local or kind in ("full_attention", "attention"):
        return None
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None
    if kind == "chunked_attention":
        return int(config.attention_chunk_size)
    return getattr(config, "sliding_window", None) or None


def _chosen(indexer: Any) -> int:
    """The keys that an indexer lets a query meet."""
    for name in ("index_topk", "token_budget"):
        if hasattr(indexer, name):
            return int(getattr(indexer, name))
    return int(indexer.topk_blocks * indexer.block_size)


def _stride(indexer: Any) -> int:
    names = ("index_kpool", "compress_ratio", "compress_rate")
    return next((int(getattr(indexer, name)) for name in names if hasattr(indexer, name)), 1)


def _attribute(where: str, module: nn.Module, *names: str) -> int:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    raise unknown(f"{where}, a {type(module).__name__}", f"one of the attributes {', '.join(names)}")
