"""PEFT's adapters on fused experts: the same numbers as PEFT over eager experts, and no folded weight."""

from types import MethodType

import pytest
import torch
from spies import spy_backend, use_interpreter
from support_hf import TINY, Ops, assert_close, relative, tiny_config, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.peft import take_update

peft = pytest.importorskip("peft")

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "ernie4_5_moe"]


def adapted(family="qwen3_moe", targets=TARGETS, rank=4, alpha=6, seed=0, **config):
    """A tiny model with adapters on its experts, their factors random; gradients reach the factors alone."""
    fastexperts.register()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), experts_implementation="eager")
    lora = peft.LoraConfig(target_parameters=targets, r=rank, lora_alpha=alpha, **config)
    model = peft.get_peft_model(model, lora)
    randomize(model)
    return model.train()


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def switch(model, implementation):
    model.base_model.model.set_experts_implementation(implementation)


def run(model, implementation, ids=None, forward=None):
    """(operators, {"logits": .., factor: its gradient})"""
    switch(model, implementation)
    model.zero_grad()
    with Ops() as ops:
        logits = (model if forward is None else forward)(tokens() if ids is None else ids).logits
        logits.logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return ops, {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[::-1], TARGETS[:1], TARGETS[1:]])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_peft_over_eager_experts_without_its_fold(family, targets):
    model = adapted(family, targets)
    before = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    ops, got = run(model, "fastexperts")
    stock, wanted = run(model, "eager")
    assert "fastexperts::moe_mlp" in ops.names
    assert "aten::baddbmm" in stock.names
    assert "aten::baddbmm" not in ops.names
    assert len([name for name in got if "experts" in name]) >= 2 * len(targets)
    assert all(value.abs().sum() > 0 for value in got.values())
    assert_close(got, wanted)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == before


def test_through_the_triton_kernels(monkeypatch):
    use_interpreter(monkeypatch)
    model = adapted(rank=5)
    with spy_backend() as calls:
        _, got = run(model, "fastexperts", tokens(length=9))
    assert {where for where, *_ in calls} == {"kernels"}
    assert {"shrink", "shrink_dfactor", "dfactor"} <= {name for _, name, _ in calls}
    _, wanted = run(model, "eager", tokens(length=9))
    assert_close(got, wanted)


def test_frozen_experts_get_no_weight_gradient(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "torch")
    model = adapted()
    with spy_backend() as calls:
        run(model, "fastexperts")
    names = {name for _, name, _ in calls}
    assert {"dfactor", "shrink_dfactor"} <= names
    assert "dw" not in names


def test_b_read_in_the_order_of_a_is_another_model():
    """The classic silent fault of readers of this format: B is stored by rank and A by expert."""
    model = adapted()
    _, got = run(model, "fastexperts")
    for name, parameter in model.named_parameters():
        if "experts" in name and "lora_B" in name:
            experts = tiny_config("qwen3_moe").num_experts
            by_expert = parameter.data.unflatten(1, (experts, -1))
            parameter.data = by_expert.transpose(1, 2).flatten(1).contiguous()
    _, other = run(model, "fastexperts")
    assert relative(other["logits"], got["logits"]) > 1e-3


def test_a_disabled_adapter_adds_nothing():
    model = adapted()
    switch(model, "fastexperts")
    ids = tokens()
    plain = model.base_model.model
    with torch.no_grad():
        adapted_logits = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
        switch(model, "eager")
        with model.disable_adapter():
            wanted = plain(ids).logits
    assert relative(without, wanted) <= 1e-5
    assert relative(adapted_logits, wanted) > 1e-3


def test_switching_between_two_adapters_and_both_at_once():
    model = adapted(rank=4, alpha=6)
    model.add_adapter("other", peft.LoraConfig(target_parameters=TARGETS, r=3, lora_alpha=5))
    randomize(model)
    seen = {}
    for chosen in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(chosen)
        _, got = run(model, "fastexperts")
        _, wanted = run(model, "eager")
        assert_close(got, wanted)
        seen[str(chosen)] = got["logits"]
    one, other, both = seen.values()
    assert min(relative(one, other), relative(both, one), relative(both, other)) > 1e-3


