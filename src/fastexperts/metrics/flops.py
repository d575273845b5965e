"""Model FLOPs of a token in training, for any decoder of transformers, dense or MoE, with or without LoRA.

Matrix products alone are counted, 2 FLOPs for a multiply-add. Norms, activations, softmax, rotary
embeddings, the optimizer and embedding lookups count nothing. For a token, with W a weight that it meets, of
experts the K of E that it is sent to:

    forward      2 |W|
    backward     2 |W| for dW, if W trains; 2 |W| for dx, if something before W trains
    attention    2 heads (d_qk + d_v) for each key that the query meets; backward twice that
    recurrence   2 |state| for each product with the state (mixers.py); backward twice that

The attention of a sequence of length S is counted by two conventions. `full`: every query is charged S keys,
as in 6 N + 12 L H Q S (PaLM, appendix B). `causal`: the keys up to the query itself, S / 2 on average, which
is what a flash kernel computes. A window or a sparse attention limits the keys in both.

What is before what follows the order of a model's modules. Two assumptions come with it, each about the first
trained layer alone: weights that read the same input (q, k, v; gate and up) need no dx of each other, and of
attention scores either all gradients are computed or none. A router or a norm counts like any weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from fastexperts.errors import refuse
from fastexperts.metrics.mixers import Span, check_mixers, pairs, states
from fastexperts.metrics.places import Place, layers_owner
from fastexperts.metrics.products import count_parameters, trained_places, weights

Convention = Literal["causal", "full"]


@dataclass(frozen=True)
class Work:
    """FLOPs, of model passes."""

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0
    """What of `forward` lies in a layer: gradient checkpointing computes it once more. No model FLOPs."""

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(
            self.forward + other.forward, self.backward + other.backward, self.repeated + other.repeated
        )

    def __mul__(self, factor: float) -> Work:
        return Work(self.forward * factor, self.backward * factor, self.repeated * factor)


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of one token, averaged over a sequence of `length`, by part; `str()` draws the table."""

    length: int
    attention_projections: Work
    """The linear maps of attention, linear attention and state spaces, with their convolutions."""
    attention_scores_full: Work
    """Queries with keys, probabilities with values, and indexers of sparse attention: full convention."""
    attention_scores_causal: Work
    """The same by the causal convention."""
    recurrence: Work
    """Reads and updates of the state of linear attention and state spaces."""
    experts: Work
    """The routed experts that a token is sent to."""
    dense: Work
    """Dense MLPs and shared experts."""
    router: Work
    lm_head: Work
    other: Work
    """Linear maps that are none of these: residual mixing, embeddings of each layer, the like."""

    def by(self, convention: Convention) -> Work:
        """All parts together, by `convention`."""
        scores = self.attention_scores_full if convention == "full" else self.attention_scores_causal
        return sum((work for name, work in self._rows() if "scores" not in name), scores)

    def _rows(self) -> list[tuple[str, Work]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "length"]

    def __str__(self) -> str:
        rows = [
            *((name.replace("_", " "), work) for name, work in self._rows() if work.total),
            ("total, causal attention", self.by("causal")),
            ("total, full attention", self.by("full")),
        ]
        lines = [f"{f'MFLOPs a token, {self.length} tokens':36}{'forward':>12}{'backward':>12}{'both':>12}"]
        for name, work in rows:
            numbers = (work.forward, work.backward, work.total)
            lines.append(f"{name:36}" + "".join(f"{number / 1e6:12,.2f}" for number in numbers))
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelFlops:
    """What a model computes: `fixed` for each token, by part, and `pairs` for each key that a query meets."""

    fixed: Mapping[str, Work]
    pairs: Mapping[Span, Work]
    active_parameters: int
    """Parameters that serve a token: of the experts, the K it is sent to. Embeddings included, ties once."""
    parameters: int
    not_counted: tuple[str, ...]
    """Modules beside the decoder and the LM head, such as a vision tower: other tokens go through them."""

    def per_token(self, length: int) -> FlopsPerToken:
        """FLOPs of one token, averaged over a sequence of `length` tokens."""
        if length < 1:
            raise refuse(
                "per_token",
                "length",
                got=length,
                needs="the tokens of a sequence, at least 1",
                way_out="Give the length that you train with.",
            )
        seen = torch.arange(1, length + 1)
        full, causal = Work(), Work()
        for span, work in self.pairs.items():
            all_keys = float(span.met(seen[-1:]))
            full += work * all_keys
            causal += work * (float(span.met(seen).double().mean()) if span.causal else all_keys)
        return FlopsPerToken(length, attention_scores_full=full, attention_scores_causal=causal, **self.fixed)

    def __str__(self) -> str:
        left = f"; not counted: {', '.join(self.not_counted)}" if self.not_counted else ""
        return f"{self.active_parameters:,} active of {self.parameters:,} parameters{left}"


