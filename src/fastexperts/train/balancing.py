"""Loss-free balancing: a bias on the router's choice evens the experts' load, without an auxiliary loss.

After each optimizer step, with load_e the tokens of the step that expert e got:

    b_e += rate * sign(mean load - load_e)

The bias is added to a router's scores where it chooses the experts, and not to their weights, so that no
gradient speaks against the data's (arXiv 2408.15664; DeepSeek-V3 report, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.metrics.expert_load import ExpertLoad

NAMES = ("e_score_correction_bias", "expert_bias")
"""What families call the bias: a buffer, or a parameter without gradients, of the router or beside it."""
RATE = 1e-3
"""DeepSeek-V3's."""


@dataclass(frozen=True)
class Bias:
    """The bias of one layer."""

    name: str
    layer: str
    """Name of the experts module whose load it evens."""
    module: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        """The tensor as it is now: moving a model to a device puts another in its place."""
        bias: Tensor = getattr(self.module, self.attribute)
        return bias

    @torch.no_grad()
    def move(self, direction_E: Tensor, rate: float) -> None:
        """Add `rate` times `direction_E`, which may have more columns than there are experts."""
        value = self.value
        if value.dtype != torch.float32:
            raise _wrong_dtype(self)  # DeepSpeed and FSDP may cast buffers after training has begun
        value.add_(direction_E[: value.numel()].view(value.shape).to(value.device), alpha=rate)


class LossFreeBalancing(TrainerCallback):
    """Evens the experts' load of families that have a bias for it, such as DeepSeek-V3, GLM-4.5 and dots.1.

        trainer = SFTTrainer(model, callbacks=[LossFreeBalancing()], ...)

    The load is that of an optimizer step: of all micro-steps and processes, without padding. The bias is part
    of the model, so that checkpoints have it, and a run that is continued goes on with it.

    Raises FastexpertsError as training begins if the model has no such bias, or one that cannot be moved or
    would not be saved.
    """

    def __init__(self, rate: float = RATE, *, say: Callable[[str], object] = print) -> None:
        """rate: what a bias moves in a step. `say` gets a line with what is balanced, once."""
        if not 0 < rate <= 1:
            way_out = f"Leave it out for {RATE}, DeepSeek-V3's."
            raise refuse("LossFreeBalancing", "rate", got=rate, needs="above 0, up to 1", way_out=way_out)
        self._rate, self._say = rate, say
        self._load: ExpertLoad | None = None
        self._biases: dict[str, Bias] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Find the biases, and count the load."""
        self._stop()
        self._biases = find_biases(model)
        if args.n_gpu > 1:
            raise refuse(
                "LossFreeBalancing",
                "model",
                got="DataParallel, which throws away what its copies count",
                needs="a process for each GPU",
                way_out="Start it with torchrun or accelerate launch.",
            )
        self._load = ExpertLoad(model)
        self._load.start()
        if args.process_index == 0:
            layers, biased = len(self._load.layers), len(self._biases)
            self._say(f"Loss-free balancing: the biases of {biased} of {layers} layers, rate {self._rate:g}.")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the biases against the load of this step; nothing is read back to the host."""
        if self._load is None:
            return
        load_LE = self._load.table(args.device)
        self._load.reset()
        if args.world_size > 1:
            torch.distributed.all_reduce(load_LE)
        sizes_L1 = torch.tensor(self._load.experts, device=args.device)[:, None]
        # In whole numbers: mean - load has the sign of sum - experts * load.
        direction_LE = torch.sign(load_LE.sum(1, keepdim=True) - sizes_L1 * load_LE).float()
        for direction_E, layer in zip(direction_LE, self._load.layers, strict=True):
            if layer in self._biases:
                self._biases[layer].move(direction_E, self._rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count no more."""
        self._stop()

    def _stop(self) -> None:
        if self._load is not None:
            self._load.stop()
        self._load = None


def find_biases(model: nn.Module) -> dict[str, Bias]:
    """Name of an experts module -> the bias of its router's choice, told by name and place in the model.

    Raises FastexpertsError if there is none, or one that cannot be balanced.
    """
    if hasattr(model, "peft_config"):
        raise refuse(
            "LossFreeBalancing",
            "model",
            got="adapters, which do not save the biases of the frozen model",
            needs="a model that is trained in full",
            way_out="Leave balancing out with adapters.",
        )
    load, found = ExpertLoad(model), dict[str, Bias]()
    experts = dict(zip(load.layers, load.experts, strict=True))
    for path, module in model.named_modules():
        for attribute in NAMES:
            if getattr(module, attribute, None) is None:
                continue
            name = f"{path}.{attribute}"
            # A router and the biases in it lie beside the experts, or they are the block's that has them.
            beside = [layer for layer in experts if name.startswith(layer.rpartition(".")[0] + ".")]
            if beside:
                layer = max(beside, key=len)
                found[layer] = Bias(name, layer, module, attribute)
                _check(found[layer], experts[layer])
    if not found:
        raise refuse(
            "LossFreeBalancing",
            "model",
            got=_instead(model),
            needs=f"routers with {' or '.join(NAMES)}, as DeepSeek-V3 and its like have",
            way_out="Leave balancing out; other families have an auxiliary loss (`router_aux_loss_coef`).",
        )
    return found


def _instead(model: nn.Module) -> str:
    if any(name.endswith("balancing_biases") for name, _ in model.named_buffers()):
        return (
            "balancing_biases (zaya), whose last entry transformers' from_pretrained writes over, so that "
            "what is saved is not what is loaded"
        )
    return f"{type(model).__name__}, without one beside experts of transformers' interface"


def _check(bias: Bias, experts: int) -> None:
    value = bias.value
    if type(value) not in (Tensor, nn.Parameter) or value.numel() != experts:
        raise refuse(
            "LossFreeBalancing",
            bias.name,
            got=f"{type(value).__name__} of shape {tuple(value.shape)}",
            needs=f"a plain tensor of {experts} values on each process",
            way_out="Keep routers out of what FSDP or tensor parallelism shards.",
        )
    if value.requires_grad:
        raise refuse(
            "LossFreeBalancing",
            bias.name,
            got="a bias that the optimizer trains",
            needs="one that balancing alone moves",
            way_out="Call requires_grad_(False) on it.",
        )
    if value.dtype != torch.float32:
        raise _wrong_dtype(bias)


def _wrong_dtype(bias: Bias) -> FastexpertsError:
    return refuse(
        "LossFreeBalancing",
        bias.name,
        got=f"{bias.value.dtype}, which is too coarse for a rate's steps",
        needs="torch.float32",
        way_out="Load the model in float32 and train under bf16 autocast, or make this tensor float32.",
    )
