"""fastexperts.hf.outside: what an adapter does not serve is refused, at enable() or at the call."""

import functools

import pytest
import torch
from support_hf import relative, tokens
from support_outside import COMMON, FAMILIES, build, enabled
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf import outside

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"


def test_a_changed_activation_is_seen_at_the_next_call():
    model = enabled("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    inputs = (torch.randn(1, 5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2))
    experts(*inputs)
    experts.mlp.activation_fn = nn.GELU()
    wanted = type(experts).forward(experts, *inputs)
    assert relative(experts(*inputs), wanted) <= 1e-6
    experts.mlp.activation_fn = nn.Tanh()
    with pytest.raises(FastexpertsError, match="no Activation equals"):
        experts(*inputs)


def scaled_by(factor):
    def patch(forward):
        def forward_scaled(self, *args):
            output = forward(self, *args)
            return (factor * output[0], *output[1:]) if isinstance(output, tuple) else factor * output

        return forward_scaled

    return patch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_computes_otherwise_is_refused(family, monkeypatch):
    model = build(family)
    module = next(m for m in model.modules() if type(m).__name__ in outside.ADAPTERS)
    monkeypatch.setattr(type(module), "forward", scaled_by(1.01)(type(module).forward))
    with pytest.raises(FastexpertsError, match="on 4 tokens is not that of fastexperts"):
        fastexperts.enable(model)
    assert not outside.restore(model)


def patched_instance(model):
    block = model.model.layers[0].feed_forward
    block.forward = functools.partial(type(block).forward, block)


def another_activation(model):
    model.model.layers[0].feed_forward.experts.act_fn = nn.Mish()


def patched_layer(model):
    model.model.layers[0].forward = lambda hidden_states, **kwargs: hidden_states


def quantised(model):
    experts = model.model.layers[0].feed_forward.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)


def another_signature(model):
    """What a newer transformers may do."""
    block = model.model.layers[0].feed_forward

    class Llama4TextMoe(type(block)):
        def forward(self, hidden_states, mask):
            return super().forward(hidden_states)

    block.__class__ = Llama4TextMoe


def hooked(model):
    model.model.layers[0].feed_forward.experts.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patched_instance, "`forward` got one put on the instance"),
        (another_activation, "no Activation equals"),
        (patched_layer, r"never calls self\.feed_forward"),
        (hooked, "`experts` got a Llama4TextExperts with hooks"),
        (lambda model: model.to("meta"), "the meta device"),
        (quantised, "quantised"),
        (another_signature, r"`forward` got TypeError \(.+mask"),
    ],
)
def test_what_an_adapter_does_not_serve_is_refused(change, message):
    model = build("llama4")
    change(model)
    with pytest.raises(FastexpertsError, match=FORM) as error:
        fastexperts.enable(model)
    assert error.match(message)
    assert not outside.restore(model)


def test_hooks_put_on_later_are_refused_at_the_call():
    model = enabled("llama4")
    hooked(model)
    with pytest.raises(FastexpertsError, match="with hooks"):
        model(tokens())


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_peft_on_weights_that_are_read_is_refused(family):
    """Its factors would have no effect, and nothing would say so."""
    peft = pytest.importorskip("peft")
    target = {"llama4": "feed_forward.experts.gate_up_proj", "jetmoe": "mlp.input_linear.weight"}[family]
    model = peft.get_peft_model(enabled(family), peft.LoraConfig(target_parameters=[target], r=2))
    with pytest.raises(FastexpertsError, match="got a ParamWrapper"):
        model(tokens())


def test_a_clamp_after_the_activation_has_no_row():
    """Two layers of Step-3.7-Flash; the others are served."""
    model = build("step3p7", swiglu_limits=[0.0, 2.0])
    with pytest.raises(FastexpertsError, match="no Activation equals"):
        fastexperts.enable(model)
    summary = fastexperts.enable(model, allow_unsupported=True, verbose=False)
    assert [row.name for row in summary.served] == ["layers.0.mlp.experts"]
    assert outside.restore(model) == 1


def test_attention_experts_are_said():
    model = build("jetmoe")
    with pytest.raises(FastexpertsError, match="projections of an attention") as error:
        fastexperts.enable(model)
    assert "JetMoeMoA, 2" in str(error.value)
    assert not outside.restore(model), "nothing is switched in part"


def test_every_reason_names_a_class_that_is_found():
    assert not outside.REASONS.keys() & outside.ADAPTERS.keys()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["doge"](**{**COMMON, "is_moe": True, "num_experts": 16})
        )
    with pytest.raises(FastexpertsError, match="rows of two embeddings"):
        fastexperts.enable(model)
