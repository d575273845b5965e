"""adapter_config.json: the rank, scale and target of each projection, read as PEFT reads it, and written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastexperts.errors import refuse

_SETTINGS = {"rank": ("rank_pattern", "r"), "alpha": ("alpha_pattern", "lora_alpha")}


@dataclass(frozen=True)
class Target:
    """A projection of the experts as a config names it: `name`, and `pattern` for all experts of it."""

    name: str
    pattern: str
    rank: int
    scale: float


def setting(config: Mapping[str, Any], what: Literal["rank", "alpha"], name: str) -> Any:
    """The rank or alpha of the module or parameter `name`: the first matching pattern's, or the default."""
    patterns, default = _SETTINGS[what]
    for pattern, value in (config.get(patterns) or {}).items():
        if _matches(pattern, name):
            return value
    return config[default]


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What the update of `name` is multiplied with; raises FastexpertsError for another rank."""
    wanted = setting(config, "rank", name)
    if rank != wanted:
        raise refuse(
            "read_adapter",
            "adapter",
            got=f"factors of rank {rank} for {name}",
            needs=f"rank {wanted}, as adapter_config.json says",
            way_out="Name the model that the adapter was trained on with --base, or repair the config.",
        )
    alpha = setting(config, "alpha", name)
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def targeted(parameter: str, target_parameters: Iterable[str]) -> bool:
    """Whether PEFT's `target_parameters` names `parameter`, in full or by its end."""
    return any(_ends(parameter, target) for target in target_parameters)


def config_for(
    config: Mapping[str, Any],
    *,
    fused: bool,
    targets: list[Target],
    parameters: list[str],
    rest: list[str],
    leaves: set[str],
) -> tuple[dict[str, Any], list[str]]:
    """adapter_config.json for another format, and what its users have to know.

    Args:
        config: that of the format that was read.
        fused: the experts are parameters (PEFT) and not modules.
        targets: the adapted projections of the experts.
        parameters: every experts parameter of the model.
        rest: the adapted modules that are not experts.
        leaves: last names of the experts' modules in the other formats, such as "gate_proj".
    """
    named = config.get("target_modules") or []
    modules = [] if isinstance(named, str) else [n for n in named if any(_ends(m, n) for m in rest)]
    others = [t for t in config.get("target_parameters") or [] if not any(_ends(p, t) for p in parameters)]
    for module in rest:
        if not any(_ends(module, n) for n in modules) and not targeted(f"{module}.weight", others):
            modules.append(module.rpartition(".")[2])
    new = dict(config)
    if fused:
        # PEFT takes these names for the experts' own, wherever they stand in the model.
        clashing = [n for n in modules if n.rpartition(".")[2] in leaves]
        modules = [n for n in modules if n not in clashing]
        others += {f"{_after_layer(m)}.weight" for m in rest if any(_ends(m, n) for n in clashing)}
        new["target_parameters"] = sorted(set(others) | _short(targets, parameters))
    else:
        modules += {target.name.rpartition(".")[2] for target in targets}
        new["target_parameters"] = sorted(others) or None
    new["target_modules"] = sorted(set(modules))
    _set_patterns(new, targets, rest)
    return new, [] if fused else _scale_notes(new, targets)


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(?:.*\.)?(?:{pattern})$", name) is not None


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _after_layer(name: str) -> str:
    """`model.layers.3.mlp.experts.down_proj` -> `mlp.experts.down_proj`."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _short(targets: list[Target], parameters: list[str]) -> set[str]:
    """The targets by their ends where every layer is adapted, else in full."""
    adapted = {target.name for target in targets}
    return {
        end if all(p in adapted for p in parameters if _ends(p, end)) else name
        for name in adapted
        for end in [_after_layer(name)]
    }


def _set_patterns(config: dict[str, Any], targets: list[Target], rest: list[str]) -> None:
    """Ranks and alphas of `targets` in `config`, those of `rest` as they were."""
    alphas = {t: _alpha(config, t) for t in targets}
    if not rest and len({(t.rank, alphas[t]) for t in targets}) == 1:
        config |= {"r": targets[0].rank, "lora_alpha": alphas[targets[0]]}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        return
    for what, values in (("rank", {t: t.rank for t in targets}), ("alpha", alphas)):
        key, default = _SETTINGS[what]
        kept = {
            pattern: value
            for pattern, value in (config.get(key) or {}).items()
            if any(_matches(pattern, m) or _matches(pattern, f"{m}.weight") for m in rest)
        }
        by_end: dict[str, set[Any]] = {}
        for target, value in values.items():
            by_end.setdefault(_after_layer(target.pattern), set()).add(value)
        own: dict[str, Any] = {}
        for target, value in values.items():
            end = _after_layer(target.pattern)
            own[end if len(by_end[end]) == 1 else target.pattern] = value
        # The first pattern that matches counts; what the kept ones say already is not repeated.
        said = {key: kept, default: config[default]}
        if all(setting(said, what, t.name) == value for t, value in values.items()):  # type: ignore[arg-type]
            own = {}
        elif not kept:
            own = {pattern: value for pattern, value in own.items() if value != config[default]}
        config[key] = own | kept


def _alpha(config: Mapping[str, Any], target: Target) -> float:
    alpha = target.scale * (math.sqrt(target.rank) if config.get("use_rslora") else target.rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _scale_notes(config: Mapping[str, Any], targets: list[Target]) -> list[str]:
    """What goes wrong in readers that do not scale as PEFT's format says."""
    rank, notes = config["r"], []
    if config.get("use_rslora") and len({t.name.rpartition(".")[2] for t in targets}) > 1:
        # It doubles rank and alpha, which keeps alpha / r and not alpha / sqrt(r).
        notes.append(
            "use_rslora: PEFT 0.21 joins gate and up with a scale sqrt(2) too large; give it --to peft"
        )
    plain = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    odd = next((t for t in targets if not math.isclose(t.scale, plain, rel_tol=1e-9)), None)
    if odd is not None:
        own = f"{odd.name} is scaled by {odd.scale:g} through alpha_pattern"
        notes.append(f"{own}; servers that read only r and lora_alpha (vLLM) would scale it by {plain:g}")
    return notes
