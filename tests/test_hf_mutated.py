"""Transformers' own experts classes with one fault seeded: refused, or computed as mutated."""

import inspect
import sys
import textwrap
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from support_hf import (
    assert_close,
    layer_inputs,
    outputs_and_gradients,
    relative,
    tiny_model,
    tokens,
)
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

import fastexperts
from fastexperts.activations import Activation
from fastexperts.errors import FastexpertsError
from fastexperts.hf.gate import activation_of, find_activation

CONFIG = {
    "num_local_experts": 5,
    "num_experts": 5,
    "n_routed_experts": 5,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "moe_latent_size": None,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "swiglu_limit": 1.25,  # near the inputs of the tests, so that they reach beyond it
    "swiglu_alpha": 1.702,
}
FAMILIES = {
    "GptOssExperts": "gpt_oss",
    "DeepseekV4Experts": "deepseek_v4",
    "MiniMaxM3VLExperts": "minimax_m3_vl",
    "HYV4Experts": "hy_v4",
    "Glm5NextTextExperts": "glm5_next",
}
# class, what the fault is, the line of its _apply_gate, and what is seeded there
MUTATIONS = [
    ("GptOssExperts", "clamp of gate removed", "gate = gate.clamp(min=None, max=self.limit)", "pass"),
    ("GptOssExperts", "clamp of up removed", "up = up.clamp(min=-self.limit, max=self.limit)", "pass"),
    (
        "GptOssExperts",
        "gate and up swapped",
        "[..., ::2], gate_up[..., 1::2]",
        "[..., 1::2], gate_up[..., ::2]",
    ),
    (
        "GptOssExperts",
        "halves taken for interleaved",
        "gate_up[..., ::2], gate_up[..., 1::2]",
        "gate_up.chunk(2, -1)",
    ),
    ("GptOssExperts", "alpha changed", "gate * self.alpha", "gate * 1.6"),
    ("GptOssExperts", "alpha left out", "gate * self.alpha", "gate"),
    ("GptOssExperts", "shift dropped", "(up + 1)", "up"),
    ("GptOssExperts", "shift changed", "(up + 1)", "(up + 1.01)"),
    (
        "GptOssExperts",
        "limit of up changed",
        "min=-self.limit, max=self.limit",
        "min=-self.limit, max=2 * self.limit",
    ),
    ("GptOssExperts", "lower limit of gate", "min=None, max=self.limit", "min=-self.limit, max=self.limit"),
    ("GptOssExperts", "factor", "return gated_output", "return 1.001 * gated_output"),
    ("GptOssExperts", "clamp after", "return gated_output", "return gated_output.clamp(max=self.limit)"),
    ("DeepseekV4Experts", "clamp of gate removed", "gate = gate.clamp(max=self.limit)", "pass"),
    ("DeepseekV4Experts", "both clamps doubled", "self.limit", "(2 * self.limit)"),
    ("DeepseekV4Experts", "activation replaced", "self.act_fn(gate)", "F.gelu(gate)"),
    ("DeepseekV4Experts", "activation of up", "self.act_fn(gate) * up", "gate * self.act_fn(up)"),
    ("DeepseekV4Experts", "up left out", "self.act_fn(gate) * up", "self.act_fn(gate)"),
    ("MiniMaxM3VLExperts", "alpha left out", "gate * self.swiglu_alpha", "gate"),
    ("MiniMaxM3VLExperts", "sign of the shift", "up + 1.0", "up - 1.0"),
    (
        "MiniMaxM3VLExperts",
        "clamp of up removed",
        "up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)",
        "pass",
    ),
    ("MiniMaxM3VLExperts", "no gradient to up", "(up + 1.0)", "(up.detach() + 1.0)"),
    ("HYV4Experts", "limit of up on one side", "min=-self.swiglu_limit, max=", "max="),
    ("HYV4Experts", "activation replaced", "F.silu(gate)", "F.relu(gate)"),
    ("HYV4Experts", "sigmoid for silu", "F.silu(gate)", "F.sigmoid(gate)"),
    ("HYV4Experts", "clamps removed", "self.swiglu_limit", "1e30"),
    ("Glm5NextTextExperts", "a tensor read", "F.silu(gate)", "F.silu(gate) * self.down_proj.mean()"),
    ("Glm5NextTextExperts", "a mean over the rows", "F.silu(gate)", "F.silu(gate - gate.mean(0))"),
]
NAMES = [f"{cls}: {what}" for cls, what, _, _ in MUTATIONS]


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