def test_merged_and_unmerged():
    model = adapted()
    switch(model, "fastexperts")
    with torch.no_grad():
        wanted = model(tokens()).logits
        model.merge_adapter()
        with Ops() as ops:
            merged = model(tokens()).logits
        model.unmerge_adapter()
        back = model(tokens()).logits
    assert "aten::baddbmm" not in ops.names
    assert relative(merged, wanted) <= 1e-5
    assert relative(back, wanted) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = adapted()
    _, wanted = run(model, "fastexperts")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ops, got = run(model, "fastexperts")
    assert ops.names.count("fastexperts::moe_mlp") == 2 * tiny_config("qwen3_moe").num_hidden_layers
    assert "aten::baddbmm" not in ops.names
    assert_close(got, wanted, tolerance=1e-6)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled(fullgraph):
    model = adapted()
    _, wanted = run(model, "fastexperts")
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
    with spy_backend() as calls:
        logits = compiled(tokens()).logits
        logits.logsumexp(-1).sum().backward()
    assert "shrink" in {name for _, name, _ in calls}
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_close({"logits": logits.detach(), **grads}, wanted, tolerance=1e-6)


def test_under_autocast_factors_keep_their_dtype():
    """One layer, since a model's top-k choices move with bf16."""
    model = adapted()
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(40)])
    x, weight = torch.randn(40, model.config.hidden_size), torch.rand(40, 2)
    names = [name for name, _ in factors_of(model)]

    def layer(implementation, dtype=torch.float32):
        switch(model, implementation)
        parameters = [p for _, p in factors_of(model)]
        experts = model.base_model.model.model.layers[0].mlp.experts
        out = experts(x.to(dtype), ids, weight.to(dtype))
        return dict(zip(names, torch.autograd.grad(out.square().sum(), parameters), strict=True))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, eager = layer("fastexperts"), layer("eager")
    model.double()
    exact = layer("eager", torch.float64)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert relative(value, exact[name]) <= 2 * max(relative(eager[name], exact[name]), 2**-8), name


def factors_of(model):
    return [(n, p) for n, p in model.named_parameters() if "layers.0.mlp.experts" in n and p.requires_grad]


def test_nothing_stays_behind_on_the_module():
    """Neither after calls, nor after one that fails: PEFT's own proxies were known to stack."""
    model = adapted()
    switch(model, "fastexperts")
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    for _ in range(3):
        model(tokens())
        assert take_update(experts, "gate_up_proj") is None
        assert take_update(experts, "down_proj") is None
        assert not hasattr(experts, "parametrizations")
    handle = experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    handle.remove()
    assert take_update(experts, "gate_up_proj") is None


def test_a_forward_that_reads_no_adapter_is_refused():
    """As Liger's experts are put in as training begins, long after the config said fastexperts."""
    model = adapted()
    _, wanted = run(model, "eager")
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    experts.forward = MethodType(type(experts).forward.__wrapped__, experts)
    with pytest.raises(FastexpertsError, match=r"without reading .* gate_up_proj.*use_liger"):
        run(model, "fastexperts")
    assert take_update(experts, "gate_up_proj") is None
    _, folded = run(model, "eager")  # the way out
    assert_close(folded, wanted)


def test_modules_to_save_train_beside_it():
    model = adapted(modules_to_save=["lm_head"])
    _, got = run(model, "fastexperts")
    _, wanted = run(model, "eager")
    assert any("modules_to_save" in name for name in got)
    assert_close(got, wanted)


def test_a_saved_adapter_loads_in_stock_peft(tmp_path):
    model = adapted()
    switch(model, "fastexperts")
    with torch.no_grad():
        wanted = model(tokens()).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe"), experts_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert relative(loaded(tokens()).logits, wanted) <= 1e-5


@pytest.mark.parametrize("wrong", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_peft_refuses_on_experts_stays_refused(wrong):
    with pytest.raises(ValueError, match="does not work with"):
        adapted(**wrong)


def test_a_layer_on_another_implementation_keeps_pefts_fold():
    model = adapted()
    ops, got = run(model, "grouped_mm")
    assert "aten::baddbmm" in ops.names
    _, wanted = run(model, "fastexperts")
    assert_close(got, wanted)


def test_registering_twice_wraps_once():
    from peft.tuners.lora.layer import ParamWrapper

    fastexperts.register()
    first = ParamWrapper._activate_lora
    fastexperts.register()
    assert ParamWrapper._activate_lora is first


def test_the_families_are_among_the_tiny_ones():
    assert set(FAMILIES) <= set(TINY)
