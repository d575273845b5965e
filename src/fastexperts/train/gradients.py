"""Proof at run time that adapters of experts train: each factor that must have a gradient has one.

What must have one follows from the algebra of w + s B A, per expert and per rank i:

    dB[:, i] = s dy^T (x A_i)    is zero only if no gradient reached the expert's output
    dA[i]    = s (dy B_i)^T x    is also zero as long as B_i is, as it is when training starts

So B is checked in the first step, and A as soon as the optimizer has moved B: in the second step, or later if
a warm-up starts at a learning rate of zero. Tokens without a label, padding and the last token of each
document send no gradient back: an expert that got no others is not asked for one. Nor is one in a block whose
output no gradient reached, such as a vision tower's in a run on texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.inventory import in_interface, unwrapped

STEPS = 20
"""Optimizer steps within which each factor has to be checked."""

_SWITCH = "Without this check: leave the callback out, or set `lora.check_gradients: false`."


@dataclass
class _Update:
    """An adapter's factors of one experts parameter: A by expert [E * r, in], B by rank [out, r * E]."""

    experts: int
    layer: str
    """Name of the experts module."""
    a_name: str
    b_name: str
    a: Tensor
    b: Tensor
    parts: int
    """Gate and up, whose rows B holds one after the other: 2; else 1."""
    unchecked: set[str]


