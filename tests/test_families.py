"""Every family of transformers' experts interface: the numbers of its own eager experts, however it trains.

The outcomes are the cells of docs/support.md (`make support`).
"""

import re
from pathlib import Path

import pytest
import torch
import transformers
from families import DECORATOR, cases, experts_of, outputs, step, tiny_family
from spies import spy_backend
from support_hf import Ops, assert_close, outputs_and_gradients, relative
from support_matrix import cell
from torch import nn

import fastexperts
from fastexperts.hf.lora import lora_summary

FAST = (
    "aria", "deepseek_v4", "ernie4_5_vl_moe", "gemma4", "gpt_oss", "inkling2", "minimax_m3_vl", "muse_spark",
    "nemotron_h", "qwen3_moe",
)  # fmt: skip
"""Families whose every test is in the fast lane: each layout and activation once."""

PLAIN = {"AriaExperts", "BeamExperts"}
"""Of the special classes those that compute plain SwiGLU all the same: another layout, a gate in fp32."""

NO_GRADIENT = {"DiffusionGemmaTextExperts": 1}
"""Modules whose output trains nothing: in the encoder's last layer, whose keys and values alone are read."""

ONCE = {"DiffusionGemmaTextExperts": 2}
"""Modules that checkpointing does not run twice: those of an encoder whose cache is read."""

SHARES_WEIGHTS = {"DiffusionGemmaTextExperts"}
"""Encoder and decoder have the same weights, and an adapter each: no sum is both."""

every_case = pytest.mark.parametrize("case", cases(), ids=str)
every_case_slow_but_a_few = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.family in FAST else pytest.mark.slow) for case in cases()],
    ids=str,
)


@pytest.fixture
def tiny(record_property):
    """`tiny(case, column)`: a tiny model on eager experts, for the test that fills this cell."""

    def make(case, column):
        cell(record_property, column, case.family, case.experts)
        model = tiny_family(case)
        record_property("model", type(model).__name__)
        return model

    return make


@pytest.fixture
def serve(record_property):
    """`serve(model, case)`: switches every experts module and says how many."""

    def switch(model, case):
        summary = fastexperts.enable(model, verbose=False)
        assert {row.name for row in summary.served} == experts_of(model, case).keys()
        assert not summary.not_served
        (activation,) = {row.activation for row in summary.served}
        record_property("activation", activation)
        return len(summary.served)

    return switch


def weights_of(model, case):
    """The names of the experts' weights in each experts module."""
    return [
        f"{name}.{weight}"
        for name, module in experts_of(model, case).items()
        for weight in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    ]


def first_layer(model, case):
    """(the first experts module that runs, what it is called with)"""
    seen = []
    modules = experts_of(model, case).values()
    hooks = [module.register_forward_pre_hook(lambda *call: seen.append(call)) for module in modules]
    outputs(model)
    for hook in hooks:
        hook.remove()
    module, inputs = seen[0]
    return module, tuple(tensor.detach() for tensor in inputs)


