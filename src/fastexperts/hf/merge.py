"""Merging an adapter into a checkpoint: W + scale * B A, key by key, in the files that the model has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.adapter_layouts import FACTOR, PREFIX
from fastexperts.hf.adapters import EMBEDDING, Adapter, rest_scale
from fastexperts.hf.checkpoint import Base, Checkpoint, same_bits, write_checkpoint
from fastexperts.weights import Lora

Update = Callable[[Tensor, torch.dtype], Tensor]
"""(what a key holds, the dtype to compute in) -> what it holds after the merge, in that dtype."""


def merge(base: Base, adapter: Adapter, source: Checkpoint, output: Path) -> None:
    """Write `source` with `adapter` merged into the existing folder `output`: same files, keys and dtypes.

    One file of the model is in memory at a time. Sums are in fp32 and rounded once. Raises FastexpertsError
    for a part of the adapter that has no place in the checkpoint, before anything is written.
    """
    updates = _updates(base, adapter, source)

    def make(key: str) -> Tensor:
        w = source.tensor(key)
        update = updates.get(key)
        if update is None:
            return w
        if not w.is_floating_point():
            raise refuse(
                "merge",
                "base",
                got=f"{key} in {str(w.dtype).removeprefix('torch.')}",
                needs="weights in floating point",
                way_out="Merge into the dequantised model.",
            )
        return update(w, torch.promote_types(w.dtype, torch.float32)).to(w.dtype)

    plan = {file: {key: partial(make, key) for key in keys} for file, keys in source.files.items()}
    write_checkpoint(source, output, plan)


def check_merged(base: Base, adapter: Adapter, source: Checkpoint, merged: Checkpoint) -> int:
    """Read `merged` back against sums in fp64; returns how many tensors the adapter changed.

    A changed tensor may differ from the rounded fp64 sum by a fiftieth of what the merge changed in it, one
    without an update not by a bit. Raises FastexpertsError that names the first that does not hold.
    """
    updates = _updates(base, adapter, source)
    changed = 0
    for key, file in source.file_of.items():
        if merged.file_of.get(key) != file:
            raise _wrong(key, f"in {merged.file_of.get(key)}", f"the tensor in {file}")
        w, got = source.tensor(key), merged.tensor(key)
        if key not in updates:
            if not same_bits(w, got):
                raise _wrong(key, "other bits", "the tensor unchanged")
            continue
        wanted = updates[key](w, torch.float64).to(w.dtype)
        effect = (wanted.double() - w.double()).norm()
        # Two roundings part at ties: rarely in 16 bits, often by one unit in fp32.
        slack = torch.finfo(w.dtype).eps * (2**-2 if w.dtype.itemsize >= 4 else 2**-6) * w.double().norm()
        error = (got.double() - wanted.double()).norm()
        if got.dtype != w.dtype or not error <= 0.02 * effect + slack:
            raise _wrong(key, f"an error of {error:.2e}", f"W + scale * B A, whose change is {effect:.2e}")
        changed += bool(effect > 0)
    return changed


def _wrong(key: str, got: str, needs: str) -> FastexpertsError:
    return refuse("merge", key, got=got, needs=needs, way_out="Please report it; nothing was kept.")


def _updates(base: Base, adapter: Adapter, source: Checkpoint) -> dict[str, Update]:
    """Key on disk -> what the merge does to it; every update of the adapter is in it whole, or it raises."""
    updates: dict[str, Update] = {}
    holders: dict[str, list[str]] = {}
    for key in source.file_of:
        slot = base.slots.get(key)
        if slot is not None:
            holders.setdefault(slot.parameter, []).append(key)
    for name, lora in adapter.experts.items():
        whole = len(holders.get(name, [])) == 1
        pieces = 1 if whole else sum(len(keys) for keys in base.parts.get(name, []))
        if len(holders.get(name, [])) != pieces or not pieces:
            raise _no_place(source, name, base.source)
        for key in holders[name]:
            slot = base.slots[key]
            updates[key] = partial(_add_experts, lora, slot.expert, slot.rows)
    for name, update in _rest_updates(base, adapter).items():
        if name in base.tied:
            raise refuse(
                "merge",
                "adapter",
                got=f"an update of {name}, which is one tensor with another weight",
                needs="updates of weights that stand alone: the other one would change with it",
                way_out="Untie the model's embeddings, or keep the adapter unmerged.",
            )
        if len(holders.get(name, [])) != 1:
            raise _no_place(source, name, base.source)
        updates[holders[name][0]] = update
    return updates


def _no_place(source: Checkpoint, name: str, base: str) -> FastexpertsError:
    return refuse(
        "merge",
        "base",
        got=f"{source.folder}, whose files do not hold {name}",
        needs="every weight that the adapter updates",
        way_out=f"Save {base} anew with transformers' save_pretrained.",
    )


def _add_experts(lora: Lora, expert: int | None, rows: slice | None, w: Tensor, dtype: torch.dtype) -> Tensor:
    w = w.to(dtype)
    if expert is not None and rows is not None:
        return w + lora.scale * (lora.b[expert, rows].to(dtype) @ lora.a[expert].to(dtype))
    return torch.stack([_add_experts(lora, e, slice(None), w_e, dtype) for e, w_e in enumerate(w)])


def _rest_updates(base: Base, adapter: Adapter) -> dict[str, Update]:
    """Parameter -> its update, of what is not experts."""
    updates: dict[str, Update] = {}
    replaced: dict[str, Tensor] = {}
    factors: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    for key, tensor in adapter.rest.items():
        match = FACTOR.match(key) or EMBEDDING.match(key)
        if match is None:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            replaced[base.slots[name].parameter if name in base.slots else name] = tensor
            continue
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
        if match.re is EMBEDDING:
            embeddings.add(match["module"])
    for module, pair in factors.items():
        weight = f"{module}.weight"
        name = base.slots[weight].parameter if weight in base.slots else weight
        shape = base.shapes.get(name)
        if len(pair) != 2 or shape is None or len(shape) != 2:
            raise refuse(
                "merge",
                "adapter",
                got=f"lora_{' and lora_'.join(sorted(pair))} for {weight} {list(shape or [])}",
                needs="lora_A and lora_B for a matrix",
                way_out="Merge this adapter with PEFT.",
            )
        a, b = pair["A"], pair["B"]
        delta = rest_scale(adapter, module, a.shape[0])
        updates[name] = partial(_add, a, b, delta, module in embeddings, replaced.pop(name, None))
    return updates | {name: partial(_replace, tensor) for name, tensor in replaced.items()}


def _add(
    a: Tensor, b: Tensor, scale: float, turned: bool, new: Tensor | None, w: Tensor, dtype: torch.dtype
) -> Tensor:
    update = scale * (b.to(dtype) @ a.to(dtype))
    return (w if new is None else new).to(dtype) + (update.T if turned else update)


def _replace(new: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
    return new.to(w.dtype).to(dtype)
