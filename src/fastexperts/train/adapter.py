"""Adapters in a training run: what the recipe asks for, and the proof that a saved one is the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastexperts.errors import refuse
from fastexperts.hf.checkpoint import differing
from fastexperts.hf.lora import LoraSummary, lora_config, lora_summary
from fastexperts.train.recipe import LoraSettings

WEIGHTS = "adapter_model.safetensors"


def adapter_of(settings: LoraSettings, model: Any) -> tuple[Any, LoraSummary]:
    """The `peft.LoraConfig` of a recipe for this model, and what it trains."""
    asked = settings.model_dump(exclude={"check_gradients"})
    return lora_config(model, **asked, verbose=False), lora_summary(model, **asked)


def check_saved(model: Any, folder: str | Path) -> int:
    """Read the adapter in `folder` back and compare it with the one in `model`, bit by bit.

    Returns how many tensors were compared. Raises FastexpertsError if one differs, is missing or unexpected,
    or if a trainable parameter of the model is in no file.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise refuse(
            "adapter",
            str(path),
            got="no such file",
            needs="the adapter that was saved",
            way_out="Save it with `save_pretrained` and safetensors.",
        )
    wanted = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    kept = {tensor.data_ptr() for tensor in wanted.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in kept]
    got = load_file(path)
    wrong = [*lost, *differing({key: tensor.detach().cpu() for key, tensor in wanted.items()}, got)]
    if wrong:
        raise refuse(
            "adapter",
            str(path),
            got=f"{len(wrong)} tensors that are not the model's, first {wrong[0]}",
            needs=f"the {len(wanted)} tensors of the adapter in memory, bit by bit",
            way_out="Use another checkpoint, with the model, PEFT and transformers that wrote it.",
        )
    return len(wanted)
