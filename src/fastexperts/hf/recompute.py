"""Gradient checkpointing by decoder layer: what is kept, what is computed again, and what that takes.

    off             everything is kept
    keep-attention  as keep-experts, and the output of attention: its projections are computed again
    keep-experts    of each layer its input and the experts' h: attention, norms and router are computed again
    full            of each layer its input; the experts' output is not computed again where nothing reads it,
                    and rows of updates are kept there

Those that recompute are PyTorch's non-reentrant checkpointing through transformers' switch; the middle two
add that what our op, or sdpa, gave is given again, and nothing else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from fastexperts import ops
from fastexperts.errors import refuse
from fastexperts.hf import attention, kept_attention, liger, unread
from fastexperts.hf.inventory import Row, interface_modules, row_of, unwrapped
from fastexperts.hf.kept_attention import ATTENTION
from fastexperts.hf.swiglu import PROJECTIONS
from fastexperts.updates import padded

MODES = ("off", "keep-attention", "keep-experts", "full")
KEEP = {"keep-experts": (ops.NAME,), "keep-attention": (ops.NAME, ATTENTION)}
"""What is kept of a layer beside its input, by mode."""

USABLE = 0.9
"""Of a card's memory: the rest is for the CUDA context, workspaces and fragmentation."""

GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """What a decoder layer keeps of a token, in bytes: its input, the experts' outputs and h, attention's
    output, the rest; again: of the experts', what is kept even where they are computed again.
    """

    input: int
    experts: int
    attention: int
    rest: int
    again: int = 0

    def of(self, mode: str) -> int:
        """What is kept until the backward under `mode`."""
        if mode == "off":
            return self.whole
        if mode == "full":
            return self.input + self.again
        kept = {ops.NAME: self.experts, ATTENTION: self.attention}
        return self.input + sum(kept[what] for what in KEEP.get(mode, ()))

    @property
    def whole(self) -> int:
        """What there is while the layer is computed again."""
        return self.input + self.experts + self.attention + self.rest


@dataclass(frozen=True)
class Estimate:
    """The memory of a training step, in bytes. An estimate: what autograd keeps is counted from the layers'
    widths.

    memory: of the card. fixed: weights, their gradients and AdamW's two states, and what lies outside the
    layers.
    logits: what the loss takes.
    """

    memory: int
    fixed: int
    logits: int
    layers: tuple[Kept, ...]
    tokens: int

    def of(self, mode: str) -> int:
        """The peak under `mode`: what all layers keep, and one of them whole where they are recomputed."""
        kept = sum(layer.of(mode) for layer in self.layers)
        again = max((layer.whole - layer.of(mode) for layer in self.layers), default=0)
        return self.fixed + max(self.logits, self.tokens * again) + self.tokens * kept

    def choose(self, modes: tuple[str, ...] = MODES) -> str:
        """The first of `modes`, which keep less and less, that fits; the last if none does."""
        return next(filter(self.fits, modes), modes[-1])

    def fits(self, mode: str) -> bool:
        """Whether the peak under `mode` is within what is usable."""
        return self.of(mode) <= USABLE * self.memory

    def __str__(self) -> str:
        peaks = ", ".join(f"{mode} {self.of(mode) / GIB:.2f}" for mode in MODES)
        return f"estimated GiB at {self.tokens:,} tokens: {peaks}; of {self.memory / GIB:.1f}"


