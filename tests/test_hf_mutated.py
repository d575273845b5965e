"""Transformers' own experts classes with one fault seeded in their gate: refused, or computed as mutated."""

import inspect
import sys
import textwrap
from importlib import import_module
from typing import Any

import pytest
import torch
from support_hf import assert_close, layer_inputs, outputs_and_gradients
from torch import nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

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
    for parameter in module.parameters():
        fan_in = parameter.shape[1 if module.is_transposed else -1]
        nn.init.normal_(parameter, std=fan_in**-0.5 if parameter.dim() == 3 else 0.1)
    module.hidden_dim = CONFIG["hidden_size"]
    return module


def mutated(cls: type, old: str, new: str) -> type:
    """A subclass of `cls` whose gate has `new` where that of `cls` has `old`."""
    source = textwrap.dedent(inspect.getsource(cls._apply_gate))
    assert old in source, f"{cls.__name__}._apply_gate has changed:\n{source}"
    namespace: dict[str, Any] = {}
    exec(source.replace(old, new), {**vars(sys.modules[cls.__module__])}, namespace)
    return type(f"Mutated{cls.__name__}", (cls,), namespace)


def served(module: Any) -> bool:
    """Whether a forward of `module` runs; the biases of gpt_oss may be refused whatever its gate is."""
    return not module.has_bias or "bias" not in _refusal(module)


def _refusal(module: Any) -> str:
    try:
        module(*layer_inputs(module))
    except FastexpertsError as e:
        return str(e)
    return ""


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
    if not served(module):
        pytest.skip("no expert biases so far")
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
    row = outcome(module)
    if row is None:
        with pytest.raises(FastexpertsError, match="_apply_gate" if served(build(class_of(cls))) else ""):
            module(*layer_inputs(module))
    elif served(module):
        compare(module, mutant)
    else:
        h_PG = 4 * torch.randn(64, 24, dtype=torch.float64)
        stored_PG = torch.stack(h_PG.chunk(2, dim=1), dim=-1).flatten(1)  # gpt_oss interleaves
        assert torch.allclose(row.forward(h_PG), module._apply_gate(stored_PG), rtol=1e-9, atol=1e-9)


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