class ExpertGradients(TrainerCallback):
    """Stops a run in which an expert's LoRA factor gets no gradient, naming the tensor and the experts.

        SFTTrainer(model, peft_config=lora_config(model), callbacks=[ExpertGradients()], ...)

    Checked per expert, per rank, and for gate and up apart, in the first two optimizer steps (more where no
    token came by); afterwards it does nothing. Raises FastexpertsError before the optimizer steps, also if
    there is no trainable factor of experts, or one could not be checked within STEPS steps. A step with a
    gradient that is not finite, which a loss scaler skips, is passed over: clipping zeroes the others.
    """

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        """`say` gets one line when all factors were checked, or the run ended before."""
        self._say = say or (lambda line: None)
        self._model: Any = None
        self._updates: list[_Update] = []
        self._reached: dict[str, Tensor] = {}
        self._due: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the factors, and watch the experts."""
        self._stop()
        self._model, self._updates, self._steps = model, list(_updates(model)), 0
        self._due.clear()
        if not self._updates:
            raise refuse(
                "ExpertGradients",
                "model",
                got="a model without trainable LoRA factors of experts",
                needs="some to check",
                way_out="Adapt the experts (`fastexperts.lora_config`), or leave the callback out.",
            )
        layers = {update.layer for update in self._updates}
        for name, module in model.named_modules():
            if name in layers:
                self._handles.append(module.register_forward_hook(self._watch(name), with_kwargs=True))
                block = model.get_submodule(_block_of(name))
                self._handles.append(block.register_forward_hook(self._watch_block(name)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check what can be checked; raise for a gradient that is missing."""
        if not self._handles:
            return
        if not _finite(self._model):
            self._reached.clear()
            return
        self._steps += 1
        for update in self._updates:
            reached_E = self._reached.get(update.layer)
            if reached_E is not None:
                _check(update, reached_E[: update.experts])
        self._reached.clear()
        left = self._unchecked()
        if not left:
            self._say(
                f"Gradients: every LoRA factor of the experts gets one ({self._tensors()} tensors, "
                f"{self._steps} steps)."
            )
            self._stop()
        elif self._steps >= STEPS:
            self._stop()
            due = self._unchecked(self._due)
            if self._due and not due:
                self._say(
                    f"Gradients: {self._tensors() - len(left)} LoRA factors of the experts get one ({STEPS} "
                    f"steps); the other {len(left)} are in blocks that no gradient reached, first {left[0]}."
                )
                return
            raise refuse(
                "ExpertGradients",
                (due or left)[0],
                got=f"no gradient to check in {STEPS} steps",
                needs="an expert that gets tokens, and for lora_A a lora_B that has moved from zero",
                way_out=f"Look at the learning rate and the optimizer's parameters. {_SWITCH}",
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what was not checked, if the run was too short."""
        if self._handles:
            left = self._unchecked()
            self._say(
                f"Gradients: {len(left)} of {self._tensors()} LoRA factors of the experts were not checked, "
                f"the run ended after {self._steps} steps."
            )
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._reached.clear()
        self._model = None

    def _tensors(self) -> int:
        return sum(factor.requires_grad for update in self._updates for factor in (update.a, update.b))

    def _unchecked(self, layers: set[str] | None = None) -> list[str]:
        """The factors that were not checked, of all experts modules or of these."""
        updates = [update for update in self._updates if layers is None or update.layer in layers]
        return [name for update in updates for name in sorted(update.unchecked)]

    def _watch(self, name: str) -> Any:
        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out_TD: Tensor) -> None:
            if not out_TD.requires_grad:
                return  # evaluation, and the first pass of reentrant checkpointing
            index_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weight_TK = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            index_TK, weight_TK = index_TK.detach(), weight_TK.detach()

            def note(dout_TD: Tensor) -> None:
                self._note(name, int(module.num_experts), index_TK, weight_TK, dout_TD)

            out_TD.register_hook(note)

        return watch

    def _watch_block(self, name: str) -> Any:
        def watch(module: Any, args: tuple[Any, ...], out: Any) -> None:
            out_TD = out if isinstance(out, Tensor) else out[0]
            if out_TD.requires_grad:
                out_TD.register_hook(lambda _: self._due.add(name))

        return watch

    def _note(self, name: str, experts: int, index_TK: Tensor, weight_TK: Tensor, dout_TD: Tensor) -> None:
        """Mark the experts whose output got a gradient; nothing is read back to the host."""
        self._due.add(name)
        reached_E = self._reached.get(name)
        if reached_E is None:
            # One more place takes what does not count.
            reached_E = torch.zeros(experts + 1, dtype=torch.bool, device=index_TK.device)
            self._reached[name] = reached_E
        counts_TK = (index_TK >= 0) & (index_TK < experts) & (weight_TK != 0)
        counts_TK = counts_TK & (dout_TD != 0).any(-1, keepdim=True)
        reached_E.index_fill_(0, torch.where(counts_TK, index_TK, experts).reshape(-1), True)


def _block_of(experts: str) -> str:
    """The name of the module that calls the experts, through PEFT's wrappers around them if there are any."""
    return unwrapped(experts).rpartition(".")[0]


def _finite(model: Any) -> bool:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = [gradient.isfinite().all().cpu() for gradient in gradients]
    return not finite or bool(torch.stack(finite).all())


def _updates(model: Any) -> Iterator[_Update]:
    """The trainable factors of experts in `model`, as PEFT's wrappers hold them."""
    names = {id(module): name for name, module in model.named_modules()}
    for name, wrapper in model.named_modules():
        if not hasattr(wrapper, "parameter_name") or not hasattr(wrapper, "lora_A"):
            continue
        experts = wrapper.get_base_layer()
        if not in_interface(experts):
            continue
        # Where PEFT took the inputs for the outputs, B faces them and has no halves.
        faces_outputs = bool(wrapper._did_swap_in_out_features) != bool(experts.is_transposed)
        halves = wrapper.parameter_name == "gate_up_proj" and faces_outputs and experts.is_concatenated
        for adapter in wrapper.lora_A:
            a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
            a_name, b_name = (f"{name}.lora_{x}.{adapter}.weight" for x in "AB")
            trained = {key for key, factor in ((a_name, a), (b_name, b)) if factor.requires_grad}
            if trained:
                layer, parts = names[id(experts)], 2 if halves else 1
                yield _Update(wrapper.num_experts, layer, a_name, b_name, a, b, parts, trained)


def _check(update: _Update, reached_E: Tensor) -> None:
    """Raise unless the gradients of the reached experts are there; note which factors were looked at."""
    E = update.experts
    b_OEr = update.b.detach().unflatten(1, (-1, E)).transpose(1, 2)
    moved_Er = (b_OEr != 0).any(0)
    if update.a.requires_grad:
        da_ErI = _gradient(update.a, update.a_name).unflatten(0, (E, -1))
        due_Er = reached_E[:, None] & moved_Er
        _compare(update, update.a_name, due_Er, (da_ErI != 0).any(-1))
    if update.b.requires_grad:
        db_COrE = _gradient(update.b, update.b_name).unflatten(1, (-1, E)).unflatten(0, (update.parts, -1))
        due_Er = reached_E[:, None].expand_as(moved_Er)
        _compare(update, update.b_name, due_Er, (db_COrE != 0).any(1).all(0).T)


def _gradient(factor: Tensor, name: str) -> Tensor:
    if factor.grad is None:
        raise _missing(name, "no gradient at all")
    return factor.grad


def _compare(update: _Update, name: str, due_Er: Tensor, there_Er: Tensor) -> None:
    due_Er, there_Er = torch.stack([due_Er, there_Er.to(due_Er.device)]).cpu()
    dead_Er = due_Er & ~there_Er
    if dead_Er.any():
        experts = dead_Er.any(1).nonzero().flatten().tolist()
        expert = experts[0]
        ranks, all_ranks = int(dead_Er[expert].sum()), dead_Er.shape[1]
        raise _missing(
            name,
            f"a gradient of zero in {len(experts)} of the {int(due_Er.any(1).sum())} experts that must have "
            f"one, first in expert {expert} ({ranks} of its {all_ranks} ranks)",
        )
    if due_Er.any():
        update.unchecked.discard(name)


def _missing(name: str, got: str) -> FastexpertsError:
    return refuse(
        "ExpertGradients",
        name,
        got=got,
        needs="a gradient in each rank of each expert that tokens train",
        way_out=f"This adapter would not learn: please report it, with versions and settings. {_SWITCH}",
    )
