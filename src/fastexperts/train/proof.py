"""The proof behind a trained checkpoint: plain transformers reloads it and gets the same numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Relative Frobenius errors against fp64. Where fp32 itself cannot do better, as in a gradient that nearly
# cancels, twice what transformers' eager experts err is allowed; above the ceiling nothing would be proved.
TOLERANCE, CEILING = 1e-5, 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was verified: what was measured, and what it may be at most."""

    name: str
    measured: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measurement is a number within the limit."""
        return self.measured <= self.limit

    @property
    def used(self) -> float:
        """The measurement as a share of the limit; infinite for NaN, so that it is the worst of any."""
        if math.isnan(self.measured):
            return math.inf
        return self.measured / self.limit if self.limit else self.measured

    def as_json(self) -> dict[str, Any]:
        """The check and its verdict as plain JSON values."""
        return asdict(self) | {"passed": self.passed}


def prove(model: Any, checkpoint: Path, batch: dict[str, torch.Tensor]) -> list[Check]:
    """Compare a trained fp32 `model` on fastexperts with its `checkpoint` in transformers' eager experts.

    Logits and the gradients of one step's loss (auxiliary loss included) on `batch`, the weights bit by bit,
    the per-expert keys of the file, and that the one side ran fastexperts' ops and the other none. The
    reference is eager in fp64, but for what transformers' models always do in fp32 (norms, softmax, loss);
    eager in fp32 says how near fp32 can come.
    """
    eager = _reload(model, checkpoint, torch.float32)
    weights, stored = model.state_dict(), eager.state_dict()
    unequal = [
        name for name in weights if not torch.equal(weights[name], stored.get(name, weights[name] + 1))
    ]
    wrong_keys = _wrong_keys(eager, checkpoint)
    ours, theirs = _step(model, batch), _step(eager, batch)
    del eager
    exact = _step(_reload(model, checkpoint, torch.float64), batch)

    lacking = ours.gradients.keys() ^ exact.gradients.keys()
    gradients = [
        _compare("gradients, worst relative error", ours.gradients[name], theirs.gradients[name], want, name)
        for name, want in exact.gradients.items()
        if name not in lacking
    ]
    return [
        Check("reloaded weights that differ", len(unequal), 0, f"of {len(weights)}, bit by bit"),
        Check("wrong keys in the checkpoint", *wrong_keys),
        _compare("logits, relative error", ours.logits, theirs.logits, exact.logits),
        _compare("loss, relative error", ours.loss, theirs.loss, exact.loss, f"loss {ours.loss.item():.4f}"),
        max(gradients, key=lambda check: check.used),
        Check("gradients that one side lacks", len(lacking), 0, f"of {len(exact.gradients)}"),
        Check("calls of fastexperts' ops missing", *_missing_calls(model, ours.calls)),
        Check("calls of fastexperts' ops by the reference", sum(theirs.calls.values()), 0),
    ]


def _reload(model: Any, checkpoint: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        experts_implementation="eager",
        attn_implementation=model.config._attn_implementation,
    ).to(model.device)


@dataclass(frozen=True)
class _Step:
    loss: torch.Tensor
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    calls: Counter[str]


class _CountOps(TorchDispatchMode):
    """Counts calls of ops of the `fastexperts` library, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastexperts":
            self.calls[func._schema.name.removeprefix("fastexperts::")] += 1
        return func(*args, **(kwargs or {}))


def _step(model: Any, batch: dict[str, torch.Tensor]) -> _Step:
    """One training step's loss, logits and gradients, without a trainer, autocast or checkpointing."""
    with _plain(model), _CountOps() as counter:
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return _Step(output.loss.detach(), output.logits.detach(), gradients, counter.calls)


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """The model in training mode, no gradients held, without gradient checkpointing; as it was afterwards."""
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    training = model.training
    model.zero_grad(set_to_none=True)
    model.train()
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        model.train(training)


def _compare(
    name: str, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, detail: str = ""
) -> Check:
    theirs = _error(eager, exact)
    limit = min(max(TOLERANCE, 2 * theirs), CEILING)
    return Check(name, _error(got, exact), limit, f"eager: {theirs:.1e}" + (f"; {detail}" if detail else ""))


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact|; NaN, which passes no limit, if either is not finite."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def _experts_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if "is_concatenated" in vars(module)}


def _missing_calls(model: Any, calls: Counter[str]) -> tuple[int, float, str]:
    """Experts layers without a forward or a backward of our op; the detail lists what was counted."""
    layers = len(_experts_modules(model))
    detail = f"{layers} layers; " + ", ".join(f"{name} {count}" for name, count in sorted(calls.items()))
    return max(0, layers - calls["moe_mlp"]) + max(0, layers - calls["moe_mlp_backward"]), 0, detail


def _wrong_keys(model: Any, checkpoint: Path) -> tuple[int, float, str]:
    """How far the file is from one tensor per expert and projection, and none fused, by the model's sizes."""
    from safetensors import safe_open

    keys: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            keys |= set(tensors.keys())
    modules = _experts_modules(model)
    fused = keys & {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    per_expert = [key for key in keys if re.search(r"\.experts\.\d+\.\w+\.weight$", key)]
    wanted = sum(module.num_experts * (2 + module.has_gate) for module in modules.values())
    detail = f"{len(per_expert)} expert tensors of {len(keys)}, none fused"
    return len(fused) + abs(len(per_expert) - wanted), 0, detail