FIXED = ("attention_projections", "recurrence", "experts", "dense", "router", "lm_head", "other")
"""The parts whose FLOPs do not depend on a sequence's length."""


def count_flops(model_or_config: Any) -> ModelFlops:
    """What training `model_or_config` computes for a token.

        count_flops(model).per_token(4096).by("causal").total

    Args:
        model_or_config: a transformers decoder, also wrapped by PEFT, DDP or torch.compile, with
            `requires_grad` as it will be trained; or a config, of which every weight trains. A model with
            several kinds of input counts its text decoder.

    Raises FastexpertsError for an encoder-decoder, and for modules whose products are not known.
    """
    model: Any = model_or_config
    model = _unwrapped(model) if isinstance(model, nn.Module) else _build(model)
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        raise refuse(
            "count_flops",
            "model",
            got=type(model).__name__,
            needs="a decoder of transformers, in which every layer sees the same tokens",
            way_out="Count encoder-decoders by hand.",
        )
    decoder, head = layers_owner(model.get_decoder()), model.get_output_embeddings()
    check_mixers(decoder)
    end = Place(float("inf"), 0, 1)
    first = min(trained_places(decoder), default=end)
    fixed = dict.fromkeys(FIXED, Work())
    for weight in weights(decoder):
        dx = weight.differentiable and first < weight.place
        dw = weight.differentiable and weight.trained
        fixed[weight.part] += _work(weight.products, dx + dw, weight.place)
    for state in states(decoder):
        fixed["recurrence"] += _work(state.products, 2 * (first < state.place), state.place)
    if head is not None:
        fixed["lm_head"] = _head_work(head, first < end, end)
    met: dict[Span, Work] = {}
    for pair in pairs(decoder):
        backward = 2 * (pair.differentiable and first < pair.place)
        met[pair.span] = met.get(pair.span, Work()) + _work(pair.products, backward, pair.place)
    total, active = count_parameters(decoder, *([] if head is None else [head]))
    return ModelFlops(fixed, met, active, total, tuple(_beside(model, decoder, head)))


def _work(products: float, backward: float, place: Place) -> Work:
    """2 FLOPs for each of `products`, and `backward` times as many in the backward."""
    flops = 2 * products
    return Work(flops, flops * backward, flops if 0 <= place.layer < float("inf") else 0.0)


def _head_work(head: nn.Module, dx: bool, end: Place) -> Work:
    """The work of an LM head and of adapters on it; `dx`: something before it trains."""
    work, met = Work(), list(weights(head))
    updated = any(weight.trained for weight in met if "lora_A" in weight.module)
    for weight in met:
        after_trained = dx or (updated and "lora_B" in weight.module)
        work += _work(weight.products, after_trained + weight.trained, end)
    return work


def _unwrapped(model: Any) -> Any:
    """The transformers model inside of DDP, torch.compile and PEFT."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _build(config: Any) -> Any:
    """The model of `config`, on the meta device: shapes without memory."""
    import transformers

    loaders = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")
    for loader in (getattr(transformers, name) for name in loaders):
        if type(config) in loader._model_mapping:
            with torch.device("meta"):
                return loader.from_config(config)
    raise refuse(
        "count_flops",
        "model_or_config",
        got=type(config).__name__,
        needs="a transformers model, or the config of one",
        way_out="Build the model and give that.",
    )


def _beside(model: nn.Module, decoder: nn.Module, head: nn.Module | None) -> Iterator[str]:
    """Names of the topmost modules with parameters that neither hold nor lie in the decoder or the head."""
    counted = {id(module) for root in (decoder, head) if root is not None for module in root.modules()}

    def walk(module: nn.Module, name: str) -> Iterator[str]:
        for key, child in module.named_children():
            inside = [id(each) in counted for each in child.modules()]
            if id(child) in counted or next(child.parameters(), None) is None:
                continue
            if any(inside):
                yield from walk(child, f"{name}{key}.")
            else:
                yield f"{name}{key}"

    return walk(model, "")
