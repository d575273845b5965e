"""Tiny models of the families outside transformers' experts interface, and what their tests measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from support_hf import rescale
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fastexperts

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA4 = {**COMMON, "head_dim": 8, "intermediate_size_mlp": 40}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": ("llama4_text", {**LLAMA4, "num_experts_per_tok": 1}),
    "llama4, two experts a token": ("llama4_text", LLAMA4),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 97,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 3,
            "moe_topk": 5,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "routed_scaling_factor": 1.5,
        },
    ),
    "jetmoe": ("jetmoe", {**COMMON, "kv_channels": 8}),
    "step3p7": (
        "step3p5",  # the text part
        {
            **COMMON,
            "moe_intermediate_size": 16,
            "share_expert_dim": 16,
            "head_dim": 8,
            "mlp_layer_types": ["sparse", "sparse"],
            "sliding_window": 16,
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    name, values = FAMILIES[family]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = CONFIG_MAPPING[name](**{**values, **overrides})
    if family == "step3p7":  # no auto class takes its text part alone
        from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

        model = Step3p7TextModel(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rescale(model)
    return model.to(dtype).train()


def enabled(family: str, **overrides: Any) -> Any:
    model = build(family, **overrides)
    fastexperts.enable(model, verbose=False, allow_unsupported=family == "jetmoe")
    return model


def outputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"logits", each trained parameter}: what the model gives for `ids`, and gradients of a loss of it."""
    model.zero_grad()
    logits = model(ids, use_cache=False)[0]
    target = torch.randint(logits.shape[-1], ids.shape, generator=torch.Generator().manual_seed(3))
    nnf.cross_entropy(logits.flatten(0, 1).float(), target.flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}