def estimate(model: Any, tokens: int, where: str, fused: bool) -> Estimate:
    """The `Estimate` of a step of `tokens` tokens on one device of type `where`, with all of `model` on it.

    fused: the loss makes no whole logits. Under autocast what is kept counts in its dtype.
    """
    experts = {
        unwrapped(name): row_of(name, module, served=True)
        for name, module in interface_modules(model).items()
    }
    parameters = list(model.parameters())
    weights = sum(_bytes(p) for p in parameters)
    trained = sum(_bytes(p) for p in parameters if p.requires_grad)
    wide = max(p.element_size() for p in parameters if p.is_floating_point())
    autocast = torch.is_autocast_enabled(where)
    size = torch.get_autocast_dtype(where).itemsize if autocast else wide
    config = model.config.get_text_config()
    layers = tuple(
        kept_of(layer, _rows_in(name, experts), config, size) for name, layer in decoder_layers(model)
    )
    vocabulary, hidden = config.vocab_size, config.hidden_size
    ends = 3 * tokens * hidden * size  # the embeddings, and what the last norm reads and gives
    if fused:  # a chunk, and the gradient of the head in fp32
        logits = tokens * liger.CHUNKS * hidden * size + 4 * vocabulary * hidden
    else:  # as the head gives them, in fp32, and their gradient
        logits = tokens * vocabulary * (size + 8)
    here = sum(_bytes(p) for p in parameters if p.device.type == where)
    return Estimate(free_memory(where) + here, weights + 3 * trained + ends, logits, layers, tokens)


def _rows_in(layer: str, experts: dict[str, Row]) -> dict[str, Row]:
    prefix = layer + "."
    return {name.removeprefix(prefix): row for name, row in experts.items() if name.startswith(prefix)}


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def free_memory(where: str) -> int:
    """Bytes that are free on the current CUDA device, or on this machine."""
    if where == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that transformers checkpoints."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return ((name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer))


def kept_of(layer: Any, experts: dict[str, Row], config: Any, size: int) -> Kept:
    """What `layer` keeps of a token, at `size` bytes an element, from the widths of its modules.

    experts: name in the layer -> its row. A norm keeps what it reads and gives, a linear map what it reads
    if that is wider or narrower than the residual stream, else what it gives; queries and keys are there
    before and after their norm or rotation.
    """
    hidden, rest = config.hidden_size, 0
    for name, module in layer.named_modules():
        inside = any(name == other or name.startswith(other + ".") for other in experts)
        weight = module._parameters.get("weight")
        if inside or weight is None or "lora_" in name:  # the few columns of an adapter
            continue
        if weight.dim() == 1 and len(weight) == hidden:
            rest += 2 * hidden
        elif isinstance(module, nn.Linear):
            dense = unwrapped(name).rpartition(".")[2] in PROJECTIONS
            narrows = module.out_features == hidden
            rest += module.in_features if narrows else module.out_features * (1 if dense else 2)
        elif weight.dim() == 2:  # a router: logits, probabilities and their sum, in fp32
            rest += 3 * 4 * len(weight) // size
    kept = again = 0
    for name, row in experts.items():
        top_k, routing = row.top_k or 1, 4  # two integers a pair, in elements of two bytes
        again += top_k * (routing + _columns_of_updates(layer, name, row))
        kept += hidden + top_k * 2 * (row.intermediate or 0)
    kept += again
    attention = min(attention_width(config), rest)  # the sum that sdpa keeps of each head is little
    return Kept(hidden * size, kept * size, attention * size, (rest - attention) * size, again * size)


