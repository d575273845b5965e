"""`lora_config`: which parts of a loaded model a LoRA adapter trains, by explicit names, and what that costs.

PEFT's shorthands (`"all-linear"`, a bare `gate_proj`) adapt the router on some families and miss the experts
on others. Here the modules decide: experts are those of transformers' interface, everything else is looked up
in their decoder layers, and each name that PEFT gets matches what was found and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastexperts.dtypes import DTYPES
from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.inventory import interface_modules, outside_modules, stored

MAX_RANK = 128
EXPERTS, ATTENTION, SHARED, ROUTER, SAVED = "experts", "attention", "shared experts", "router", "full"

_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
# By name or by class (nemotron_h: mixer), and not post_attention_layernorm or attn_hyper_connection.
_ATTENTION = re.compile(r"(attn|attention)$", re.IGNORECASE)
_INDEXER = re.compile(r"indexer", re.IGNORECASE)  # picks tokens by top-k: nothing in it has a gradient
_SHARED = re.compile(r"^shared_(experts?|mlp)$")
_ROUTER = re.compile(r"^(gate$|router)")
# As names of `target_modules`, PEFT takes these for the experts of a checkpoint from before transformers 5
# and rewrites them, `shared_experts.gate_proj` too. As parameters they stay what they are.
_REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_OPTIONS = frozenset({"lora_dropout", "use_rslora", "init_lora_weights", "task_type"})


class LoraRow(NamedTuple):
    """One adapted weight of a model, or one module that is trained in full."""

    name: str
    """The parameter's full name; of a module trained in full, the module's."""
    kind: str
    """One of "experts", "attention", "shared experts", "router", "full"."""
    experts: int | None
    """How many experts the weight holds, each with an update of its own."""
    parameters: int
    """Trainable parameters: rank * (in + out), for each expert."""
    by_module: bool = False
    """Whether PEFT is given the module's name, or the parameter's."""


@dataclasses.dataclass(frozen=True)
class LoraSummary:
    """What an adapter trains, a row per weight; `str()` draws the table, layers on one line."""

    rank: int
    """Rank of each update: per expert, where a weight holds experts."""
    scale: float
    """What the product of the factors is multiplied with."""
    rows: tuple[LoraRow, ...]
    total: int
    """Parameters of the model without the adapter."""

    @property
    def trainable(self) -> int:
        """Trainable parameters of the model with the adapter."""
        return sum(row.parameters for row in self.rows)

    @property
    def layers(self) -> int:
        """Decoder layers in which something is adapted."""
        return len({_layer_of(row.name) for row in self.rows if row.kind != SAVED} - {""})

    def __str__(self) -> str:
        table = [("trained", "weights", "name", "experts", "rank", "parameters")]
        counts: Counter[tuple[str, str, int | None]] = Counter()
        parameters: Counter[tuple[str, str, int | None]] = Counter()
        for row in self.rows:
            key = row.kind, _tail(row.name), row.experts
            counts[key] += 1
            parameters[key] += row.parameters
        for (kind, name, experts), count in counts.items():
            rank = "-" if kind == SAVED else str(self.rank)
            cells = "-" if experts is None else str(experts), rank, f"{parameters[kind, name, experts]:,}"
            table.append((kind, str(count), name, *cells))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
            for line in table
        ]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(
            f"LoRA of rank {self.rank}, scale {self.scale:g}, in {self.layers} layers: "
            f"{self.trainable:,} trainable parameters, {share:.2g} % of the model's {self.total:,}."
        )
        return "\n".join(lines)


def lora_config(
    model: nn.Module,
    r: int = 16,
    *,
    alpha: float | None = None,
    experts: bool = True,
    attention: bool = True,
    shared_experts: bool = False,
    router: bool = False,
    modules_to_save: Sequence[str] | None = None,
    verbose: bool = True,
    **options: Any,
) -> Any:
    """A `peft.LoraConfig` that adapts what was asked for in this `model`, and nothing else.

    Args:
        model: a loaded transformers model, before `get_peft_model` or `SFTTrainer(peft_config=...)`.
        r: rank of each update, 1 to 128. Each expert has its own.
        alpha: the updates are scaled by alpha / r. Default: r, a scale of 1.
        experts: the routed experts' gate, up and down projections, of every layer that has experts.
        attention: every linear map in attention.
        shared_experts: the projections of experts that see every token.
        router: the matrix that chooses experts.
        modules_to_save: modules trained in full and saved with the adapter, such as "lm_head".
        verbose: print the summary: what is adapted, rank, trainable parameters, layers.
        options: LoraConfig's `use_rslora`, `init_lora_weights`, `task_type` (default: CAUSAL_LM for a model
            that generates); `lora_dropout` for attention alone. PEFT supports neither dropout nor DoRA on
            experts.

    Raises FastexpertsError if something asked for is not in the model, or not supported.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise refuse(
            "lora_config",
            "peft",
            got="none",
            needs="peft >= 0.21",
            way_out="Install it with: pip install 'fastexperts[peft]'.",
        ) from error
    summary = lora_summary(
        model,
        r,
        alpha=alpha,
        experts=experts,
        attention=attention,
        shared_experts=shared_experts,
        router=router,
        modules_to_save=modules_to_save,
    )
    if options.get("use_rslora"):
        summary = dataclasses.replace(summary, scale=summary.scale * math.sqrt(r))
    parameters = [row.name for row in summary.rows if row.kind != SAVED and not row.by_module]
    _check_options(options, bool(parameters))
    modules = [row.name.removesuffix(".weight") for row in summary.rows if row.by_module]
    task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None  # PEFT's wrapper calls it
    config = LoraConfig(
        r=r,
        lora_alpha=r if alpha is None else alpha,
        target_modules=_shortened(modules, (name for name, _ in model.named_modules())),
        target_parameters=_shortened(parameters, (name for name, _ in model.named_parameters())) or None,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        **{"task_type": task} | options,
    )
    if verbose:
        print(summary)
    return config


