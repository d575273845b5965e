"""`export_to`, `import_from`: adapters and checkpoints in another layout, read back before they are kept."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.adapters import CONFIG, LAYOUTS, Adapter, differences, read_adapter, write_adapter
from fastexperts.hf.checkpoint import Base, Checkpoint, load_base, model_class, new_folder, open_checkpoint
from fastexperts.hf.merge import check_merged, merge
from fastexperts.hf.stacked import STACKINGS, stack, unstack

CHECKS = ("logits", "weights")
TARGETS = tuple(dict.fromkeys((*LAYOUTS[:2], "merged", *STACKINGS)))
LOGITS_LIMIT = 16 * 2**30
"""Bytes of a model in fp32 above which its logits are not compared."""


@dataclass(frozen=True)
class Exported:
    """What was written, how it was checked, and what its users have to know."""

    folder: Path
    checks: tuple[str, ...]
    notes: tuple[str, ...] = ()


def export_to(
    source: str | Path, to: str, output: str | Path, *, base: str | None = None, check: str = "logits"
) -> Exported:
    """Write the adapter in `source` in another layout, or merged; or a checkpoint in a stacked layout.

    Args:
        source: folder of an adapter in any layout, or of a checkpoint for "scattermoe", "qwen3-moe-fused".
        to: "peft", "per-expert", "merged", "scattermoe" or "qwen3-moe-fused".
        output: a new or empty folder; it appears when all checks have passed.
        base: folder (for "merged") or hub name of the adapter's model; default: what the adapter names.
        check: of "merged". "logits": reload it, and compare with base and adapter under stock PEFT, besides
            what "weights" does: every tensor against its sum in fp64, file by file.

    Adapters and stacks are read back and compared bit by bit. Raises FastexpertsError for what does not fit,
    what cannot be checked as asked, and for a check that fails, and then leaves no folder.
    """
    if to not in TARGETS:
        raise _unknown("export", "to", to, TARGETS)
    source = Path(source)
    if not (source / CONFIG).is_file() and to in STACKINGS:
        with new_folder(output, "export") as folder:
            count = stack(source, to, folder)
        return Exported(Path(output), (f"{count} stacks, bitwise the matrices they were made of",))
    if to == "scattermoe":
        raise refuse(
            "export",
            "source",
            got=f"{source}, an adapter",
            needs="a checkpoint: ScatterMoE has no layout for adapters",
            way_out="Merge the adapter first, with --to merged.",
        )
    architecture = load_base(_base_of(source, base))
    adapter = read_adapter(source, architecture)
    if to == "merged":
        return _export_merged(adapter, architecture, source, Path(output), check)
    with new_folder(output, "export") as folder:
        notes = write_adapter(adapter, architecture, to, folder)
        again = read_adapter(folder, architecture)
        different = differences(adapter, again)
        if different or (adapter.experts and again.layout != to):
            raise refuse(
                "export",
                "output",
                got=f"{(different or [again.layout])[0]} unlike what was read",
                needs="the same factors",
                way_out="Please report it; nothing was kept.",
            )
    count = len(adapter.experts)
    return Exported(Path(output), (f"{count} experts parameters, read back bitwise",), notes)


def import_from(source: str | Path, layout: str, output: str | Path, *, base: str | None = None) -> Exported:
    """Write a checkpoint or adapter of a stacked layout in transformers' or PEFT's own.

    Args:
        source: folder of the checkpoint or adapter.
        layout: "scattermoe" (checkpoints) or "qwen3-moe-fused".
        output: a new or empty folder.
        base: of an adapter: its model's folder or hub name; default: what the adapter names.

    Read back bit by bit, as `export_to` does; the same errors.
    """
    if layout not in STACKINGS:
        raise _unknown("import", "from", layout, tuple(STACKINGS))
    source = Path(source)
    if not (source / CONFIG).is_file():
        with new_folder(output, "import") as folder:
            count = unstack(source, layout, folder)
        return Exported(Path(output), (f"{count} stacks parted, bitwise what they were",))
    adapter = read_adapter(source, load_base(_base_of(source, base)))
    if adapter.layout != layout:
        raise refuse(
            "import",
            "source",
            got=f"{source}, an adapter in the layout {adapter.layout}",
            needs=f"an adapter in the layout {layout}",
            way_out="Use `fastexperts export` for it.",
        )
    return export_to(source, "peft", output, base=base)


def _base_of(source: Path, base: str | None) -> str:
    if base is not None:
        return base
    if (source / CONFIG).is_file():
        named = json.loads((source / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if named:
            return str(named)
    raise refuse(
        "export",
        "base",
        got=f"none, and {source / CONFIG} names none",
        needs="the model that the adapter was trained on",
        way_out="Pass --base with its folder or hub name.",
    )


def _export_merged(adapter: Adapter, base: Base, source: Path, output: Path, check: str) -> Exported:
    if check not in CHECKS:
        raise _unknown("export", "check", check, CHECKS)
    if check == "logits" and find_spec("peft") is None:
        raise refuse(
            "export",
            "check",
            got="'logits', but peft is not installed",
            needs="peft: what it computes is what the merged model is compared with",
            way_out="Install it with `pip install 'fastexperts[peft]'`, or pass --check weights.",
        )
    checkpoint = open_checkpoint(base.source)
    size = 4 * sum(shape.numel() for shape in base.shapes.values())
    if check == "logits" and size > LOGITS_LIMIT:
        raise refuse(
            "export",
            "check",
            got=f"'logits' for a model of {size / 2**30:.0f} GiB in fp32",
            needs=f"at most {LOGITS_LIMIT / 2**30:.0f} GiB, since it runs on the CPU",
            way_out="Pass --check weights: every tensor is read back against its sum in fp64.",
        )
    with new_folder(output, "export") as folder:
        merge(base, adapter, checkpoint, folder)
        changed = check_merged(base, adapter, checkpoint, open_checkpoint(folder))
        checks = [f"{changed} tensors changed, each within rounding of its sum in fp64; the others bitwise"]
        if check == "logits":
            checks.append(_check_logits(adapter, base, checkpoint, source, folder))
    return Exported(output, tuple(checks))


def _check_logits(adapter: Adapter, base: Base, checkpoint: Checkpoint, source: Path, merged: Path) -> str:
    """Compare the merged model with its base and adapter under stock PEFT, in fp32; returns what was seen."""
    low = any(dtype.itemsize < 4 for dtype in _dtypes(base, checkpoint).values())
    with tempfile.TemporaryDirectory() as scratch:
        if adapter.layout != "peft":
            source = Path(scratch)
            write_adapter(adapter, base, "peft", source)
        wanted = _reference_logits(base, checkpoint, source, low)
    got = _logits(_load(base, merged))
    error = ((got - wanted).norm() / wanted.norm()).item()
    # In 16 bits the reference is rounded as the files are; few ties part the two.
    limit = 1e-3 if low else 1e-5
    if not error <= limit:
        raise refuse(
            "export",
            "output",
            got=f"logits {error:.1e} off those of base and adapter",
            needs=f"at most {limit:.0e}, relative",
            way_out="Please report it; nothing was kept.",
        )
    return f"logits within {error:.1e} of base and adapter under stock PEFT"


def _reference_logits(base: Base, checkpoint: Checkpoint, adapter: Path, low: bool) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(base, Path(base.source)), adapter)
    if not low:
        return _logits(model)
    plain = model.merge_and_unload()
    dtypes = _dtypes(base, checkpoint)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in dtypes:
                parameter.copy_(parameter.to(dtypes[name]))
    return _logits(plain)


def _dtypes(base: Base, checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """Parameter -> its dtype on disk."""
    return {
        base.slots[key].parameter: checkpoint.dtype(key) for key in checkpoint.file_of if key in base.slots
    }


def _load(base: Base, folder: Path) -> Any:
    return model_class(base.config).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 32), generator=generator)
    output = model.eval()(input_ids=ids)
    return output[0].double()


def _unknown(where: str, argument: str, got: object, known: tuple[str, ...]) -> FastexpertsError:
    return refuse(where, argument, got=repr(got), needs=f"one of {', '.join(known)}", way_out="Choose one.")
