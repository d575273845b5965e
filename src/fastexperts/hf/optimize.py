"""`optimize`: the whole training step of a model from well-kept parts, a row of `PARTS` each.

Each part finds the modules that it serves by comparing numbers, never by a name alone. What it cannot serve
stays as it is, and the summary says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import nn

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf import attention, liger, linear_lora, loss, norms, recompute, rotary, swiglu
from fastexperts.hf.experts import enable, pretrained_models
from fastexperts.hf.inventory import unwrapped

CHECKPOINTS = ("auto", *recompute.MODES)


@dataclass(frozen=True)
class Part:
    """What became of some modules of a part: whether it is on, what runs or why not."""

    part: str
    on: bool
    what: str
    modules: int = 0
    names: str = ""


@dataclass(frozen=True)
class StepSummary:
    """What `optimize` did; `str()` draws the table."""

    rows: tuple[Part, ...]
    checkpoint: str
    """One of `recompute.MODES`."""

    def of(self, part: str) -> tuple[Part, ...]:
        """The rows of one part."""
        return tuple(row for row in self.rows if row.part == part)

    def on(self, part: str) -> bool:
        """Whether any module runs on `part`."""
        return any(row.on for row in self.of(part))

    def with_rows(self, *rows: Part) -> StepSummary:
        """The same with `rows`, all of one part, in the place of that part's: what was done elsewhere."""
        part = rows[0].part
        at = next(i for i, old in enumerate(self.rows) if old.part == part)
        others = [old for old in self.rows if old.part != part]
        return replace(self, rows=(*others[:at], *rows, *others[at:]))

    def __str__(self) -> str:
        table = [("step", "", "modules", "")]
        for row in self.rows:
            what = f"{row.names}: {row.what}" if row.names else row.what
            table.append((row.part, "on" if row.on else "off", str(row.modules or "-"), what))
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
            ).rstrip()
            for line in table
        )


def _experts(model: nn.Module, where: str) -> list[Part]:
    rows = enable(model, verbose=False).served
    labels = {row: f"fastexperts, {row.activation}, top {row.top_k} of {row.experts}" for row in rows}
    return _merged("experts", [(row.name, True, label) for row, label in labels.items()])


def _put(finder: ModuleType, model: nn.Module, where: str) -> list[tuple[str, bool, str]]:
    """(name, whether it is on, what or why not) of each candidate of `finder`, whose forward is put in."""
    found: list[tuple[str, bool, str]] = []
    for name, module in finder.candidates(model).items():
        try:
            forward = finder.forward_of(module, where)
        except FastexpertsError as e:
            found.append((name, False, str(e)))
        else:
            forward.put()
            found.append((name, True, str(forward)))
    return found


def _by_liger(part: str, finder: ModuleType) -> Callable[[nn.Module, str], list[Part]]:
    """How a part of Liger's kernels is put in."""

    def apply(model: nn.Module, where: str) -> list[Part]:
        missing = liger.missing(where)
        if missing:
            return [Part(part, False, missing)]
        return _merged(part, _put(finder, model, where)) or [Part(part, False, "no such modules")]

    return apply


def _adapters(model: nn.Module, where: str) -> list[Part]:
    found = _merged("adapters", _put(linear_lora, model, where))
    return found or [Part("adapters", False, linear_lora.NONE_FOUND)]


def _attention(model: nn.Module, where: str) -> list[Part]:
    found: list[tuple[str, bool, str]] = []
    for root in pretrained_models(model, "optimize"):
        chosen = attention.choose(root, where)
        guarded = _put(attention, root, where) if chosen[2] == attention.CUDNN else []
        found += guarded or [chosen]
    return _merged("attention", found)


PARTS: dict[str, Callable[[nn.Module, str], list[Part]]] = {
    "experts": _experts,
    "norms": _by_liger("norms", norms),
    "rotary": _by_liger("rotary", rotary),
    "shared_experts": _by_liger("shared_experts", swiglu),
    "adapters": _adapters,
    "loss": _by_liger("loss", loss),
    "attention": _attention,
}
"""Name -> what puts the part into (model, type of the device it trains on), and says what became of it."""


