"""The model and tokenizer of a recipe: a checkpoint, or a small architecture from scratch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch

from fastexperts.errors import FastexpertsError, refuse
from fastexperts.hf.experts import NAME, register
from fastexperts.train.recipe import ModelSettings
from fastexperts.train.tokenizer import byte_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# Named small architectures: (transformers' model_type, settings).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-qwen3-moe": (
        "qwen3_moe",
        _COMMON
        | {
            "head_dim": 32,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "tiny-mixtral": (
        "mixtral",
        _COMMON | {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "tiny-deepseek-v3": (
        "deepseek_v3",
        _COMMON
        | {
            "num_key_value_heads": 4,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
}


def load_tokenizer(settings: ModelSettings) -> Any:
    """The recipe's tokenizer: the one it names, else the checkpoint's, else bytes."""
    source = settings.tokenizer or settings.path
    if source is None:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        name = "model.tokenizer" if settings.tokenizer else "model.path"
        raise _not_loadable(name, source, "a folder or hub name with a tokenizer", error) from error


def load_model(settings: ModelSettings, tokenizer: Any, dtype: Any, seed: int) -> Any:
    """The recipe's model, on the CPU, with fastexperts selected; from scratch it depends on `seed` alone.

    Raises FastexpertsError for a model that cannot be found or that transformers cannot build.
    """
    from transformers import AutoModelForCausalLM, set_seed

    register()
    options = {"dtype": dtype, "attn_implementation": settings.attention, "experts_implementation": NAME}
    if settings.config is not None:
        set_seed(seed)
        config = tiny_config(settings.config, settings.overrides, tokenizer)
        try:
            model = AutoModelForCausalLM.from_config(config, **options)
        except (ValueError, KeyError, TypeError, RuntimeError, AssertionError, ImportError) as error:
            raise _no_attention(settings, error) or _impossible(
                settings.config, settings.overrides, error
            ) from error
        _try_out(model, settings)
    else:
        path = str(settings.path)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            needs = "a folder or hub name with a causal language model"
            raise _no_attention(settings, error) or _not_loadable("model.path", path, needs, error) from error
        if getattr(model, "_hf_peft_config_loaded", False):
            raise refuse(
                "recipe",
                "model.path",
                got=f"{path!r}, an adapter",
                needs="a whole model",
                way_out="Merge it first: `fastexperts export ADAPTER --to merged -o MODEL`.",
            )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise refuse(
            "recipe",
            "model.tokenizer",
            got=f"{len(tokenizer)} tokens, and the model has embeddings of {rows}",
            needs="a tokenizer that the model was made for",
            way_out="Leave `model.tokenizer` out, or name the model's own.",
        )
    return model


def tiny_config(name: str, overrides: dict[str, Any], tokenizer: Any) -> Any:
    """The named small config with `overrides`; each must be a setting that the architecture has."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    model_type, settings = CONFIGS[name]
    known = AutoConfig.for_model(model_type).to_dict() | settings
    for key in overrides:
        if key not in known:
            match = difflib.get_close_matches(key, known, n=1)
            way_out = (
                f"Did you mean `{match[0]}`?" if match else f"{model_type}'s config has no such setting."
            )
            raise refuse(
                "recipe",
                f"model.overrides.{key}",
                got="an unknown setting",
                needs="a known one",
                way_out=way_out,
            )
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return AutoConfig.for_model(model_type, **(settings | special | overrides))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise _impossible(name, overrides, error) from error


def _try_out(model: Any, settings: ModelSettings) -> None:
    """Refuse overrides that make a model which cannot run, as with a top-k beyond its experts."""
    if settings.attention.startswith("flash"):
        return  # on GPUs alone
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
    except RuntimeError as error:
        raise _impossible(str(settings.config), settings.overrides, error) from error


def _no_attention(settings: ModelSettings, error: Exception) -> FastexpertsError | None:
    """What to say if it is the attention that transformers could not set up."""
    asked = settings.attention.startswith("flash") and isinstance(error, (ImportError, ValueError))
    if not (asked and "flash" in str(error).lower()):
        return None
    return refuse(
        "recipe",
        "model.attention",
        got=f"{settings.attention!r}, which transformers cannot use ({' '.join(str(error).split())[:300]})",
        needs="an attention that is installed and that the model has",
        way_out="Set `model.attention: sdpa`, or install it.",
    )


def _impossible(name: str, overrides: dict[str, Any], error: Exception) -> FastexpertsError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    needs = f"settings that make a model of {name}"
    return refuse("recipe", "model.overrides", got=overrides, needs=needs, way_out=f"Change them ({reason}).")


def _not_loadable(name: str, source: str, needs: str, error: Exception) -> FastexpertsError:
    local = Path(source).is_absolute() or source.startswith((".", "~"))
    if local and not Path(source).is_dir():
        got, way_out = (
            f"{source!r}, which is no folder",
            "Correct the path; it starts at the recipe's folder.",
        )
    else:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        got = f"{source!r}, which transformers cannot load ({first_line})"
        way_out = "Check the name, the files in it, and the network if it is on the hub."
    return refuse("recipe", name, got=got, needs=needs, way_out=way_out)
