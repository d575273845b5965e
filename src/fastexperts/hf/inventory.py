"""What of a model `enable` can switch, what not, and why: a `Row` per module, and the `Summary` of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastexperts.activations import ACTIVATIONS, Activation

_TOP_K_NAMES = (
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "num_experts_per_token",
    "moe_top_k",
)
_MOE_CLASS = re.compile(r"(MoE|MoeBlock|SparseMoe\w*)$")
_EXPERTS = re.compile(r"experts?(\d|\b|_|$)|Experts?(GLU|MLP|s|\b|$)")
_NOT_ROUTED = re.compile(r"shared|router|gate\b", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One experts module of a model."""

    name: str
    cls: str
    served: bool
    activation: str = ""
    experts: int | None = None
    top_k: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """What `enable` did, a row per module; `str()` draws the table, layers that agree on one line."""

    rows: tuple[Row, ...]

    @property
    def served(self) -> tuple[Row, ...]:
        """The rows that run on fastexperts."""
        return tuple(row for row in self.rows if row.served)

    @property
    def not_served(self) -> tuple[Row, ...]:
        """The rows that do not, each with its reason."""
        return tuple(row for row in self.rows if not row.served)

    def reasons(self) -> str:
        """A line for each kind of module that is not served: name, class, how many, why."""
        merged = _merged(self.not_served).items()
        return "\n".join(f"  {row.name} ({row.cls}, {count}): {row.reason}" for row, count in merged)

    def __str__(self) -> str:
        header = ("modules", "name", "class", "activation", "experts", "top-k", "D", "F", "fastexperts")
        table: list[tuple[str, ...]] = [header]
        for row, count in _merged(self.rows).items():
            dims = (row.experts, row.top_k, row.hidden, row.intermediate)
            cells = ("-" if dim is None else str(dim) for dim in dims)
            status = "yes" if row.served else f"no: {row.reason}"
            table.append((str(count), row.name, row.cls, row.activation or "-", *cells, status))
        widths = [max(len(line[i]) for line in table) for i in range(len(header) - 1)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
            for line in table
        )


def _merged(rows: tuple[Row, ...]) -> Counter[Row]:
    """Row -> modules: rows that differ in their layer index alone become one, with * for the index."""
    return Counter(replace(row, name=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.name)) for row in rows)


def in_interface(module: Any) -> bool:
    """Whether transformers dispatches the forward of `module` through an experts interface."""
    return "is_concatenated" in vars(module) and hasattr(type(module), "_apply_gate")


def stored(module: Any, name: str) -> bool:
    """Whether `module` has the parameter `name`, parametrized or not; never evaluates a parametrization."""
    return module._parameters.get(name) is not None or name in getattr(module, "parametrizations", ())


def label_of(activation: Activation) -> str:
    """The name of a row in ACTIVATIONS, with the constants that differ from it: swiglu(limit=10.0)."""
    activation = replace(activation, interleaved=False)  # a layout, of which the table has no column
    for name, row in ACTIVATIONS.items():
        if row == activation:
            return name
    plain = Activation(activation.fn, activation.gated)
    name = next((key for key, row in ACTIVATIONS.items() if row == plain), activation.fn)
    changed = [f"{key}={value}" for key, value in vars(activation).items() if value != getattr(plain, key)]
    return f"{name}({', '.join(changed)})" if changed else name


def row_of(name: str, module: Any, *, served: bool, activation: str = "", reason: str = "") -> Row:
    """The row of an interface module, with the dims that its weights and its config tell."""
    config = module.config
    top_k = next(
        (getattr(config, key) for key in _TOP_K_NAMES if isinstance(getattr(config, key, None), int)), None
    )
    experts = hidden = intermediate = None
    down = module._parameters.get("down_proj")
    if down is None and "down_proj" in getattr(module, "parametrizations", ()):
        down = module.parametrizations["down_proj"].original
    if down is not None and down.dim() == 3:
        experts, hidden, intermediate = down.shape
        if module.is_transposed:
            hidden, intermediate = intermediate, hidden
    return Row(name, type(module).__name__, served, activation, experts, top_k, hidden, intermediate, reason)


def interface_modules(model: nn.Module) -> dict[str, Any]:
    """name -> module, of the experts modules that transformers can switch."""
    return {name: module for name, module in model.named_modules() if in_interface(module)}


def unwrapped(name: str) -> str:
    """The name that an experts module had before PEFT wrapped it, once per adapted parameter."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def outside_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules that look like routed experts and that transformers cannot switch.

    A heuristic, since nothing marks them: a class or an attribute named for experts (not the shared ones), or
    a class named for a mixture, that holds parameters and neither contains, nor lies in, nor lies beside an
    interface module.
    """
    inside = list(interface_modules(model))
    # PEFT wraps an experts module once per adapted parameter: what lies beside the outermost wrapper counts.
    blocks = {unwrapped(name).rpartition(".")[0] for name in inside}
    found: list[str] = []
    for name, module in model.named_modules():
        (parent, _, attribute), cls = name.rpartition("."), type(module).__name__
        if not name or not (_EXPERTS.search(attribute) or _EXPERTS.search(cls) or _MOE_CLASS.search(cls)):
            continue
        if _NOT_ROUTED.search(attribute) or _NOT_ROUTED.search(cls):
            continue
        if (
            parent in blocks
            or any(related(name, other) for other in inside)
            or any(_within(name, other) for other in found)
        ):
            continue
        if next(module.parameters(), None) is not None:
            found.append(name)
            yield name, module


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(other + ".")


def related(name: str, other: str) -> bool:
    """Whether one of two modules is, or lies in, the other."""
    return _within(name, other) or _within(other, name)