def class_of(name: str) -> type:
    try:
        return getattr(import_module(f"transformers.models.{FAMILIES[name]}.modeling_{FAMILIES[name]}"), name)
    except ModuleNotFoundError:
        pytest.skip(f"transformers has no {FAMILIES[name]}")


def build(cls: type, implementation: str = "fastexperts") -> Any:
    config = PretrainedConfig()
    for name, value in CONFIG.items():
        setattr(config, name, value)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    module = cls(config)
    for name, parameter in list(module.named_parameters()):
        if name.endswith("bias"):  # gpt_oss's are no matter of its gate
            delattr(module, name)
            module.register_buffer(name, torch.zeros_like(parameter))
        else:
            nn.init.normal_(parameter, std=parameter.shape[1 if module.is_transposed else -1] ** -0.5)
    module.has_bias = False
    if hasattr(module, "limit"):
        module.limit = CONFIG["swiglu_limit"]  # transformers 5.17 takes gpt_oss's from no config
    module.hidden_dim = CONFIG["hidden_size"]
    return module


def edited(function: Any, old: str, new: str) -> Any:
    """`function` with `new` where its source has `old`."""
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:
        pytest.skip(f"transformers {transformers.__version__} writes {function.__qualname__} without {old!r}")
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), {**vars(sys.modules[function.__module__])}, namespace)
    return namespace[function.__name__]


def mutated(cls: type, old: str, new: str) -> type:
    """A subclass of `cls` whose gate has `new` where that of `cls` has `old`."""
    return type(f"Mutated{cls.__name__}", (cls,), {"_apply_gate": edited(cls._apply_gate, old, new)})


def outcome(module: Any) -> Activation | None:
    """The row found for the gate of `module`, or None where the comparison refuses it."""
    try:
        return find_activation(module)
    except FastexpertsError:
        return None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_itself_is_computed_as_its_eager_forward_computes(name):
    """Nothing is proved by refusing what is right as well."""
    module = build(class_of(name))
    assert activation_of(module).limit == CONFIG["swiglu_limit"]
    compare(module, class_of(name))


def compare(module: Any, cls: type) -> None:
    inputs = layer_inputs(module)
    eager = build(cls, "eager")
    w1_DG = module.gate_up_proj[0] if module.is_transposed else module.gate_up_proj[0].T
    h_PG = inputs[0] @ w1_DG
    assert (h_PG.abs() > CONFIG["swiglu_limit"]).any(), "the clamp is reached"
    assert_close(outputs_and_gradients(module, module, inputs), outputs_and_gradients(eager, eager, inputs))


@pytest.mark.parametrize(("cls", "what", "old", "new"), MUTATIONS, ids=NAMES)
def test_a_mutated_gate_is_refused_or_computed_as_it_is(cls, what, old, new):
    mutant = mutated(class_of(cls), old, new)
    module = build(mutant)
    if outcome(module) is None:
        with pytest.raises(FastexpertsError, match="_apply_gate"):
            module(*layer_inputs(module))
    else:
        compare(module, mutant)


def test_most_of_the_mutants_are_refused():
    rows = {what: outcome(build(mutated(class_of(cls), old, new))) for cls, what, old, new in MUTATIONS}
    refused = {what for what, row in rows.items() if row is None}
    assert len(refused) >= 12, refused
    assert {"gate and up swapped", "alpha changed", "shift changed", "factor", "a tensor read"} <= refused


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_that_is_patched_after_its_first_call_is_compared_again(name, monkeypatch):
    """What a script does to transformers' class, after models of it exist."""
    cls = class_of(name)
    module = build(cls)
    before = activation_of(module)
    gate = cls._apply_gate
    monkeypatch.setattr(cls, "_apply_gate", lambda self, h: 1.01 * gate(self, h))
    with pytest.raises(FastexpertsError, match="no Activation equals"):
        activation_of(module)
    monkeypatch.undo()
    assert activation_of(module) == before


