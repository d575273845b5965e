"""Tiny transformers models and what their tests measure: parity, spies, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK_LIKE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}

TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "deepseek_v3": {
        **_DEEPSEEK_LIKE,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "glm4_moe": {**_DEEPSEEK_LIKE, "head_dim": 8, "use_qk_norm": True},
    "dots1": {**_DEEPSEEK_LIKE, "head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 16},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    },
}
"""The constructor arguments of each family's tiny config, over `_COMMON`."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """A config of `family` with two layers and a hidden size of 32."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family](**{**_COMMON, **TINY[family], **overrides})


RESOLUTION = 2.0**-22  # of a loss in fp32, and of one more rounding: less is no deviation of a curve


def tiny_model(family: str, implementation: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model of `family` whose pre-activations are about N(0, 1), the same for every implementation."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, dtype=torch.float32
    )
    rescale(model, seed)
    return model


@torch.no_grad()
def rescale(model: nn.Module, seed: int = 0) -> None:
    """Draw the weights so that every linear map keeps N(0, 1): transformers' 0.02 hides everything.

    Of the buffers a router's bias alone: the others are tables that the model computes.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if tensor.dim() < 2]
    for name, tensor in [*model.named_parameters(), *buffers]:
        if tensor.dim() >= 2:
            scale = 1.0 if "embed_tokens" in name else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
        elif "norm" in name:
            tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        elif "bias" in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))


def tokens(seed: int = 0, batch: int = 2, length: int = 24, vocabulary: int = 97) -> Tensor:
    """Token ids [batch, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


class Ops(TorchDispatchMode):
    """Records the name of every op that reaches the dispatcher, such as "fastexperts::moe_mlp"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))

    def ours(self) -> set[str]:
        return {name for name in self.names if name.startswith("fastexperts::")}


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps while the context is open."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def relative(got: Tensor, wanted: Tensor) -> float:
    """The relative Frobenius error of `got`, in fp64."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return ((got - wanted).norm() / wanted.norm()).item()


def toy_experts(
    act_fn: Any = None,
    gate: Any = None,
    forward: Any = None,
    experts: int = 5,
    hidden: int = 16,
    intermediate: int = 12,
    implementation: str = "fastexperts",
    values: dict[str, Any] | None = None,
    **flags: Any,
) -> Any:
    """An experts module of transformers' interface, a class of its own, with `flags` of the decorator.

    `gate` becomes its `_apply_gate`, `values` its instance values, `forward` its eager forward.
    """
    from transformers import PretrainedConfig
    from transformers.integrations.moe import use_experts_implementation

    gated, transposed = flags.get("has_gate", True), flags.get("is_transposed", False)

    class ToyExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, intermediate
            up, down = (intermediate * (2 if gated else 1), hidden), (hidden, intermediate)
            if transposed:
                up, down = up[::-1], down[::-1]
            name = "gate_up_proj" if gated else "up_proj"
            for parameter, dims, fan_in in ((name, up, hidden), ("down_proj", down, intermediate)):
                value = torch.randn(experts, *dims) * fan_in**-0.5
                self.register_parameter(parameter, nn.Parameter(value))
                if flags.get("has_bias"):
                    bias = torch.randn(experts, dims[-1] if transposed else dims[0])
                    self.register_parameter(parameter + "_bias", nn.Parameter(bias))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(hidden)
                nn.init.normal_(self.post_expert_norm.weight)
            self.act_fn = nn.SiLU() if act_fn is None else act_fn
            for key, value in (values or {}).items():
                setattr(self, key, value)

    ToyExperts.forward = forward or (lambda self, *args: pytest.fail("the eager forward ran"))
    if gate is not None:
        ToyExperts._apply_gate = gate
    config = PretrainedConfig()
    config._experts_implementation = implementation
    return use_experts_implementation(ToyExperts, **flags)(config)


def layer_inputs(module: Any, tokens: int = 33, top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_states, top_k_index, top_k_weights) for a bare experts module, floats with gradients."""
    x_TD = torch.randn(tokens, module.hidden_dim, requires_grad=True)
    ids_TK = torch.rand(tokens, module.num_experts).topk(top_k).indices
    weight_TK = torch.rand(tokens, top_k, requires_grad=True)
    return x_TD, ids_TK, weight_TK


def outputs_and_gradients(
    function: Any, module: Any, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """{"out", "x", "weight", each parameter}: the output of `function(*inputs)`, and gradients."""
    x_TD, ids_TK, weight_TK = inputs
    out_TD = function(x_TD, ids_TK, weight_TK)
    dout_TD = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(1)).to(out_TD.dtype)
    named = {"x": x_TD, "weight": weight_TK, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(out_TD, list(named.values()), dout_TD)
    return {"out": out_TD.detach(), **dict(zip(named, gradients, strict=True))}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every tensor is within `tolerance`, relative Frobenius, and none of the wanted ones is zero."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.norm() > 0, f"{name}: the reference is zero, nothing would be compared"
        assert got[name].dtype == tensor.dtype, name
        assert relative(got[name], tensor) <= tolerance, name