def lora_summary(
    model: nn.Module,
    r: int = 16,
    *,
    alpha: float | None = None,
    experts: bool = True,
    attention: bool = True,
    shared_experts: bool = False,
    router: bool = False,
    modules_to_save: Sequence[str] | None = None,
) -> LoraSummary:
    """What `lora_config` with these arguments trains; raises FastexpertsError as it does."""
    _check_rank(r, alpha)
    parts = {EXPERTS: experts, ATTENTION: attention, SHARED: shared_experts, ROUTER: router}
    if any(".base_layer" in name for name, _ in model.named_modules()):
        raise refuse(
            "lora_config",
            "model",
            got="a model with adapters",
            needs="the model before any adapter was added",
            way_out="Make the config first; `add_adapter` takes the same one again.",
        )
    found = _find(model, parts)
    if parts[EXPERTS]:
        _check_experts(model, found[EXPERTS])
    rows = [row for kind in found if parts[kind] for row in _required(kind, found[kind], model)]
    rows = [row._replace(parameters=r * row.parameters) for row in rows]
    rows += _saved(model, modules_to_save or (), rows)
    if not rows:
        raise refuse(
            "lora_config",
            "experts",
            got="False, and nothing else to adapt",
            needs="at least one part of the model",
            way_out="Leave experts=True, or pass attention=True.",
        )
    scale = 1.0 if alpha is None else alpha / r
    return LoraSummary(r, scale, tuple(rows), sum(parameter.numel() for parameter in model.parameters()))


def _find(model: nn.Module, parts: dict[str, bool]) -> dict[str, list[LoraRow]]:
    """What can be adapted of `parts`, by kind; rows of rank 1."""
    found: dict[str, list[LoraRow]] = {kind: [] for kind in parts}
    experts = interface_modules(model)
    experts_of = {_layer_of(name): int(module.num_experts) for name, module in experts.items()}
    for module_name, module in experts.items() if parts[EXPERTS] else ():
        for name in (name for name in _WEIGHTS if stored(module, name)):
            full, weight = f"{module_name}.{name}", module._parameters.get(name)
            if weight is None or weight.dim() != 3 or not weight.is_floating_point():
                raise _not_plain(full)
            count, rows, columns = weight.shape
            found[EXPERTS].append(LoraRow(full, EXPERTS, count, count * (rows + columns)))
    stacks = {layer.rpartition(".")[0] for layer in experts_of}
    attentions = [f"{name}." for name, m in model.named_modules() if _ATTENTION.search(type(m).__name__)]
    for name, module in model.named_modules():
        layer = _layer_of(name)
        if experts and layer.rpartition(".")[0] not in stacks:
            continue  # another tower of the model, such as vision
        in_attention = any(name.startswith(attention) for attention in attentions)
        kind = _kind_of(name.removeprefix(f"{layer}.").split("."), module, in_attention)
        if kind == ROUTER and parts[kind]:
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) == experts_of.get(layer):
                found[kind].append(LoraRow(f"{name}.weight", kind, None, sum(weight.shape)))
        elif kind is not None and parts[kind]:
            found[kind].append(_linear(name, module, kind))
    return found


def _kind_of(path: list[str], module: Any, in_attention: bool) -> str | None:
    """What a module at `path` in its layer is, of what can be adapted beside experts."""

    def within(name: re.Pattern[str]) -> bool:
        return any(name.search(part) for part in path)

    if isinstance(module, nn.Linear) and within(_SHARED):
        return SHARED
    if isinstance(module, nn.Linear) and (in_attention or within(_ATTENTION)):
        return None if within(_INDEXER) else ATTENTION
    return ROUTER if within(_ROUTER) else None


def _linear(name: str, module: nn.Linear, kind: str) -> LoraRow:
    plain = module.weight.shape == (module.out_features, module.in_features) and module.weight.dtype in DTYPES
    by_module = name.rpartition(".")[2] not in _REWRITTEN
    if not by_module and not plain:
        raise _not_plain(f"{name}.weight")
    if plain and type(module).forward is not nn.Linear.forward:
        # deepseek_v4's o_a_proj maps groups of its input: beside such a forward PEFT's product does not fit.
        by_module = False
    return LoraRow(f"{name}.weight", kind, None, module.in_features + module.out_features, by_module)