def _columns_of_updates(layer: nn.Module, name: str, row: Row) -> int:
    """The ranks of PEFT's adapters on the experts `name` of `layer`, as kernels pad them."""
    factors = (
        parameter
        for of, parameter in layer.named_parameters()
        if ".lora_A." in of and unwrapped(of).startswith(f"{name}.")
    )
    return sum(padded(len(factor) // (row.experts or 1)) for factor in factors)


def attention_width(config: Any) -> int:
    """Columns of what attention's heads give, 0 where the config does not tell: too many for layers of other
    kinds (linear attention), of which nothing is kept.
    """
    heads = getattr(config, "num_attention_heads", None) or 0
    widths = [getattr(config, name, None) for name in ("v_head_dim", "head_dim")]
    return heads * (next(filter(None, widths), 0) or config.hidden_size // max(heads, 1))


def apply(model: Any, mode: str) -> int:
    """Switch `model`, a transformers model, to `mode`; returns how many layers run again without w2."""
    layers = [layer for _, layer in decoder_layers(model)]
    if mode == "off":
        if any(layer.gradient_checkpointing for layer in layers):
            _either(model, "disable")()
        return 0
    how: dict[str, Any] = {"use_reentrant": False}
    if mode in KEEP:
        how["context_fn"] = CONTEXTS[mode]
    if mode == "keep-attention":
        attention.keep(model)
    _either(model, "enable")(how)
    if mode != "full":
        return 0
    skipping = unread.unread_layers(model, layers)
    unread.skip(skipping)
    return len(skipping)


def _either(model: Any, what: str) -> Any:
    """transformers 5.23 renamed the switch; 5.17 has the old name alone."""
    new = getattr(model, f"activation_checkpointing_{what}", None)
    return new or getattr(model, f"gradient_checkpointing_{what}")


Given = dict[str, list[tuple[ops.Results, list[int]]]]
"""op -> what each of its calls gave, and how often each tensor of it had been written over."""


class KeptResults(ops.ResultsThrough):
    """Keeps what the ops named in `of` give; `again` is the context that gives it again, in that order."""

    def __init__(self, of: Sequence[str]) -> None:
        super().__init__(of)
        self._kept: Given = {op: [] for op in of}

    def through(self, op: str, compute: Callable[..., ops.Results]) -> ops.Results:
        results = compute()
        self._kept[op].append((results, _versions(results)))
        return _apart(results)

    def again(self) -> ops.ResultsThrough:
        return _Again(self._of, self._kept)


class _Again(ops.ResultsThrough):
    def __init__(self, of: Sequence[str], kept: Given) -> None:
        super().__init__(of)
        self._kept = kept
        self._next: dict[str, Iterator[tuple[ops.Results, list[int]]]] = {}

    def __enter__(self) -> None:
        self._next = {op: iter(results) for op, results in self._kept.items()}
        super().__enter__()

    def through(self, op: str, compute: Callable[..., ops.Results]) -> ops.Results:
        kept = next(self._next[op], None)
        if kept is None:  # a layer that does not do the same again: PyTorch says so
            return compute()
        results, versions = kept
        if _versions(results) != versions:
            raise refuse(
                "optimize",
                "checkpoint",
                got="one that keeps results, and a layer that writes over what its experts or attention gave",
                needs="layers that leave it as it is: it is given again in the backward",
                way_out="Pass checkpoint='full'.",
            )
        return _apart(results)


def keep(of: Sequence[str]) -> tuple[Any, Any]:
    """The contexts of a checkpoint that keeps what the ops named in `of` give; metrics/mfu.py reads `of`."""
    if unread.compiling():
        kernels = kept_attention.OPS if ATTENTION in of else set()
        return unread.policy_contexts(CheckpointPolicy.MUST_SAVE, kernels)
    kept = KeptResults(of)
    return kept, kept.again()


def keep_experts_alone(model: nn.Module) -> None:
    """Where `model` keeps what attention gave, keep what the experts give and no more."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        again: Any = getattr(module, "_gradient_checkpointing_func", None)
        context = getattr(again, "keywords", {}).get("context_fn")
        if getattr(context, "keywords", {}).get("of") == KEEP["keep-attention"]:  # a copy of it as well
            kept = functools.partial(again, context_fn=CONTEXTS["keep-experts"])
            module._gradient_checkpointing_func = kept


CONTEXTS = {mode: functools.partial(keep, of=of) for mode, of in KEEP.items()}


def _apart(results: ops.Results) -> ops.Results:
    """The same memory in tensors of their own: autograd writes on those that an op gives."""
    return tuple(tensor.detach() for tensor in results)


def _versions(results: ops.Results) -> list[int]:
    """How often each was written over, by whichever tensor."""
    return [tensor._version for tensor in results]
