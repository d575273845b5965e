"""Checkpoints as they lie on disk: which part of which parameter a key holds, and files written anew.

Nothing here holds more of a model than one file of it, and nothing is written over what exists.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastexperts.errors import refuse
from fastexperts.hf.inventory import interface_modules

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Slot:
    """What a key on disk holds: a whole parameter, or `rows` of one `expert` of it."""

    parameter: str
    expert: int | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class Base:
    """The architecture that an adapter belongs to, without its weights."""

    source: str
    """Folder, or name on the hub."""
    config: Any
    shapes: dict[str, torch.Size]
    """Each parameter and buffer of the model, by its name there."""
    modules: frozenset[str]
    experts: dict[str, list[str]]
    """Experts module -> its 3-D parameters [E, out, in], in the order that PEFT wraps them: as declared."""
    slots: dict[str, Slot]
    """Key on disk -> what it holds; the names that `save_pretrained` writes."""
    tied: frozenset[str]
    """Parameters that are one tensor with another one."""

    @cached_property
    def parts(self) -> dict[str, list[list[str]]]:
        """Experts parameter -> part (gate, up, or the only one) -> the key on disk of each expert."""
        found: dict[str, dict[tuple[int, int], str]] = {}
        for key, slot in self.slots.items():
            if slot.expert is not None and slot.rows is not None:
                found.setdefault(slot.parameter, {})[slot.rows.start, slot.expert] = key
        return {
            name: [
                [keys[start, e] for e in range(self.shapes[name][0])]
                for start in sorted({start for start, _ in keys})
            ]
            for name, keys in found.items()
        }

    def check_per_expert(self, where: str) -> None:
        """Raise FastexpertsError for a family that keeps no matrix per expert on disk."""
        for parameters in self.experts.values():
            for name in parameters:
                if name not in self.parts:
                    raise refuse(
                        where,
                        "base",
                        got=f"{self.source} ({self.config.model_type}), which stores {name} in one piece",
                        needs="a family whose checkpoints have a matrix for each expert",
                        way_out="Use the adapter in PEFT's format, or merge it.",
                    )


def load_base(source: str | Path) -> Base:
    """Read the architecture of a checkpoint folder or hub name from its config.json alone.

    Raises FastexpertsError if there is no config, or no experts of transformers' interface in the model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(source))
        with torch.device("meta"):
            model = _empty(config)
    except (OSError, ValueError) as error:
        raise refuse(
            "load_base",
            "base",
            got=f"{source}: {str(error).splitlines()[0]}",
            needs="a folder or a hub name with the config.json of a transformers model",
            way_out="Name the model that the adapter was trained on with --base.",
        ) from error
    modules = interface_modules(model)
    experts = {
        module: [f"{module}.{name}" for name, p in child.named_parameters(recurse=False) if p.dim() == 3]
        for module, child in modules.items()
    }
    if not experts:
        raise refuse(
            "load_base",
            "base",
            got=f"{source} ({config.model_type}), without experts that transformers dispatches",
            needs="a mixture-of-experts model of transformers' experts interface",
            way_out="Use PEFT's own tools for other models.",
        )
    transposed = [name for name, module in modules.items() if module.is_transposed]
    if transposed:
        raise refuse(
            "load_base",
            "base",
            got=f"{source} ({config.model_type}), whose {transposed[0]} stores [E, in, out]",
            needs="experts stored [E, out, in]",
            way_out="Use the adapter in PEFT's format, with PEFT's own merge.",
        )
    state = model.state_dict()
    return Base(
        str(source),
        config,
        {name: tensor.shape for name, tensor in state.items()},
        frozenset(name for name, _ in model.named_modules()),
        experts,
        _slots(model, state, [name for names in experts.values() for name in names]),
        frozenset(name for pair in model.all_tied_weights_keys.items() for name in pair),
    )


def model_class(config: Any) -> Any:
    """The class that `config` was saved with, else the one that finds a causal language model."""
    import transformers

    return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)


def _empty(config: Any) -> Any:
    cls = model_class(config)
    return cls.from_config(config) if cls.__name__.startswith("Auto") else cls._from_config(config)


