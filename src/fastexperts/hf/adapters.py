"""LoRA adapters in files: read, whatever layout their experts have, and written in another one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastexperts.errors import refuse
from fastexperts.hf.adapter_config import config_for, scale_of
from fastexperts.hf.adapter_layouts import (
    FACTOR,
    PREFIX,
    misfit,
    per_expert_name,
    read_peft,
    read_per_expert,
    read_stacked,
    write_parts,
    write_peft,
)
from fastexperts.hf.checkpoint import Base, differing
from fastexperts.weights import Lora

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYOUTS = ("peft", "per-expert", "qwen3-moe-fused")

EMBEDDING = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<factor>[AB])$")
_SETTINGS = frozenset((
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping",
    "inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "bias", "lora_dropout", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size",
))  # fmt: skip
"""Settings of a plain LoRA; any other that is on, of PEFT today or tomorrow, means another function."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Of `init_lora_weights`: PiSSA, OLoRA, CorDA and others change the base's weights too."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, whatever it was read from."""

    config: dict[str, Any]
    """adapter_config.json, as it was read."""
    experts: dict[str, Lora]
    """Experts parameter -> its update; `b`'s rows in the order of the parameter's, gate then up."""
    rest: dict[str, Tensor]
    """Everything else, under the keys it was saved with."""
    layout: str
    """One of LAYOUTS."""


def read_adapter(folder: str | Path, base: Base) -> Adapter:
    """Read the adapter in `folder`, in any of LAYOUTS, for the architecture `base`.

    Every key finds its place or raises: FastexpertsError names a key that the model has no place for, a
    missing one, a shape or rank that does not fit, and settings that are not plain LoRA's (DoRA, PiSSA, ...).
    """
    config, tensors = _load(Path(folder))
    readers: dict[str, Callable[[dict[str, Tensor], Base, dict[str, Any]], dict[str, Lora]]] = {
        "peft": read_peft,
        "per-expert": read_per_expert,
        "qwen3-moe-fused": read_stacked,
    }
    rest = dict(tensors)
    found: dict[str, dict[str, Lora]] = {}
    for name, reader in readers.items():
        taken = reader(rest, base, config)
        if taken:
            found[name] = taken
    if len(found) > 1:
        raise refuse(
            "read_adapter",
            "adapter",
            got=f"{folder}, with experts in the layouts {' and '.join(found)}",
            needs="one layout",
            way_out="Export each half by itself.",
        )
    for key, tensor in rest.items():
        _check_known(key, tensor, base)
    name, experts = next(iter(found.items()), ("peft", {}))
    return Adapter(config, experts, rest, name)


def write_adapter(adapter: Adapter, base: Base, layout: str, folder: Path) -> tuple[str, ...]:
    """Write `adapter` in one of LAYOUTS into the existing `folder`; returns what its users have to know."""
    from safetensors.torch import save_file

    if layout == "peft":
        tensors, targets, notes = write_peft(adapter.experts, base)
    else:
        base.check_per_expert("write_adapter")
        tensors, targets, notes = write_parts(adapter.experts, base, layout)
    overlap = tensors.keys() & adapter.rest.keys()
    assert not overlap, overlap
    config, more = config_for(
        adapter.config,
        fused=layout == "peft",
        targets=targets,
        parameters=[name for names in base.experts.values() for name in names],
        rest=_rest_modules(adapter.rest),
        leaves={per_expert_name(part).rpartition(".")[2] for parts in base.parts.values() for part in parts},
    )
    tensors |= adapter.rest
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return (*notes, *more)


def differences(wanted: Adapter, got: Adapter) -> list[str]:
    """The names of factors and keys that are not bitwise the same, and of updates whose scale differs."""

    def flat(adapter: Adapter) -> dict[str, Tensor]:
        tensors = dict(adapter.rest)
        for name, lora in adapter.experts.items():
            tensors |= {f"{name} lora_A": lora.a, f"{name} lora_B": lora.b}
        return tensors

    different = list(differing(flat(wanted), flat(got)))
    return different + [
        f"{name} scale"
        for name in wanted.experts.keys() & got.experts.keys()
        if not math.isclose(wanted.experts[name].scale, got.experts[name].scale, rel_tol=1e-12)
    ]


def rest_scale(adapter: Adapter, module: str, rank: int) -> float:
    """The scale of the update of `module`, which is not an experts parameter."""
    return scale_of(adapter.config, module, rank)


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise refuse(
                "read_adapter",
                "adapter",
                got=f"{folder}, without {name}",
                needs=f"a local folder with {CONFIG} and {WEIGHTS}",
                way_out="Save an adapter_model.bin anew with PEFT; fetch a hub name with `hf download`.",
            )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    odd = [name for name, value in config.items() if value and name not in _SETTINGS]
    if config.get("init_lora_weights", True) not in _STARTS:
        odd.append("init_lora_weights")
    if config.get("peft_type") != "LORA":
        odd.append("peft_type")
    if odd:
        way_out = "Use PEFT's own tools for this adapter."
        if "init_lora_weights" in odd:
            way_out = "Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        raise refuse(
            "read_adapter",
            "adapter",
            got=f"{folder} with {odd[0]}={config.get(odd[0])}",
            needs="plain LoRA",
            way_out=way_out,
        )
    return config, load_file(folder / WEIGHTS)


def _rest_modules(rest: Mapping[str, Tensor]) -> list[str]:
    """The modules with an update among `rest`."""
    matches = [FACTOR.match(key) or EMBEDDING.match(key) for key in rest]
    return sorted({match["module"] for match in matches if match is not None})


def _check_known(key: str, tensor: Tensor, base: Base) -> None:
    """Raise for a key that no module of the model, on disk or in memory, explains."""
    match = FACTOR.match(key) or EMBEDDING.match(key)
    if match is None:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if key.startswith(PREFIX) and (name in base.shapes or name in base.slots):
            return
    elif match["module"] in base.modules or f"{match['module']}.weight" in base.slots:
        weight = f"{match['module']}.weight"
        shape = base.shapes.get(base.slots[weight].parameter if weight in base.slots else weight)
        factor, plain = match["factor"], match.re is FACTOR
        if shape is None or len(shape) != 2 or not plain:
            return
        if tensor.dim() == 2 and tensor.shape[1 if factor == "A" else 0] == shape[1 if factor == "A" else 0]:
            return
        raise misfit(key, tensor, f"{'[rank, in]' if factor == 'A' else '[out, rank]'} for {list(shape)}")
    raise refuse(
        "read_adapter",
        "adapter",
        got=f"the key {key} {list(tensor.shape)}, for which {base.source} has no place",
        needs="keys of the model that the adapter was trained on",
        way_out="Name that model with --base; nothing of an adapter is left out.",
    )