def optimize(
    model: nn.Module,
    *,
    parts: Mapping[str, bool] | None = None,
    checkpoint: str = "auto",
    tokens: int | None = None,
    verbose: bool = True,
) -> StepSummary:
    """Put fast parts into the training step of a loaded `model`, and say which, where, and why not elsewhere.

    Args:
        model: a transformers model, or a wrapper of one; before or after PEFT, whose adapters on linear
            layers the part `adapters` has to find there.
        parts: {name: False} leaves a part of `PARTS` as it is; all others are on.
        checkpoint: `recompute.MODES`, or "auto": the one that recomputes least and fits the memory by an
            estimate, which is printed; "full" where `tokens` is not given.
        tokens: of one forward and backward on one device, for the estimate.
        verbose: print the summary.

    Nothing is patched but the instances in `model`; `restore(model)` takes the forwards away again. Raises
    FastexpertsError for an unknown name, for experts that `enable` refuses, and for modes that keep what
    experts or attention give where those are not ours or not PyTorch's sdpa.
    """
    roots = pretrained_models(model, "optimize")
    chosen = _check(roots, parts or {}, checkpoint)
    restore(model)
    where = liger.device_type(model)
    rows: list[Part] = []
    for name, apply in PARTS.items():
        rows += apply(model, where) if chosen[name] else [Part(name, False, "as asked")]
    mode, why = _checkpoint(roots, checkpoint, tokens, where, rows)
    without = sum(recompute.apply(root, mode) for root in roots)
    if without:
        why += f"; {without} layers run again without w2 and combine, whose output no backward reads"
    if mode == "keep-attention":
        why += "; attention with a mask (padding, packing, a sliding window) runs again"
    summary = StepSummary((*rows, Part("checkpoint", mode != "off", f"{mode}, {why}")), mode)
    if verbose:
        print(summary)
    return summary


def restore(model: nn.Module) -> int:
    """Give every module of `model` that norms, rotary, shared_experts, adapters, loss or attention changed
    the forward of its class back; returns how many there were. Experts, the name sdpa and checkpointing
    stay, but for what attention gave: it is kept no longer.
    """
    recompute.keep_experts_alone(model)
    return liger.restore(model)


def _check(roots: list[Any], parts: Mapping[str, bool], checkpoint: str) -> dict[str, bool]:
    """Every part and whether it is wanted; raises, before anything changes, for what cannot be."""
    for name in parts:
        if name not in PARTS:
            needs = f"names of {', '.join(PARTS)}"
            raise _refusal("parts", repr(name), needs, "Checkpointing has an argument of its own.")
    wanted = dict.fromkeys(PARTS, True) | dict(parts)
    if checkpoint not in CHECKPOINTS:
        needs = f"one of {', '.join(CHECKPOINTS)}"
        raise _refusal("checkpoint", repr(checkpoint), needs, "Leave it out to let an estimate decide.")
    if checkpoint in recompute.KEEP and not wanted["experts"]:
        got = f"{checkpoint!r} with the experts left as they are"
        needs = "experts that run on fastexperts: what is kept is what our op gives"
        way_out = "Leave parts={'experts': False} out, or take checkpoint='full'."
        raise _refusal("checkpoint", got, needs, way_out)
    if checkpoint in {*recompute.KEEP, "full"} and not _checkpoints(roots):
        got, needs = f"{checkpoint!r} for {type(roots[0]).__name__}", "a class with gradient checkpointing"
        raise _refusal("checkpoint", got, needs, "Pass checkpoint='off'.")
    if checkpoint == "keep-attention":
        for root in roots:
            attention.check_keepable(root, switches=wanted["attention"])
    return wanted


def _refusal(argument: str, got: str, needs: str, way_out: str) -> FastexpertsError:
    return refuse("optimize", argument, got=got, needs=needs, way_out=way_out)


def _checkpoints(roots: list[Any]) -> bool:
    return all(root.supports_gradient_checkpointing for root in roots)


def _checkpoint(
    roots: list[Any], asked: str, tokens: int | None, where: str, rows: list[Part]
) -> tuple[str, str]:
    """(mode, why) of the checkpointing that was asked for."""
    if asked != "auto":
        return asked, "as asked"
    if not _checkpoints(roots):
        return "off", "the class has no gradient checkpointing"
    if tokens is None:
        return "full", "since `tokens` of a step is not given"
    on = {row.part for row in rows if row.on}
    estimate = recompute.estimate(roots[0], tokens, where, fused="loss" in on)
    possible = dict.fromkeys(recompute.MODES, True) | dict.fromkeys(recompute.KEEP, "experts" in on)
    possible["keep-attention"] &= all(map(attention.keepable, roots))
    modes = tuple(mode for mode in recompute.MODES if possible[mode])
    mode = estimate.choose(modes)
    return mode, str(estimate) if estimate.fits(mode) else f"{estimate}: none fits"


def _merged(part: str, found: list[tuple[str, bool, str]]) -> list[Part]:
    """A row for each outcome, with the names that its modules have in their blocks."""
    outcomes: dict[tuple[bool, str], list[str]] = {}
    for name, on, what in found:
        outcomes.setdefault((on, what), []).append(unwrapped(name).rpartition(".")[2])
    return [
        Part(part, on, what, len(names), ", ".join(dict.fromkeys(name for name in names if name)))
        for (on, what), names in outcomes.items()
    ]