def _required(kind: str, rows: list[LoraRow], model: nn.Module) -> list[LoraRow]:
    if not rows:
        raise refuse(
            "lora_config",
            kind.replace(" ", "_"),
            got=f"True, and {type(model).__name__} has none that were found",
            needs="a model with them",
            way_out=f"Pass {kind.replace(' ', '_')}=False, or write a LoraConfig with explicit targets.",
        )
    return rows


def _saved(model: nn.Module, names: Sequence[str], rows: list[LoraRow]) -> list[LoraRow]:
    """A row for each module that PEFT would match with `names`: those whose name ends so."""
    found = []
    for wanted in [names] if isinstance(names, str) else names:
        matched = {name: module for name, module in model.named_modules() if name.endswith(wanted)}
        if not matched:
            raise refuse(
                "lora_config",
                "modules_to_save",
                got=f"{wanted!r}, which is no module of {type(model).__name__}",
                needs="names of modules",
                way_out='Take them from `model.named_modules()`, such as "lm_head".',
            )
        for name, module in matched.items():
            adapted = next((row.name for row in rows if row.name.startswith(f"{name}.")), None)
            if adapted is not None:
                raise refuse(
                    "lora_config",
                    "modules_to_save",
                    got=f"{wanted!r}, and {adapted} in it is adapted",
                    needs="modules without an adapter",
                    way_out="Leave one of the two out.",
                )
            found.append(LoraRow(name, SAVED, None, sum(p.numel() for p in module.parameters())))
    return found


def _check_rank(r: Any, alpha: Any) -> None:
    if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= MAX_RANK:
        raise refuse(
            "lora_config",
            "r",
            got=repr(r),
            needs=f"a whole number from 1 to {MAX_RANK}",
            way_out="16 is usual.",
        )
    if alpha is not None and not alpha > 0:
        raise refuse(
            "lora_config", "alpha", got=repr(alpha), needs="more than 0", way_out="Leave it out for r."
        )


def _check_experts(model: nn.Module, found: list[LoraRow]) -> None:
    outside = [f"{name} ({type(module).__name__})" for name, module in outside_modules(model)]
    if found and not outside:
        return
    if outside:
        got = f"True, and transformers does not dispatch {len(outside)} experts modules, as {outside[0]}"
    else:
        got = f"True, and {type(model).__name__} has no experts"
    raise refuse(
        "lora_config",
        "experts",
        got=got,
        needs="a mixture-of-experts model whose experts are in transformers' interface",
        way_out="Pass experts=False to adapt the rest.",
    )


def _check_options(options: dict[str, Any], on_parameters: bool) -> None:
    """Raise for what PEFT does not do on parameters, and for what would train more than the summary says."""
    for name, value in options.items():
        if name not in _OPTIONS:
            needs, way_out = f"one of {sorted(_OPTIONS)}", "Write a peft.LoraConfig with explicit targets."
            if name == "use_dora":
                needs = "no DoRA: PEFT supports it on no experts"
                way_out = "Leave it out, or write a peft.LoraConfig for attention alone."
            raise refuse("lora_config", name, got=repr(value), needs=needs, way_out=way_out)
    way_out = "Leave it out, or adapt attention alone with experts=False."
    if on_parameters and options.get("lora_dropout"):
        raise refuse(
            "lora_config",
            "lora_dropout",
            got=repr(options["lora_dropout"]),
            needs="0: PEFT adapts experts, shared experts and routers as parameters, without dropout",
            way_out=way_out,
        )
    if on_parameters and options.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise refuse(
            "lora_config",
            "init_lora_weights",
            got=repr(options["init_lora_weights"]),
            needs="True, False or 'gaussian': PEFT starts experts in no other way",
            way_out=way_out,
        )


def _not_plain(name: str) -> FastexpertsError:
    return refuse(
        "lora_config",
        "model",
        got=f"{name}, which is no plain floating-point matrix",
        needs="weights that PEFT can add to",
        way_out="Load the model without quantising this weight.",
    )


def _shortened(names: list[str], pool: Iterable[str]) -> list[str]:
    """Names without their layer where that suffices: PEFT matches ends, and nothing else may be matched."""
    wanted, short, every = set(names), [], list(pool)
    for tail in dict.fromkeys(map(_tail, names)):
        matched = {name for name in every if name == tail or name.endswith(f".{tail}")}
        full = (name for name in names if _tail(name) == tail)
        short += [tail] if matched <= wanted else list(full)
    return short


def _layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.gate`; empty outside layers."""
    match = re.match(r"(.*?\.\d+|\d+)(?=\.|$)", name)
    return match.group(1) if match else ""


def _tail(name: str) -> str:
    layer = _layer_of(name)
    return name.removeprefix(f"{layer}.") if layer else name
