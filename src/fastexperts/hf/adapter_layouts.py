"""The three ways in which an adapter's experts are written: taken out of saved tensors, and put into them.

    peft             `...experts.base_layer.lora_A.weight` [E*r, in] by expert, `lora_B.weight` [out, r*E] by
                     rank
    per-expert       `...experts.3.gate_proj.lora_A.weight` [r, in], `lora_B.weight` [out, r]: vLLM, SGLang,
                     PEFT before transformers 5
    qwen3-moe-fused  `...mlp.gate_proj.lora_A.weight` [E, r, in], `lora_B.weight` [E, out, r]

PEFT nests one wrapper per parameter, inner first as the experts module declares them, whatever the order of
`target_parameters`; the keys name the nesting and not the parameter. PEFT's gate and up share one A. Formats
that part them repeat it, and where they were trained apart, PEFT's has both ranks side by side:
A = [A_gate; A_up], B = diag(B_gate, B_up).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.adapter_config import Target, scale_of, targeted
from fastexperts.hf.checkpoint import Base
from fastexperts.weights import Lora

PREFIX = "base_model.model."
FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Pair(NamedTuple):
    """The factors of a projection of every expert: a [E, r, in], b [E, out, r]."""

    a: Tensor
    b: Tensor


def read_peft(tensors: dict[str, Tensor], base: Base, config: dict[str, Any]) -> dict[str, Lora]:
    """Take the experts' wrappers out of `tensors`."""
    wrappers: dict[str, dict[int, dict[str, Tensor]]] = {}
    for key in list(tensors):
        match = FACTOR.match(key)
        if match is None:
            continue
        module, depth = match["module"], 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        if module in base.experts:
            wrappers.setdefault(module, {}).setdefault(depth, {})[match["factor"]] = tensors.pop(key)
    loras: dict[str, Lora] = {}
    for module, by_depth in wrappers.items():
        factors = {
            depth: _both(f"{PREFIX}{module}{'.base_layer' * depth}", by_depth[depth]) for depth in by_depth
        }
        for depth, parameter in _assign(module, factors, base, config).items():
            a, b = factors[depth]
            experts = base.shapes[parameter][0]
            rank = a.shape[0] // experts
            pair = (
                a.reshape(experts, rank, a.shape[1]),
                b.reshape(b.shape[0], rank, experts).permute(2, 0, 1).contiguous(),
            )
            loras[parameter] = Lora(*pair, scale_of(config, parameter, rank))
    return loras


def _assign(
    module: str, factors: Mapping[int, tuple[Tensor, Tensor]], base: Base, config: dict[str, Any]
) -> dict[int, str]:
    """Depth of a wrapper -> the parameter it adapts: as PEFT nests, if the shapes agree, else by shape."""
    declared = base.experts[module]
    targets = config.get("target_parameters") or []
    parameters = [name for name in declared if targeted(name, targets)] or declared
    depths = sorted(factors, reverse=True)
    nested = dict(zip(depths, parameters, strict=False))
    fits = {depth: [p for p in parameters if _fits(factors[depth], base.shapes[p])] for depth in depths}
    if len(depths) == len(parameters) and all(nested[depth] in fits[depth] for depth in depths):
        return nested
    chosen = {depth: fits[depth][0] for depth in depths if len(fits[depth]) == 1}
    if len(depths) == len(parameters) and len(set(chosen.values())) == len(depths):
        return chosen
    shapes = {f"{PREFIX}{module}{'.base_layer' * d}": [list(f.shape) for f in factors[d]] for d in depths}
    raise refuse(
        "read_adapter",
        "adapter",
        got=f"lora_A and lora_B {shapes}",
        needs="[E*r, in] and [out, r*E] for each of "
        + ", ".join(f"{name} [E, out, in] {list(base.shapes[name])}" for name in parameters),
        way_out="Name the model that the adapter was trained on with --base.",
    )


def _fits(factors: tuple[Tensor, Tensor], shape: torch.Size) -> bool:
    a, b = factors
    experts, out, width = shape
    return (
        a.dim() == b.dim() == 2
        and a.shape[0] > 0
        and a.shape[0] % experts == 0
        and b.shape[1] == a.shape[0]
        and (b.shape[0], a.shape[1]) == (out, width)
    )