def _slots(model: Any, state: Mapping[str, Tensor], experts: list[str]) -> dict[str, Slot]:
    """Let transformers save row numbers in place of each experts parameter, and see which lie under a key."""
    from transformers.core_model_loading import revert_weight_conversion

    names = {id(tensor): name for name, tensor in state.items() if name not in experts}
    others = revert_weight_conversion(model, {name: state[name] for name in names.values()})
    slots = {key: Slot(names[id(tensor)]) for key, tensor in others.items() if id(tensor) in names}
    for name in experts:
        slots[name] = Slot(name)  # some families, and some exports, keep it in one piece
        count, out, _ = state[name].shape
        # two columns: transformers 5.17 drops a dim of 1
        probe = torch.arange(count * out, dtype=torch.int32).reshape(count, out, 1).repeat(1, 1, 2)
        for key, rows in revert_weight_conversion(model, {name: probe}).items():
            if rows.dim() != 2:
                continue
            first, length = int(rows[0, 0]), len(rows)
            if torch.equal(rows[:, 0], torch.arange(first, first + length, dtype=torch.int32)):
                slots[key] = Slot(name, first // out, slice(first % out, first % out + length))
    return slots


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder: reads one tensor at a time."""

    folder: Path
    files: dict[str, list[str]]
    """File -> its keys."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the index says beside its map."""

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Key -> its file."""
        return {key: file for file, keys in self.files.items() for key in keys}

    @cached_property
    def _open(self) -> dict[str, Any]:
        """File -> its open handle; what is read lies in memory only while it is used."""
        from safetensors import safe_open

        return {name: safe_open(self.folder / name, framework="pt") for name in self.files}

    def tensor(self, key: str) -> Tensor:
        """The tensor under `key`, on the CPU."""
        return self._open[self.file_of[key]].get_tensor(key)

    def part(self, key: str, expert: int, rows: slice) -> Tensor:
        """`rows` of one expert of the 3-D tensor under `key`; no more than these are read."""
        return self._open[self.file_of[key]].get_slice(key)[expert, rows]

    def shape(self, key: str) -> list[int]:
        """The shape of the tensor under `key`, which is not read."""
        return list(self._open[self.file_of[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of the tensor under `key`, of which a row is read at most."""
        part = self._open[self.file_of[key]].get_slice(key)
        return (part[:1] if part.get_shape() else self.tensor(key)).dtype


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint in `folder`; raises FastexpertsError unless it is complete and in safetensors files."""
    from safetensors import safe_open

    folder = Path(folder)
    index = folder / INDEX
    metadata: dict[str, Any] = {}
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        metadata = content.get("metadata", {})
        names = sorted(set(content["weight_map"].values()))
    else:
        names = [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise refuse(
            "open_checkpoint",
            "base",
            got=f"{folder}, without {missing[0]}",
            needs="a local folder with all of a model's safetensors files",
            way_out="Fetch a hub model with `hf download NAME --local-dir FOLDER`; save .bin files anew with "
            "transformers.",
        )
    files: dict[str, list[str]] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            files[name] = list(file.keys())
    return Checkpoint(folder, files, metadata)


def write_checkpoint(
    source: Checkpoint, output: Path, plan: Mapping[str, Mapping[str, Callable[[], Tensor]]]
) -> None:
    """Write `plan`, file -> key -> what makes its tensor, one file after the other.

    Whatever lies beside the weights of `source` (config, tokenizer, code) is copied.
    """
    from safetensors.torch import save_file

    size, weight_map = 0, {}
    for name, makers in plan.items():
        tensors = {key: make().contiguous() for key, make in makers.items()}
        save_file(tensors, output / name, metadata={"format": "pt"})
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map.update(dict.fromkeys(makers, name))
    if list(plan) != [SINGLE]:
        index = {"metadata": source.metadata | {"total_size": size}, "weight_map": weight_map}
        (output / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(source.folder.iterdir()):
        if (
            path.is_file()
            and path.suffix not in {".safetensors", ".bin", ".pt", ".pth"}
            and path.name != INDEX
        ):
            shutil.copy2(path, output / path.name)


@contextmanager
def new_folder(output: str | Path, where: str) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the block ends well and vanishes when it does not.

    An empty folder that is there, a mount point or one that a link leads to, stays and gets what was filled.
    Raises FastexpertsError if `output` exists and is not an empty folder.
    """
    output = Path(output).resolve()
    there = output.exists()
    if there and (not output.is_dir() or any(output.iterdir())):
        raise refuse(
            where,
            "output",
            got=f"{output}, which is {'not empty' if output.is_dir() else 'a file'}",
            needs="a new or empty folder",
            way_out="Choose another folder; nothing is overwritten.",
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = (output if there else output.parent) / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if there:
            for path in partial.iterdir():
                path.rename(output / path.name)
            partial.rmdir()
        else:
            partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def differing(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Iterator[str]:
    """The keys under which two sets of tensors are not bitwise the same, missing and unexpected ones too."""
    for key in sorted(wanted.keys() | got.keys()):
        if key not in wanted or key not in got or not same_bits(wanted[key], got[key]):
            yield key


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
