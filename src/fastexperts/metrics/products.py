"""The weights of a decoder that a token is multiplied with: matrices but embeddings, and K of E experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from fastexperts.errors import refuse
from fastexperts.metrics.mixers import is_mixer
from fastexperts.metrics.places import LAYER, OUTPUT, Place, Places, in_indexer, modules_of, unknown

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "num_experts_per_token",
    "moe_top_k",
)
_NO_PRODUCT = re.compile(r"bias|norm|scale|A_log|_ape$|sinks")
"""Parameters of two or more dims that are added, or multiplied element by element."""
_ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_DENSE = re.compile(r"mlp|feed_forward|ffn|expert|moe|mixer")


@dataclass(frozen=True)
class Weight:
    """A weight, as one token meets it."""

    module: str
    part: str
    products: float
    """Multiply-adds for a token: the weight's elements, for experts those of the token's K."""
    trained: bool
    differentiable: bool
    """Whether a gradient goes through it at all: not through an indexer's choice of keys."""
    place: Place


def weights(decoder: nn.Module) -> Iterator[Weight]:
    """The weights of `decoder` that a token is multiplied with, each parameter once for each use."""
    modules = modules_of(decoder)
    mixers = {name for name, module in modules.items() if is_mixer(module)}
    places = Places(modules)
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) or not module._parameters:
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or _NO_PRODUCT.search(key):
                continue
            experts = _EXPERTS.search(name) is not None and not _within_any(name, mixers)
            yield Weight(
                module=name,
                part=_part(name, mixers),
                products=_elements(name, module, key, parameter, experts)
                * _share(name, modules, parameter)
                * _uses(name, modules),
                trained=parameter.requires_grad,
                differentiable=not in_indexer(name),
                place=places.of(name, _label(name, key, modules)),
            )


def trained_places(decoder: nn.Module) -> Iterator[Place]:
    """Where `decoder` has something to train, biases and norms included."""
    modules = modules_of(decoder)
    places = Places(modules)
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and not in_indexer(name):
                place = places.of(name, _label(name, key, modules))
                # A router weighs what its block's experts put out, and changes nothing of what they read.
                yield place._replace(rank=OUTPUT) if _ROUTER.search(name) else place


def count_parameters(*roots: nn.Module) -> tuple[int, int]:
    """(all, active) parameters of `roots`; active ones serve a token: all but experts it is not sent to."""
    seen: set[int] = set()
    total, active = 0, 0.0
    for root in roots:
        modules = modules_of(root)
        for name, module in modules.items():
            for key, parameter in module._parameters.items():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                total += _count(module, key, parameter)
                active += _share(name, modules, parameter) * _count(module, key, parameter)
    return total, round(active)


def _label(name: str, key: str, modules: dict[str, nn.Module]) -> str:
    """What says whether a weight reads its block's input: its module's name, or for experts its own."""
    wrapped = re.split(r"\.(?:lora_[AB]|base_layer|modules_to_save)\b", name)[0]
    if ".lora_" in name:
        target = getattr(modules[name.rpartition(".lora_")[0]], "parameter_name", None)
        if target is not None:
            return str(target)
    return key if _EXPERTS.search(name) and key != "weight" else wrapped.rpartition(".")[2]


def _part(name: str, mixers: set[str]) -> str:
    if not LAYER.match(name):
        return "other"
    if _within_any(name, mixers):
        return "attention_projections"
    if _EXPERTS.search(name):
        return "experts"
    if _ROUTER.search(name):
        return "router"
    return "dense" if _DENSE.search(name) else "other"


def _within_any(name: str, prefixes: set[str]) -> bool:
    return any(name[:end] in prefixes for end in [*(m.start() for m in re.finditer(r"\.", name)), len(name)])


def _elements(name: str, module: nn.Module, key: str, parameter: Tensor, experts: bool) -> int:
    """The multiply-adds of a weight with one input, all experts together."""
    shape, convolves = _shape(parameter), isinstance(module, nn.modules.conv._ConvNd)
    elements = _count(module, key, parameter)
    if elements == 0:
        raise refuse(
            "count_flops",
            "model",
            got=f"{name}.{key} without elements, as in a sharded model",
            needs="whole weights",
            way_out="Count before the model is sharded, or from its config.",
        )
    stacked = len(shape) >= 3 and not convolves and "shared" not in name
    stacked = stacked or hasattr(module, "moe_num_experts")  # dbrx: one expert's rows after another's
    if not isinstance(module, nn.Linear) and experts != stacked:
        needs = "experts stacked along their first dim, or a linear map of two"
        raise unknown(f"{name}.{key} of shape {shape}", needs)
    return elements


def _count(module: Any, key: str, parameter: Tensor) -> int:
    # Quantized weights are packed: a linear layer says its own sizes.
    if key == "weight" and isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return prod(_shape(parameter))


def _share(name: str, modules: dict[str, nn.Module], parameter: Tensor) -> float:
    """The share of a weight that a token meets: of experts K / E, else 1.

    Where some experts are the identity (longcat_flash), all are taken to be chosen alike.
    """
    match = _EXPERTS.search(name)
    if match is None:
        return 1.0
    root = name[: match.start()] + match[0].rstrip(".")
    module: Any = modules[root]
    while hasattr(module, "base_layer"):
        module = module.base_layer
    stacks = [_shape(p)[0] for p in module._parameters.values() if p is not None and p.dim() >= 3]
    if not stacks and isinstance(module, nn.ModuleList | nn.ModuleDict):
        stacks = [len(module)]
    elif not stacks:
        stacks = [each.moe_num_experts for each in module.modules() if hasattr(each, "moe_num_experts")]
    if not stacks:
        return 1.0
    with_weights, chosen_from = min(stacks), max(stacks)
    rows = _shape(parameter)[0] if parameter.dim() >= 3 else chosen_from
    return _top_k(root, module, modules) * with_weights / chosen_from / rows


def _uses(name: str, modules: dict[str, Any]) -> int:
    """How often a token meets a weight: once, but inkling's relative positions with each head."""
    each_head = type(modules[name]).__name__.endswith("RelativeLogits")
    return int(modules[name.rpartition(".")[0]].num_heads) if each_head else 1


def _top_k(name: str, experts: Any, modules: dict[str, nn.Module]) -> int:
    block = modules[name.rpartition(".")[0]]
    config = getattr(experts, "config", None)
    # hunyuan's config has a list, one for each layer; its router has the layer's own.
    for owner in (block, *block.children()):
        if isinstance(getattr(owner, "top_k", None), int):
            return int(getattr(owner, "top_k"))  # noqa: B009 (a Module's attributes are Tensors to mypy)
        config = config or getattr(owner, "config", None)
    for key in _TOP_K_NAMES:
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    raise refuse(
        "count_flops",
        "model",
        got=f"{name}, whose number of experts for a token is nowhere to be read",
        needs=f"`top_k` of the router, or one of {', '.join(_TOP_K_NAMES)} in the config",
        way_out="Set it there.",
    )


def _shape(parameter: Any) -> tuple[int, ...]:
    # DeepSpeed's ZeRO-3 leaves empty parameters and keeps their shape beside them.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
