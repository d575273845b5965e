"""The loss fused with the LM head: in training a causal model's logits are never whole.

The model's own forward runs, with a head that passes the hidden states on and a loss that takes them for
logits: whatever else it does (the auxiliary loss, `num_items_in_batch`, shifted labels) stays its own. A
forward that scales, caps or casts logits is refused. Inside TRL's SFTTrainer TRL's own fused head takes the
forward's place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import liger
from fastexperts.hf.plain import check_plain

TOKENS, WIDTH = 6, 4  # of the comparison
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
ROUGH = 2e-2  # in bf16 and fp16
WAY_OUT = "Pass parts={'loss': False}."

Summed = Callable[[Tensor, Tensor, Tensor | None, Tensor, int], Tensor]
"""The signature of `liger.summed_cross_entropy`."""


class LossForward(liger.Forward):
    """The forward of the class; where it trains on labels, head and loss are one and `logits` is None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, keep = self.module, kwargs.get("logits_to_keep", 0)
        if args and args[0] is model:  # accelerate's unwrap_model binds what it finds to the model
            args = args[1:]
        whole = isinstance(keep, int) and keep == 0
        usual = not args and whole and kwargs.get("return_dict") is not False
        head = model.get_output_embeddings()
        if not (model.training and kwargs.get("labels") is not None and usual and self.takes(head.weight)):
            return self.stock(*args, **kwargs)
        return fused(model, head, liger.summed_cross_entropy, kwargs, {})

    def __str__(self) -> str:
        return "Liger fused linear cross entropy, in training; inside SFTTrainer TRL's own"


def fused(model: Any, head: nn.Linear, summed: Summed, kwargs: dict[str, Any], below: dict[str, Any]) -> Any:
    """The output of the forward of the class of `model`, its loss by `summed` and without logits.

    below: attributes of the model to replace, for a comparison.
    """
    loss = _FusedLoss(model, head, summed)
    parts = {head_name(model): loss.pass_on, "loss_function": loss}
    output = type(model).forward(_With(model, **below, **parts), **kwargs)
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})


class _With:
    """`model` to a forward of its class, but for some attributes."""

    def __init__(self, model: Any, /, **attributes: Any) -> None:
        vars(self).update(attributes, _model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _FusedLoss:
    """transformers' ForCausalLMLoss, given hidden states where it is given logits."""

    def __init__(self, model: Any, head: nn.Linear, summed: Summed) -> None:
        self.model, self.head, self.summed = model, head, summed
        self.hidden: Any = None

    def pass_on(self, hidden: Tensor) -> Tensor:
        """In the place of the head."""
        self.hidden = hidden
        return hidden

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        check_head(self.head)
        if logits is not self.hidden:
            raise _refusal(type(self.model).__name__, "a forward that scales, caps or casts logits")
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target_T = shift_labels.reshape(-1).to(logits.device)
        hidden_TD = logits.reshape(-1, logits.shape[-1])
        total = self.summed(hidden_TD, self.head.weight, self.head.bias, target_T, ignore_index)
        count = (target_T != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def head_name(model: Any) -> str:
    """The attribute of `model` that holds its head; empty if it is not a child."""
    head = model.get_output_embeddings()
    return next((name for name, child in model.named_children() if child is head), "")


def check_head(head: Any) -> None:
    """Raise unless `head` is a linear layer and nothing else: its weight is read, and it is not called."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    if type(head) is not nn.Linear or any(hooks) or "forward" in vars(head):
        raise _refusal(type(head).__name__, "a head with an adapter, a wrapper or hooks")
    check_plain(head, "weight", head.weight)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """name -> module, of the language models: what has embeddings of its own to give logits."""
    from transformers import PreTrainedModel

    models = ((name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel))
    return {name: m for name, m in models if m.get_output_embeddings() is not None and head_name(m)}


def forward_of(model: Any, where: str) -> LossForward:
    """The fused forward of `model`; raises FastexpertsError if its own makes more of logits than a loss."""
    cls, head = type(model).__name__, model.get_output_embeddings()
    if liger.is_patched(model):
        raise _refusal(cls, "a forward put on the instance")
    check_head(head)
    dtype = head.weight.dtype
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            small = nn.Linear(WIDTH, head.out_features, bias=head.bias is not None, dtype=dtype)
            wanted, got = _losses(model, small, _stock), _losses(model, small, _plainly_fused)
    except FastexpertsError:
        raise
    except Exception as e:
        raise _refusal(cls, f"{type(e).__name__} ({e}) on {TOKENS} tokens") from e
    tolerance = TOLERANCE.get(dtype, ROUGH)
    if not all(bool((a - b).norm() <= tolerance * b.norm()) for a, b in zip(got, wanted, strict=True)):
        raise _refusal(cls, "another loss than the cross entropy of the next token")
    return LossForward(model, where)


def _losses(model: Any, head: nn.Linear, run: Callable[..., Any]) -> list[Tensor]:
    """Loss and gradient that `run` gives for hidden states at hand, as a mean and over a given count.

    The head is a small one and what lies below it a stand-in, so the model may be anywhere, or large.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(head.out_features, (1, TOKENS), generator=generator)
    labels[0, 2] = -100
    hidden = torch.randn(1, TOKENS, WIDTH, generator=generator).to(head.weight.dtype)
    asked = inspect.signature(type(model).forward).parameters
    quiet = {"output_router_logits": False} if "output_router_logits" in asked else {}
    found = []
    for count in ({}, {"num_items_in_batch": torch.tensor(11)}):
        leaf = hidden.clone().requires_grad_()
        below = {model.base_model_prefix: lambda *_, leaf=leaf, **__: MoeModelOutputWithPast(leaf)}
        with torch.autocast("cpu", enabled=False):
            loss = run(model, head, {"labels": labels, **quiet, **count}, below).loss
        found += [loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()]
    return found


def _stock(model: Any, head: nn.Linear, kwargs: dict[str, Any], below: dict[str, Any]) -> Any:
    return type(model).forward(_With(model, **below, **{head_name(model): head}), **kwargs)


def _plainly_fused(model: Any, head: nn.Linear, kwargs: dict[str, Any], below: dict[str, Any]) -> Any:
    return fused(model, head, _plain_sum, kwargs, below)


def _plain_sum(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, ignore_index: int
) -> Tensor:
    logits_TV = nn.functional.linear(hidden_TD, weight_VD, bias_V).float()
    return nn.functional.cross_entropy(logits_TV, target_T, ignore_index=ignore_index, reduction="sum")


def _refusal(cls: str, got: str) -> FastexpertsError:
    return refuse(
        cls,
        "loss",
        got=got,
        needs="the cross entropy of what a plain linear head gives",
        way_out=WAY_OUT,
    )