def read_per_expert(tensors: dict[str, Tensor], base: Base, config: dict[str, Any]) -> dict[str, Lora]:
    """Take the experts' matrices out of `tensors`."""

    def stack(keys: list[str], factor: str) -> Tensor | None:
        names = [_adapter_key(key.removesuffix(".weight"), factor) for key in keys]
        present = [name for name in names if name in tensors]
        if not present:
            return None
        if len(present) < len(names):
            raise missing(next(name for name in names if name not in tensors), present[0])
        matrices = [tensors.pop(name) for name in names]
        odd = next(
            (name for name, m in zip(names, matrices, strict=True) if m.shape != matrices[0].shape), None
        )
        if odd is not None:
            raise misfit(odd, matrices[names.index(odd)], f"{list(matrices[0].shape)}, as {names[0]} has")
        return torch.stack(matrices)

    return _read_parts(base, config, lambda keys: (stack(keys, "A"), stack(keys, "B")), per_expert_name)


def read_stacked(tensors: dict[str, Tensor], base: Base, config: dict[str, Any]) -> dict[str, Lora]:
    """Take qwen3-moe-fused's stacks out of `tensors`."""

    def take(keys: list[str], factor: str) -> Tensor | None:
        name = _adapter_key(_stacked_name(keys), factor)
        tensor = tensors.get(name)
        # The same name without the experts' dim is a dense layer's.
        return tensors.pop(name) if tensor is not None and tensor.dim() == 3 else None

    return _read_parts(base, config, lambda keys: (take(keys, "A"), take(keys, "B")), _stacked_name)


