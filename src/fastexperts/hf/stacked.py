"""Checkpoints with stacked experts, as people made them before transformers 5, to its own layout and back.

scattermoe       Mixtral as ScatterMoE's examples/convert.py writes it: `block_sparse_moe.moe_mlp.experts`
                 [E, 2F, D] with up (w3) before gate (w1), `moe_mlp.output_experts` [E, D, F]
qwen3-moe-fused  Qwen3-MoE as woct0rdho/transformers-qwen3-moe-fused writes it: `mlp.gate_proj` and
                 `mlp.up_proj` [E, F, D], `mlp.down_proj` [E, D, F]
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.checkpoint import (
    Base,
    Checkpoint,
    load_base,
    open_checkpoint,
    same_bits,
    write_checkpoint,
)


@dataclass(frozen=True)
class Stacking:
    """How a layout stacks the experts of a block."""

    model_type: str
    stacks: dict[str, tuple[str, ...]]
    """Stack -> the projections whose rows it has, in order."""
    architecture: tuple[str, str]
    """Prefix of the model's class, in transformers and in the layout."""


STACKINGS = {
    "scattermoe": Stacking(
        "mixtral",
        {"moe_mlp.experts": ("w3", "w1"), "moe_mlp.output_experts": ("w2",)},
        ("Mixtral", "Mixtral"),
    ),
    "qwen3-moe-fused": Stacking(
        "qwen3_moe",
        {name: (name,) for name in ("gate_proj", "up_proj", "down_proj")},
        ("Qwen3Moe", "Qwen3MoeFused"),
    ),
}


def unstack(folder: str | Path, layout: str, output: Path) -> int:
    """Write the stacked checkpoint in `folder` with a matrix per expert into the existing folder `output`.

    Same files, one in memory at a time; returns how many stacks were parted. Read back: the stacks made of
    what was written are bitwise those of `folder`. Raises FastexpertsError for a key without a place.
    """
    source, stacks = _open(folder, layout)
    base = stacks.base
    missing = [key for key in stacks.table if key not in source.file_of]
    if missing:
        raise _not_stacked(folder, layout, f"without {missing[0]}")
    plan: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for file, keys in source.files.items():
        makers = plan.setdefault(file, {})
        for key in keys:
            if key in stacks.table:
                shape = source.shape(key)
                if shape != stacks.shape(key):
                    raise _not_stacked(folder, layout, f"with {key} {shape}, not {stacks.shape(key)}")
                for expert, rows, name in stacks.pieces(key):
                    makers[name] = partial(source.part, key, expert, rows)
            elif key in base.slots:
                makers[key] = partial(source.tensor, key)
            else:
                raise _not_stacked(
                    folder, layout, f"with {key}, for which {base.config.model_type} has no place"
                )
    write_checkpoint(source, output, plan)
    _rename(output, *reversed(STACKINGS[layout].architecture))
    _check(open_checkpoint(output), source, stacks)
    return len(stacks.table)


def stack(folder: str | Path, layout: str, output: Path) -> int:
    """Write the checkpoint in `folder`, with a matrix per expert, in a stacked `layout` into `output`.

    A stack lies in the file that had its first matrix; otherwise as `unstack`.
    """
    source, stacks = _open(folder, layout)
    owner = {name: key for key in stacks.table for _, _, name in stacks.pieces(key)}
    missing = [name for name in owner if name not in source.file_of]
    if missing:
        raise refuse(
            "export",
            "source",
            got=f"{folder}, without {missing[0]}",
            needs="a checkpoint as transformers' save_pretrained writes it, with a matrix per expert",
            way_out="Load it and save it again with transformers.",
        )
    plan: dict[str, dict[str, Callable[[], Tensor]]] = {}
    written: set[str] = set()
    for file, keys in source.files.items():
        for name in keys:
            key = owner.get(name)
            if key is None:
                plan.setdefault(file, {})[name] = partial(source.tensor, name)
            elif key not in written:
                written.add(key)
                plan.setdefault(file, {})[key] = partial(_stacked, source, stacks, key)
    write_checkpoint(source, output, plan)
    _rename(output, *STACKINGS[layout].architecture)
    _check(source, open_checkpoint(output), stacks)
    return len(stacks.table)


@dataclass(frozen=True)
class _Stacks:
    """A layout applied to a model."""

    base: Base
    table: dict[str, list[list[str]]]
    """Key of a stack -> part -> the key of each expert in transformers' layout."""
    shapes: dict[str, list[int]]

    def shape(self, key: str) -> list[int]:
        return self.shapes[key]

    def pieces(self, key: str) -> list[tuple[int, slice, str]]:
        """(expert, rows of the stack, key in transformers' layout)."""
        parts = self.table[key]
        half = self.shapes[key][1] // len(parts)
        return [
            (e, slice(i * half, (i + 1) * half), name)
            for e in range(self.shapes[key][0])
            for i, name in enumerate(part[e] for part in parts)
        ]


def _open(folder: str | Path, layout: str) -> tuple[Checkpoint, _Stacks]:
    stacking = STACKINGS[layout]
    source, base = open_checkpoint(folder), load_base(folder)
    if base.config.model_type != stacking.model_type:
        raise _not_stacked(folder, layout, f"of type {base.config.model_type}, not {stacking.model_type}")
    table: dict[str, list[list[str]]] = {}
    shapes: dict[str, list[int]] = {}
    for parameter, parts in base.parts.items():
        experts, out, width = base.shapes[parameter]
        by_name = {part[0].removesuffix(".weight").rpartition(".")[2]: part for part in parts}
        block = parts[0][0].partition(".experts.0.")[0]
        for name, projections in stacking.stacks.items():
            if projections[0] in by_name:
                key = f"{block}.{name}.weight"
                table[key] = [by_name[projection] for projection in projections]
                shapes[key] = [experts, out // len(parts) * len(projections), width]
    return source, _Stacks(base, table, shapes)


def _stacked(source: Checkpoint, stacks: _Stacks, key: str) -> Tensor:
    """The stack `key`, of the matrices in `source`."""
    parts = stacks.table[key]
    return torch.stack([torch.cat([source.tensor(part[e]) for part in parts]) for e in range(len(parts[0]))])


def _check(per_expert: Checkpoint, stacked: Checkpoint, stacks: _Stacks) -> None:
    """Raise unless two folders hold the same model, bit by bit."""
    pieces = {name for key in stacks.table for _, _, name in stacks.pieces(key)}
    if per_expert.file_of.keys() - pieces != stacked.file_of.keys() - stacks.table.keys():
        raise _unlike("the keys")
    for key in stacked.file_of:
        other = _stacked(per_expert, stacks, key) if key in stacks.table else per_expert.tensor(key)
        if not same_bits(stacked.tensor(key), other):
            raise _unlike(key)


def _unlike(key: str) -> FastexpertsError:
    return refuse(
        "export", key, got="other bits", needs="what was read", way_out="Please report it; nothing was kept."
    )


def _not_stacked(folder: str | Path, layout: str, what: str) -> FastexpertsError:
    return refuse(
        "import",
        "source",
        got=f"{folder}, {what}",
        needs=f"a {STACKINGS[layout].model_type} checkpoint in the layout {layout}",
        way_out="Layouts: " + ", ".join(STACKINGS) + ".",
    )


def _rename(folder: Path, old: str, new: str) -> None:
    """The class name in config.json."""
    if old == new:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [
        name if name.startswith(new) and new.startswith(old) else name.replace(old, new, 1)
        for name in config.get("architectures") or []
    ]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
