"""A tiny base and a stock PEFT adapter of it, in folders, with the logits that stock PEFT gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support_hf import tiny_model, tokens
from torch import Tensor

from fastexperts.hf.adapters import CONFIG, Adapter, read_adapter, write_adapter
from fastexperts.hf.checkpoint import load_base

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Trained:
    """`base` and `adapter` of a family, saved under `folder`; `lora` goes to LoraConfig."""

    notes: tuple[str, ...]

    def __init__(
        self,
        folder: Path,
        family: str = "qwen3_moe",
        r: int = 3,
        overrides: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **lora: Any,
    ) -> None:
        self.family, self.overrides, self.dtype = family, overrides or {}, dtype
        self.base_folder, self.folder = folder / "base", folder / "adapter"
        self.model().to(dtype).save_pretrained(self.base_folder, max_shard_size="40KB")
        lora = {"target_parameters": EXPERTS, "target_modules": ["q_proj"], "lora_alpha": 5} | lora
        model = get_peft_model(self.model(), LoraConfig(r=r, **lora))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(self.folder)
        self.logits = self.run(model)
        self.base = load_base(self.base_folder)
        self.adapter = read_adapter(self.folder, self.base)

    def model(self) -> Any:
        """The base, anew; in fp32, with weights that `dtype` holds."""
        return tiny_model(self.family, "eager", **self.overrides).to(self.dtype).float()

    @torch.no_grad()
    def run(self, model: Any) -> Tensor:
        """Logits."""
        return model.eval()(tokens()).logits

    def stock(self, folder: Path) -> Tensor:
        """The logits of stock PEFT with the adapter in `folder`."""
        return self.run(PeftModel.from_pretrained(self.model(), folder))

    def written(self, layout: str, folder: Path, adapter: Adapter | None = None) -> Path:
        """`folder`, with the adapter in `layout`."""
        folder.mkdir()
        self.notes = write_adapter(adapter or self.adapter, self.base, layout, folder)
        return folder


def config_of(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says."""
    return json.loads((folder / CONFIG).read_text())