def _read_parts(
    base: Base,
    config: dict[str, Any],
    take: Callable[[list[str]], tuple[Tensor | None, Tensor | None]],
    name_of: Callable[[list[str]], str],
) -> dict[str, Lora]:
    """The updates of a format that parts gate and up; `take` gives a part's stacked factors."""
    pairs: dict[str, list[Pair]] = {}
    scales: dict[str, float] = {}
    for parameter, parts in base.parts.items():
        taken = [take(keys) for keys in parts]
        if all(a is None and b is None for a, b in taken):
            continue
        experts, out, width = base.shapes[parameter]
        for (a, b), keys in zip(taken, parts, strict=True):
            name = name_of(keys)
            if a is None or b is None:
                raise missing(
                    f"{PREFIX}{name}.lora_{'A' if a is None else 'B'}.weight", f"the rest of {parameter}"
                )
            rank = a.shape[1]
            if a.shape != (experts, rank, width):
                raise misfit(f"{name}.lora_A", a, f"[experts, rank, in] {[experts, 'r', width]}")
            if b.shape != (experts, out // len(parts), rank):
                raise misfit(
                    f"{name}.lora_B", b, f"[experts, out, rank] {[experts, out // len(parts), rank]}"
                )
            scale = scale_of(config, name, rank)
            done = pairs.setdefault(parameter, [])
            if scales.setdefault(parameter, scale) != scale or (done and rank != done[0].a.shape[1]):
                raise misfit(
                    f"{name}.lora_A", a, f"the rank and scale of {name_of(parts[0])}, its other half"
                )
            done.append(Pair(a, b))
    shared = all(torch.equal(part.a, parts[0].a) for parts in pairs.values() for part in parts)
    return {name: Lora(*_join(parts, shared), scales[name]) for name, parts in pairs.items()}


def _join(parts: list[Pair], shared: bool) -> Pair:
    """One update of gate and up together; `shared`: their A are the same."""
    if len(parts) == 1:
        return parts[0]
    if shared:
        return Pair(parts[0].a, torch.cat([part.b for part in parts], dim=1))
    gate, up = parts
    b = torch.cat(
        [
            torch.cat([gate.b, torch.zeros_like(gate.b)], dim=2),
            torch.cat([torch.zeros_like(up.b), up.b], dim=2),
        ],
        dim=1,
    )
    return Pair(torch.cat([gate.a, up.a], dim=1), b)


def _part(lora: Lora, count: int, apart: bool) -> list[Pair]:
    """Gate and up of an update; `apart`: each has ranks of its own."""
    rows = lora.b.chunk(count, dim=1)
    if count == 1 or not apart:
        return [Pair(lora.a, b) for b in rows]
    half = lora.a.shape[1] // 2
    return [
        Pair(lora.a[:, :half], rows[0][..., :half]),
        Pair(lora.a[:, half:], rows[1][..., half:]),
    ]


def _apart(loras: list[Lora]) -> bool:
    """Whether every B is diag(B_gate, B_up), as adapters trained apart have it; zeros alone say nothing."""
    halves = False
    for lora in loras:
        rank = lora.a.shape[1]
        gate, up = lora.b.chunk(2, dim=1)
        if rank % 2 or gate[..., rank // 2 :].any() or up[..., : rank // 2].any():
            return False
        halves |= bool(gate.any() and up.any())
    return halves


Written = tuple[dict[str, Tensor], list[Target], tuple[str, ...]]


def write_peft(experts: Mapping[str, Lora], base: Base) -> Written:
    tensors: dict[str, Tensor] = {}
    targets: list[Target] = []
    joined: int | None = None
    for module, declared in base.experts.items():
        adapted = [name for name in declared if name in experts]
        for place, name in enumerate(adapted):
            lora = experts[name]
            key = f"{PREFIX}{module}{'.base_layer' * (len(adapted) - 1 - place)}"
            tensors[f"{key}.lora_A.weight"] = lora.a.flatten(0, 1)
            tensors[f"{key}.lora_B.weight"] = lora.b.permute(1, 2, 0).flatten(1, 2)
            targets.append(Target(name, name, lora.a.shape[1], lora.scale))
            if len(base.parts[name]) == 2 and _apart([lora]):
                joined = lora.a.shape[1]
    if joined is None:
        return tensors, targets, ()
    return tensors, targets, (f"gate and up have an A each: joined at rank {joined}, twice theirs",)


def write_parts(experts: Mapping[str, Lora], base: Base, layout: str) -> Written:
    tensors: dict[str, Tensor] = {}
    targets: list[Target] = []
    paired = [lora for name, lora in experts.items() if len(base.parts[name]) == 2]
    apart = _apart(paired)
    for parameter, lora in experts.items():
        parts = base.parts[parameter]
        for keys, (a, b) in zip(parts, _part(lora, len(parts), apart), strict=True):
            if layout == "per-expert":
                for e, key in enumerate(keys):
                    module = key.removesuffix(".weight")
                    # A of gate and up is written twice: safetensors refuses memory that is shared.
                    tensors[_adapter_key(module, "A")], tensors[_adapter_key(module, "B")] = (
                        a[e].clone(),
                        b[e].clone(),
                    )
                name = per_expert_name(keys)
                pattern = name.replace(".experts.0.", r".experts.\d+.")
            else:
                name = _stacked_name(keys)
                tensors[_adapter_key(name, "A")], tensors[_adapter_key(name, "B")] = a.clone(), b.clone()
                pattern = name
            targets.append(Target(name, pattern, a.shape[1], lora.scale))
    if layout != "per-expert" or not paired or len(paired) < len(experts):
        return tensors, targets, ()
    return tensors, targets, ("without down, PEFT 0.21 reads gate and up as zeros; give it --to peft",)


def per_expert_name(keys: list[str]) -> str:
    return keys[0].removesuffix(".weight")


def _stacked_name(keys: list[str]) -> str:
    """`model.layers.0.mlp.experts.0.gate_proj.weight` -> `model.layers.0.mlp.gate_proj`."""
    return keys[0].removesuffix(".weight").replace(".experts.0.", ".")


def _adapter_key(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.lora_{factor}.weight"


def missing(key: str, beside: str) -> FastexpertsError:
    return refuse(
        "read_adapter",
        "adapter",
        got=f"no {key}, but {beside}",
        needs="both factors, of every expert, of gate and up alike",
        way_out="Save the adapter again: a part of it is missing.",
    )


def misfit(key: str, tensor: Tensor, needs: str) -> FastexpertsError:
    return refuse(
        "read_adapter",
        "adapter",
        got=f"{key} {list(tensor.shape)}",
        needs=needs,
        way_out="Name the model that the adapter was trained on with --base.",
    )


def _both(key: str, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for factor in "AB":
        if factor not in factors:
            raise missing(f"{key}.lora_{factor}.weight", f"{key}.lora_{'BA'['AB'.index(factor)]}.weight")
    return factors["A"], factors["B"]
