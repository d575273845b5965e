"""Every experts class of the installed transformers, found in its source, in a tiny model of its family."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support_hf import rescale, tokens
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

DECORATOR = "use_experts_implementation"
LAYERS = 2
VOCABULARY = 97

SIZES: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("depth", "first_k_dense_replace", "num_dense_layers", "n_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "text_hidden_size", "thinker_hidden_size"), 32),
    **dict.fromkeys(("out_hidden_size", "adapter_out_dim", "output_proj_dims", "output_dim"), 32),
    **dict.fromkeys(("projection_hidden_dim", "projection_intermediate_size", "projector_hidden_size"), 32),
    **dict.fromkeys(("moe_hidden_size", "hc_lowrank"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("encoder_ffn_dim",), 24),
    **dict.fromkeys(("num_attention_heads", "num_heads", "swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("index_n_heads", "indexer_n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("index_head_dim", "indexer_head_dim", "linear_head_dim", "router_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "n_group"), 2),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "sliding_window"), 8),
    **dict.fromkeys(("max_position_embeddings", "position_embedding_size"), 64),
    **dict.fromkeys(("num_position_embeddings", "max_source_positions"), 64),
}
"""A field of a config -> its size in a tiny model, where its default is not smaller."""


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


_SAM = {"image_size": 64, "output_channels": 32, "downsample_channels": [32, 32]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "DeepseekOcr2SamVisionConfig": _SAM,
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaConfig": {
        "canvas_length": 16,
        # transformers 5.17 builds it of this one alone, and has no default
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "position_embedding_size": 64,
        },
    },
    "DiffusionGemmaTextConfig": {"global_head_dim": 8},
    "Dots3NoteTextConfig": {
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": _mrope(1, 1, 2)},
    "FlintConfig": {"mlp_only_layers": [0]},
    "Gemma4TextConfig": {"enable_moe_block": True, "global_head_dim": 8},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_mrope(1, 1), "partial_rotary_factor": 0.5}},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "HunYuanMoEV1Config": {"num_experts": 8, "moe_topk": 2},  # 1 by default, whose weight has no gradient
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32]},
    "NemotronHConfig": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    "Qwen3OmniMoeAudioEncoderConfig": {"downsample_hidden_size": 16},
    # Its model reads this one and the class does not declare it: published checkpoints bring it.
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 24},
    "Qwen4ExpTextConfig": {"indexer_kv_heads": 1, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "UnlimitedOcrSamVisionConfig": _SAM,
}
"""Class of a config -> what it needs beside `SIZES` to be valid, tiny, and to have experts."""

MODELS = {"Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}
"""Experts class -> the model to take, where the likeliest one has no forward on tokens alone."""

_LIKELIEST = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForBlockDiffusion",
    "ForTokenClassification",
    "Model",
)


@dataclass(frozen=True)
class Case:
    """An experts class, and the family (a folder of transformers.models) whose source has it."""

    family: str
    experts: str
    special: bool
    """Its source has a gate of its own or passes flags to the decorator."""

    def __str__(self) -> str:
        return f"{self.family}-{self.experts}"


@cache
def cases() -> tuple[Case, ...]:
    """The classes that carry the decorator of the experts interface, as the installed source says."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if DECORATOR in source:
            found += _cases(path.parent.name, ast.parse(source))
    return tuple(found)


def case_of(family: str) -> Case:
    """The first case of a family. A test of one that came with a newer transformers is skipped."""
    found = [case for case in cases() if case.family == family]
    if not found and not has_all_families():
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert found, f"no family {family} has experts"
    return found[0]