def test_the_default_gate_follows_the_activation_of_the_class():
    """Families without a gate of their own: qwen3_moe and, of gelu, gemma4."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    wanted_of = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "mish": None}
    for name, wanted in wanted_of.items():
        module = build(Qwen3MoeExperts)
        module.act_fn = ACT2FN[name]
        row = outcome(module)
        assert (row and row.fn) == wanted
        if row:
            eager = build(Qwen3MoeExperts, "eager")
            eager.act_fn = ACT2FN[name]
            inputs = layer_inputs(module)
            ours = outputs_and_gradients(module, module, inputs)
            assert_close(ours, outputs_and_gradients(eager, eager, inputs))


# What is seeded in the eager forward of the class, behind every flag and gate.
FORWARDS = {
    "factor": ("return final_hidden_states", "return 1.01 * final_hidden_states"),
    "weights squared": (
        "top_k_weights[token_idx, top_k_pos, None]",
        "top_k_weights[token_idx, top_k_pos, None] ** 2",
    ),
    "another activation": ("self.act_fn(gate)", "nn.functional.gelu(gate)"),
    "gate and up swapped": ("gate, up =", "up, gate ="),
    "input weighed": (
        "current_state = hidden_states[token_idx]",
        "current_state = hidden_states[token_idx] * top_k_weights[token_idx, top_k_pos, None]",
    ),
    "a residual": ("torch.zeros_like(hidden_states)", "hidden_states.clone()"),
    "the next expert": ("self.down_proj[expert_idx]", "self.down_proj[expert_idx - 1]"),
    "a choice dropped": (
        "top_k_weights[token_idx, top_k_pos, None]",
        "(top_k_weights * (top_k_index != 1))[token_idx, top_k_pos, None]",
    ),
}


# The output is the same, a gradient is not.
BACKWARDS = {
    "a router that is not trained": (
        "top_k_weights[token_idx, top_k_pos, None]",
        "top_k_weights.detach()[token_idx, top_k_pos, None] * (1 + 0 * top_k_weights.sum())",
    ),
    "half of the gradient of the tokens": (
        "current_state = hidden_states[token_idx]",
        "current_state = hidden_states[token_idx].lerp(hidden_states[token_idx].detach(), 0.5)",
    ),
}


def with_forward(model: Any, eager: Any) -> None:
    """Make the experts of `model` instances of a class whose eager forward is `eager`."""
    cls = type(model.model.layers[0].mlp.experts)
    mutant = use_experts_implementation(type(f"Mutated{cls.__name__}", (cls,), {"forward": eager}))
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = mutant


@pytest.mark.parametrize("what", FORWARDS)
def test_a_class_that_computes_more_than_it_says_is_refused(what):
    model = tiny_model("qwen3_moe", "eager").eval()
    eager = inspect.unwrap(type(model.model.layers[0].mlp.experts).forward)
    with_forward(model, edited(eager, *FORWARDS[what]))
    mine = model(tokens()).logits
    model.set_experts_implementation("grouped_mm")
    assert relative(model(tokens()).logits, mine) > 1e-3, "the premise: transformers sees no difference"
    with pytest.raises(FastexpertsError, match="on 4 tokens is not that of fastexperts"):
        fastexperts.enable(model)
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("what", BACKWARDS)
def test_a_class_that_learns_otherwise_is_refused(what):
    model = tiny_model("qwen3_moe", "eager").eval()
    eager = inspect.unwrap(type(model.model.layers[0].mlp.experts).forward)
    before = model(tokens()).logits
    with_forward(model, edited(eager, *BACKWARDS[what]))
    assert relative(model(tokens()).logits, before) < 1e-6, "the premise: the output tells nothing"
    with pytest.raises(FastexpertsError, match=r"gradient of the .* on 4 tokens is not that of fastexperts"):
        fastexperts.enable(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_class_that_is_written_otherwise_and_computes_the_same_is_served():
    model = tiny_model("qwen3_moe", "eager").eval()
    eager = inspect.unwrap(type(model.model.layers[0].mlp.experts).forward)
    with_forward(model, edited(eager, "self.act_fn(gate) * up", "up * self.act_fn(gate)"))
    assert len(fastexperts.enable(model, verbose=False).served) == 2


def test_weights_that_are_not_finite_prove_nothing():
    model = tiny_model("qwen3_moe", "eager")
    nn.init.constant_(model.model.layers[0].mlp.experts.down_proj, torch.nan)
    assert len(fastexperts.enable(model, verbose=False).served) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_comparison_serves_every_dtype(dtype):
    assert len(fastexperts.enable(tiny_model("qwen3_moe", "eager").to(dtype), verbose=False).served) == 2