def plain_experts(module, x_TD, ids_TK, weight_TK):
    """Experts with SiLU and the weights of `module` in its layout, and nothing else that it may have."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    w1_EGD, w2_EDF = (
        w.mT if module.is_transposed else w for w in (getattr(module, up_name), module.down_proj)
    )
    h_TKG = torch.einsum("td,tkgd->tkg", x_TD, w1_EGD[ids_TK])
    a_TKF = nn.functional.silu(h_TKG)
    if module.has_gate:
        interleaved = (h_TKG[..., 0::2], h_TKG[..., 1::2])
        gate_TKF, up_TKF = h_TKG.chunk(2, dim=-1) if module.is_concatenated else interleaved
        a_TKF = nn.functional.silu(gate_TKF) * up_TKF
    return torch.einsum("tk,tkf,tkdf->td", weight_TK, a_TKF, w2_EDF[ids_TK])


@every_case
def test_output_and_every_gradient(case, tiny, serve):
    model = tiny(case, "full")
    wanted = step(model)
    served = serve(model, case)
    with Ops() as ops:
        got = step(model)
    assert ops.names.count("fastexperts::moe_mlp") == served
    tied_once = dict(model.named_parameters()).keys()
    assert wanted.keys() >= tied_once & set(weights_of(model, case))
    assert_close(got, wanted)


@pytest.mark.parametrize("case", [case for case in cases() if case.special], ids=str)
def test_what_sets_a_family_apart_shows_in_its_tiny_model(case):
    """Biases, norms, clamps, caps: plain experts of the same weights are far off, so that tests see them."""
    model = tiny_family(case)
    module, inputs = first_layer(model, case)
    with torch.no_grad():
        wanted, got = module(*inputs), plain_experts(module, *inputs)
    if case.experts in PLAIN:
        assert relative(got, wanted) <= 1e-5
    else:
        assert relative(got, wanted) > 1e-2


@every_case_slow_but_a_few
def test_lora(case, tiny, serve):
    peft = pytest.importorskip("peft")
    model = tiny(case, "LoRA")
    targets = weights_of(model, case)
    # target_modules: PEFT adds its default ones of some families, where it has a say
    config = peft.LoraConfig(target_parameters=targets, target_modules=[], r=4, lora_alpha=6)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)  # B starts at zero, and so would the gradients of A
    with Ops() as stock:
        wanted = step(model)
    served = serve(model, case)
    with Ops() as ops:
        got = step(model)
    assert ops.names.count("fastexperts::moe_mlp") == served
    folds = stock.names.count("aten::baddbmm") - ops.names.count("aten::baddbmm")
    assert folds >= len(targets), "PEFT's folded weights were built"
    assert len(wanted) == 1 + 2 * len(targets) - 4 * NO_GRADIENT.get(case.experts, 0)
    assert_close(got, wanted)


@every_case
def test_lora_config_finds_the_experts_and_the_attention(case):
    pytest.importorskip("peft")
    model = tiny_family(case)
    rows = lora_summary(model, r=4).rows
    assert {row.name for row in rows if row.kind == "experts"} == set(weights_of(model, case))
    attention = [row.name for row in rows if row.kind == "attention"]
    assert attention
    modules = dict(model.named_modules())
    for name in attention:
        above = name.split(".")
        owners = {type(modules[".".join(above[:depth])]).__name__ for depth in range(1, len(above))}
        assert any(re.search("Atten|Attn|Delta|KDA", owner) for owner in owners), name


@every_case_slow_but_a_few
def test_a_lora_config_fits_the_forward(case):
    """Beside each adapted weight, and as the sum that an export writes."""
    peft = pytest.importorskip("peft")
    model = tiny_family(case)
    with torch.no_grad():
        plain = outputs(model)
        model = peft.get_peft_model(model, fastexperts.lora_config(model, r=2, verbose=False))
        assert relative(outputs(model), plain) <= 1e-6, "nothing is added at first"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        beside = outputs(model)
        if case.experts in SHARES_WEIGHTS:
            return
        model.merge_adapter()
        assert relative(outputs(model), beside) <= 1e-4 < relative(plain, beside)


@every_case_slow_but_a_few
def test_checkpointing(case, tiny, serve):
    model = tiny(case, "checkpointing")
    if not model.supports_gradient_checkpointing:
        pytest.skip(f"{type(model).__name__} does not support gradient checkpointing")
    wanted = step(model)
    served = serve(model, case)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with Ops() as ops:
        got = step(model)
    assert ops.names.count("fastexperts::moe_mlp") == 2 * served - ONCE.get(case.experts, 0)
    assert_close(got, wanted)


@every_case_slow_but_a_few
def test_compiled_experts(case, tiny, serve):
    model = tiny(case, "compile")
    module, (x_TD, ids_TK, weight_TK) = first_layer(model, case)
    inputs = x_TD.requires_grad_(), ids_TK, weight_TK.requires_grad_()
    wanted = outputs_and_gradients(module, module, inputs)
    serve(model, case)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with spy_backend() as calls:  # no dispatch mode: torch.compile takes none
        got = outputs_and_gradients(compiled, module, inputs)
    assert {"up", "down"} <= {name for _, name, _ in calls}
    assert_close(got, wanted)


@every_case_slow_but_a_few
def test_export(case, tiny, serve, tmp_path):
    model = tiny(case, "export")
    serve(model, case)
    with torch.no_grad():
        wanted = outputs(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, experts_implementation="fastexperts", dtype=torch.float32)
    with torch.no_grad(), Ops() as ops:
        got = outputs(again.train())
    assert "fastexperts::moe_mlp" in ops.names
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert relative(got, wanted) <= 1e-6  # zaya's loaded tensors lie otherwise in memory: the last bit


def test_the_walk_misses_no_class():
    """Against a count of the decorator's lines, and against what the decorator leaves on a class."""
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    lines = sum(len(re.findall(rf"^@{DECORATOR}\b", path.read_text(), re.MULTILINE)) for path in sources)
    assert len(cases()) == len({case.experts for case in cases()}) == lines > 40


def test_most_of_the_fast_families_are_in_any_transformers():
    assert len(set(FAST) & {case.family for case in cases()}) >= 5