def has_all_families() -> bool:
    """Whether this transformers is no older than what the tests are written for."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def tiny_family(case: Case, implementation: str = "eager", **overrides: Any) -> PreTrainedModel:
    """A tiny model in training mode that has the experts class: the likeliest that people would train.

    `overrides` of its config come last, those of a sub-config as a dict. Pre-activations are about N(0, 1).
    """
    for cls in _models(case):
        config = cls.config_class(**shrunk(cls.config_class, **overrides))
        model = cls._from_config(config, experts_implementation=implementation, dtype=torch.float32)
        if experts_of(model, case):
            _draw(model, case)
            return model.train()
    raise LookupError(
        f"No model of {case.family} has {case.experts} in it: add a row to OVERRIDES or MODELS."
    )


def experts_of(model: torch.nn.Module, case: Case) -> dict[str, Any]:
    """name -> module, of the experts class in `model`."""
    return {name: m for name, m in model.named_modules() if type(m).__name__ == case.experts}


def shrunk(config_class: type[PretrainedConfig], **overrides: Any) -> dict[str, Any]:
    """The arguments that make a tiny config, its sub-configs as dicts of the same; `overrides` come last."""
    default = config_class().__dict__
    arguments = {}
    for name in sorted(field.name for field in fields(config_class)):
        value = default.get(name)
        if name in SIZES:
            arguments[name] = _smaller(value, SIZES[name])
        elif name.endswith(("_token_id", "_token_index")):
            arguments[name] = _special(name)
        elif name.endswith("dropout") and value:
            arguments[name] = 0.0
        elif name == "mlp_layer_types" and value:
            arguments[name] = (
                value[-1:] * LAYERS
            )  # the last layers of a model are mixtures, the first may be not
        elif name == "layer_types" and value:
            kinds = list(dict.fromkeys(reversed(value)))[:LAYERS]
            arguments[name] = [*kinds, *kinds][:LAYERS][::-1]
    if "kv_lora_rank" in arguments and "num_attention_heads" in arguments:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    for name in config_class.sub_configs:
        if isinstance(default.get(name), PretrainedConfig):
            sub = type(default[name])
            arguments[name] = {"model_type": sub.model_type, **shrunk(sub)}
    return _merged(_merged(arguments, OVERRIDES.get(config_class.__name__, {})), overrides)


def inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """What the forward of a tiny `model` takes: token ids, and vectors where it has no embedding for them."""
    ids, generator = tokens(seed), torch.Generator().manual_seed(seed)
    takes = inspect.signature(model.forward).parameters
    if type(model).__name__ == MODELS["Qwen3OmniMoeTalkerTextExperts"]:
        return {"inputs_embeds": torch.randn(*ids.shape, model.config.hidden_size, generator=generator)}
    if "moe_mm_token_type_ids" in takes:
        return {"input_ids": ids, "moe_mm_token_type_ids": (ids % 2).int()}  # half of them to other experts
    if "self_conditioning_logits" in takes:
        last = torch.randn(len(ids), model.config.canvas_length, VOCABULARY, generator=generator)
        return {"input_ids": ids, "self_conditioning_logits": last}
    return {"input_ids": ids}


def outputs(model: Any, seed: int = 0) -> Tensor:
    """The logits of `model` on `inputs`, or the last hidden state of one without a head.

    Some draw in their forward (phimoe's router, a canvas for diffusion): the same numbers in every call.
    """
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's wrapper
    torch.manual_seed(seed)
    out = model(**inputs(inside, seed))
    return out.logits if "logits" in out else out.last_hidden_state


def step(model: Any) -> dict[str, Tensor]:
    """{"outputs", each trained parameter that they depend on: its gradient} of a forward and a backward."""
    model.zero_grad()
    out = outputs(model)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"outputs": out.detach(), **grads}


def _cases(family: str, tree: ast.Module) -> list[Case]:
    """The classes of a module that carry DECORATOR, called or not."""
    found = []
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for decorator in cls.decorator_list:
            called = isinstance(decorator, ast.Call)
            name = ast.unparse(decorator.func if called else decorator)
            if name.rpartition(".")[2] == DECORATOR:
                own_gate = any(getattr(member, "name", "") == "_apply_gate" for member in cls.body)
                found.append(Case(family, cls.name, special=called or own_gate))
    return found


def _models(case: Case) -> list[type[PreTrainedModel]]:
    """The models in the source of `case`, the likeliest first."""
    module = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    found = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
    ]
    if case.experts in MODELS:
        return [cls for cls in found if cls.__name__ == MODELS[case.experts]]
    return [
        cls
        for end in _LIKELIEST
        for cls in found
        if cls.__name__.endswith(end) and not cls.__name__.endswith("PreTrainedModel")
    ]


def _smaller(default: Any, size: int) -> Any:
    if isinstance(default, (list, tuple)):
        return type(default)(min(value, size) for value in default)
    return size if default is None else min(default, size)


def _special(name: str) -> int:
    """An id that is not among `tokens()`: those of other inputs come last in the vocabulary."""
    usual = ("pad_token_id", "bos_token_id", "eos_token_id")
    return usual.index(name) if name in usual else VOCABULARY - 1 - sum(map(ord, name)) % 8


def _merged(arguments: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(arguments)
    for name, value in overrides.items():
        merged[name] = _merged(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


@torch.no_grad()
def _draw(model: torch.nn.Module, case: Case) -> None:
    """`rescale`, and what it does not know of."""
    rescale(model)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("scale") and parameter.dim() < 2:
            # hyper-connections start theirs at 0.01, which hides what comes after
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    for module in experts_of(model, case).values():
        values = {**vars(module), **vars(getattr(module, "act_fn", module))}
        if any("limit" in name or "cap" in name for name in values):
            # about a tenth of the pre-activations then lie beyond limits of 7 and 10, and outputs stay at 1
            module.gate_up_proj.mul_(5)
            module.down_proj.div_(25)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer[-1] = -1  # zaya's: transformers writes this over what it has loaded
