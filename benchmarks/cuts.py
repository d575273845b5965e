"""Models cut down to what one card of 80 GB trains: published geometry, fewer layers, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from shapes import SHAPES, Shape
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Cut:
    """A family's config with `settings` in the place of its defaults, and the batch of a step.

    shape: of one layer's experts, in shapes.py's terms. full_layers: of the model that it is cut from.
    """

    name: str
    model_type: str
    shape: Shape
    full_layers: int
    batch: int
    settings: Mapping[str, Any]
    length: int = 4096
    tiny_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def layers(self) -> int:
        return self.settings["num_hidden_layers"]

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, use_cache=False, **self.settings)

    def tiny(self) -> Cut:
        """The same family in a size for any CPU."""
        settings = {**self.settings, **_TINY, **self.tiny_settings}
        return replace(self, shape=TINY, batch=2, length=32, settings=settings)

    def build(self, device: str, weights: str, seed: int = 0) -> nn.Module:
        """The causal model in training mode on `device`, drawn there: it depends on `seed` and the dtype."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                self.config(),
                dtype=DTYPES[weights],
                attn_implementation="sdpa",
                experts_implementation="grouped_mm",
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # transformers 5.17 leaves ernie's router at zero: all tokens would go to the same experts.
                if name.endswith("weight") and parameter.dim() > 1 and not parameter.any():
                    parameter.normal_(0.0, model.config.initializer_range)
        return model.train()

    def batch_ids(self, device: str, seed: int = 1) -> Tensor:
        """A step's tokens, [batch, length], uniform over the vocabulary."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.batch, self.length
        return torch.randint(self.settings["vocab_size"], shape, device=device, generator=generator)


def meta_model(cut: Cut) -> nn.Module:
    """Shapes without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(cut.config(), dtype=torch.bfloat16)


TINY = Shape("tiny", 64, 32, 8, 2)
_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": TINY.dim_d,
    "moe_intermediate_size": TINY.dim_f,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "num_experts_per_tok": TINY.top_k,
}

QWEN3: dict[str, Any] = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}

CUTS = {
    cut.name: cut
    for cut in (
        Cut(
            "qwen3-30b-a3b",
            "qwen3_moe",
            SHAPES["qwen3-30b"],
            full_layers=48,
            batch=4,
            settings=QWEN3 | {"num_hidden_layers": 6},
            tiny_settings={"num_experts": TINY.experts},
        ),
        Cut(
            "qwen3-30b-a3b-12",
            "qwen3_moe",
            SHAPES["qwen3-30b"],
            full_layers=48,
            batch=2,
            settings=QWEN3 | {"num_hidden_layers": 12},
            tiny_settings={"num_experts": TINY.experts},
        ),
        Cut(
            # One dense layer of three, and 32 of 256 experts, in the same 8 groups.
            "deepseek-v3",
            "deepseek_v3",
            SHAPES["deepseek-v3-e32"],
            full_layers=61,
            batch=4,
            settings={
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "n_routed_experts": 32,
                "num_experts_per_tok": 8,
                "n_shared_experts": 1,
                "n_group": 8,
                "topk_group": 4,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "vocab_size": 129280,
                "routed_scaling_factor": 2.5,
                "tie_word_embeddings": False,
            },
            tiny_settings={
                "n_routed_experts": TINY.experts,
                "n_group": 4,
                "topk_group": 2,
                "num_key_value_heads": 4,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "head_dim": 8,
            },
        ),
        Cut(
            "glm4.5-air",
            "glm4_moe",
            SHAPES["glm4.5-air"],
            full_layers=46,
            batch=4,
            settings={
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "hidden_size": 4096,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "num_experts_per_tok": 8,
                "n_shared_experts": 1,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "attention_bias": True,
                "use_qk_norm": False,
                "vocab_size": 151552,
                "tie_word_embeddings": False,
            },
            tiny_settings={"n_routed_experts": TINY.experts},
        ),
        Cut(
            "ernie4.5-21b-a3b",
            "ernie4_5_moe",
            SHAPES["ernie4.5-21b"],
            full_layers=28,
            batch=4,
            settings={
                "num_hidden_layers": 6,
                "moe_layer_start_index": 1,
                "hidden_size": 2560,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "moe_num_experts": 64,
                "moe_k": 6,
                "moe_num_shared_experts": 2,
                "num_attention_heads": 20,
                "num_key_value_heads": 4,
                "vocab_size": 103424,
                "tie_word_embeddings": True,
            },
            tiny_settings={"moe_num_experts": TINY.experts, "moe_k": TINY.top_k, "head_dim": 16},
        ),
        Cut(
            "dots1",
            "dots1",
            SHAPES["dots1"],
            full_layers=62,
            batch=4,
            settings={
                "num_hidden_layers": 3,
                "first_k_dense_replace": 1,
                "hidden_size": 4096,
                "intermediate_size": 10944,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 128,
                "num_experts_per_tok": 6,
                "n_shared_experts": 2,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "vocab_size": 152064,
                "max_position_embeddings": 32768,
                "tie_word_embeddings": False,
            },
            tiny_settings={"n_routed_experts": TINY.experts},
        ),
    )
}
