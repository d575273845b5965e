"""fastexperts.hf.experts: what is registered, honoured, kept for backward, and refused."""

import copy
import importlib
import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as nnf
from spies import spy_backend
from support_hf import (
    Ops,
    assert_close,
    layer_inputs,
    outputs_and_gradients,
    relative,
    saved_for_backward,
    tiny_config,
    tiny_model,
    toy_experts,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)

import fastexperts
from fastexperts.activations import SWIGLU
from fastexperts.errors import FastexpertsError
from fastexperts.hf import experts
from fastexperts.hf.gate import activation_of

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


def test_register_is_idempotent_and_fills_both_registries():
    fastexperts.register()
    assert ALL_EXPERTS_FUNCTIONS["fastexperts"] is experts.experts_forward
    assert finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS["fastexperts"] is experts.fp8_experts_forward


def test_importing_registers_nothing():
    """No import side effects: the name is valid after register() and not before."""
    code = (
        "import fastexperts, fastexperts.hf.experts\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions\n"
        "assert 'fastexperts' not in functions\n"
        "fastexperts.register()\n"
        "assert 'fastexperts' in functions"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("package", "found", "needed"),
    [
        ("transformers", "5.16.2", "5.17"),
        ("transformers", "4.57.0", "5.17"),
        ("torch", "2.10.1+cu128", "2.11"),
    ],
)
def test_a_version_that_is_too_old_is_named(monkeypatch, package, found, needed):
    monkeypatch.setattr(importlib.import_module(package), "__version__", found)
    with pytest.raises(FastexpertsError, match=FORM) as error:
        fastexperts.register()
    for text in (package, found, needed, "pip install"):
        assert text in str(error.value)


@pytest.mark.parametrize("found", ["5.17.0", "5.17.0.dev0", "5.100.0rc1", "6.0"])
def test_a_version_that_is_new_enough_passes(monkeypatch, found):
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", found)
    fastexperts.register()


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        FastexpertsError, match=r"`transformers` got .+; it needs transformers >= 5\.17\. .*pip install"
    ):
        fastexperts.register()


def test_trl_passes_the_name_on(tmp_path):
    """What SFTTrainer does with model_init_kwargs={"experts_implementation": "fastexperts"}."""
    trl_utils = pytest.importorskip("trl.trainer.utils")
    AutoModelForCausalLM.from_config(tiny_config("qwen3_moe")).save_pretrained(tmp_path)
    model = trl_utils.create_model_from_path(str(tmp_path), experts_implementation="fastexperts")
    assert model.config._experts_implementation == "fastexperts"
    with Ops() as ops:
        model(torch.tensor([[5, 6, 7]]))
    assert ops.names.count("fastexperts::moe_mlp") == 2


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def interleaved(self, gate_up):
    return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


LAYOUTS = {
    "canonical": {},
    "clamped": {"gate": clamped, "values": {"limit": 0.5}},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False, "gate": interleaved},
    "transposed and interleaved": {"is_concatenated": False, "is_transposed": True, "gate": interleaved},
    "not gated": {"has_gate": False, "act_fn": nn.ReLU()},
    "not gated, transposed": {"has_gate": False, "is_transposed": True},
    "odd dims": {"hidden": 13, "intermediate": 7, "experts": 3},
    "biases": {"has_bias": True},
    "biases, not gated": {"has_bias": True, "has_gate": False},
    "as gpt_oss": {"has_bias": True, "is_concatenated": False, "is_transposed": True, "gate": interleaved},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flags_are_honoured(layout):
    """Against transformers' batched_mm, which reads every flag."""
    module = toy_experts(**LAYOUTS[layout])
    inputs = layer_inputs(module)
    with Ops() as ops:
        got = outputs_and_gradients(module, module, inputs)
    reference = outputs_and_gradients(lambda *args: batched_mm_experts_forward(module, *args), module, inputs)
    assert_close(got, reference)
    assert "fastexperts::moe_mlp" in ops.ours()


def test_a_transposed_gradient_has_the_strides_of_its_parameter():
    module = toy_experts(is_transposed=True)
    grads = outputs_and_gradients(module, module, layer_inputs(module))
    assert grads["gate_up_proj"].stride() == module.gate_up_proj.stride()
    assert grads["down_proj"].stride() == module.down_proj.stride()


def test_a_norm_after_each_expert():
    """Against transformers' grouped_mm: batched_mm in transformers 5.17 knows no such norm."""
    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        pytest.skip("this transformers has no norm after an expert")
    module = toy_experts(has_post_expert_norm=True)
    inputs = layer_inputs(module)
    with Ops() as ops:
        got = outputs_and_gradients(module, module, inputs)
    reference = outputs_and_gradients(lambda *args: grouped_mm_experts_forward(module, *args), module, inputs)
    assert "post_expert_norm.weight" in got
    assert_close(got, reference)
    assert "fastexperts::moe_mlp" in ops.ours()


def test_a_flag_that_we_do_not_know_is_refused(monkeypatch):
    """As a newer transformers may bring one."""
    monkeypatch.setattr(experts, "_new_flags", lambda: {"has_dropout"})
    module = toy_experts(values={"has_dropout": False})
    module(*layer_inputs(module))
    module.has_dropout = True
    with pytest.raises(FastexpertsError, match=FORM) as error:
        module(*layer_inputs(module))
    assert "has_dropout" in str(error.value)


def test_every_flag_of_this_transformers_is_known():
    assert not experts._new_flags()


def test_sentinels_of_expert_parallelism_add_nothing():
    module = toy_experts(experts=3)
    module._is_expert_parallel = True
    x_TD, _, weight_TK = layer_inputs(module, top_k=3)
    weight_TK = torch.rand(33, 6, requires_grad=True)  # K = 6 > 3 local experts
    ids_TK = torch.randint(0, 4, (33, 6))
    masked = torch.where(ids_TK < 3, weight_TK, 0).detach().requires_grad_()
    got = outputs_and_gradients(module, module, (x_TD, ids_TK, weight_TK))
    reference = outputs_and_gradients(
        lambda *args: batched_mm_experts_forward(module, *args), module, (x_TD, ids_TK, masked)
    )
    assert not got["weight"][ids_TK == 3].any()
    reference["weight"] = reference["weight"].where(
        ids_TK < 3, 0
    )  # transformers < 5.23 clamps the sentinel's id
    assert_close(got, reference)


def test_more_choices_than_experts_need_expert_parallelism():
    module = toy_experts(experts=3)
    if not hasattr(module, "_is_expert_parallel"):
        pytest.skip("transformers < 5.23 does not say whether experts are parallel")
    with pytest.raises(FastexpertsError, match="top-k"):
        module(torch.randn(4, 16), torch.zeros(4, 5, dtype=torch.long), torch.rand(4, 5))


def test_only_our_ops_run():
    module = toy_experts()
    inputs = layer_inputs(module)
    with Ops() as forward:
        out = module(*inputs)
    with Ops() as backward:
        out.square().sum().backward()
    assert forward.ours() == {"fastexperts::moe_mlp"}
    views = {"aten::unflatten", "aten::view", "aten::transpose", "aten::detach", "aten::alias"}
    assert set(forward.names) - forward.ours() <= views
    assert backward.ours() == {"fastexperts::moe_mlp_backward"}
    products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::linear", "aten::_grouped_mm"}
    assert not products & set(forward.names + backward.names)


@pytest.mark.parametrize(
    ("frozen", "runs"),
    [
        (("gate_up_proj", "down_proj"), ["dh", "dx", "combine"]),
        (("gate_up_proj",), ["dh", "dw", "dx", "combine"]),
        (("x",), ["dh", "dw", "dw"]),
    ],
)
def test_a_gradient_that_nobody_asked_for_is_not_computed(frozen, runs):
    module = toy_experts()
    x_TD, ids_TK, weight_TK = layer_inputs(module)
    for name, tensor in {"x": x_TD, **dict(module.named_parameters())}.items():
        tensor.requires_grad_(name not in frozen)
    out = module(x_TD, ids_TK, weight_TK)
    with spy_backend() as calls:
        out.sum().backward()
    assert [name for _, name, _ in calls] == runs


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_kept_for_backward_is_x_h_weights_and_routing(autocast):
    module = toy_experts()
    activation_of(module)
    x_TD, ids_TK, weight_TK = layer_inputs(module)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), saved_for_backward() as saved:
        module(x_TD, ids_TK, weight_TK)
    # without an update nothing is kept of one: two empty tensors
    floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel()]
    h_PG = [tensor for tensor in floats if tensor.shape == (33 * 2, 2 * 12)]
    assert [tensor.dtype for tensor in h_PG] == [torch.bfloat16 if autocast else torch.float32]
    references = {x_TD, weight_TK, module.gate_up_proj, module.down_proj}
    kept = {tensor.data_ptr() for tensor in floats if tensor is not h_PG[0]}
    assert kept == {tensor.data_ptr() for tensor in references}, "references to what exists, no copies"
    assert len(floats) == 5
    integers = [tensor for tensor in saved if not tensor.is_floating_point()]
    assert len(integers) == 4
    assert sum(tensor.numel() for tensor in integers) <= 2 * 66 + 6 + 2 * (1 + 66), "no more than the routing"


def test_autocast_keeps_the_dtypes_of_eager_and_its_error():
    """fp32 weights under bf16 autocast, TRL's default, by the bf16 rule of numerics.md against fp64."""
    module = toy_experts(hidden=64, intermediate=48)
    x_TD, ids_TK, weight_TK = layer_inputs(module, tokens=129)

    def plain(x_TD, ids_TK, weight_TK):
        out_TD = torch.zeros_like(x_TD)
        for e in range(module.num_experts):
            t, k = torch.where(ids_TK == e)
            gate, up = nnf.linear(x_TD[t], module.gate_up_proj[e]).chunk(2, dim=-1)
            y = nnf.linear(nnf.silu(gate) * up, module.down_proj[e]) * weight_TK[t, k, None]
            out_TD = out_TD.index_add(0, t, y.to(out_TD.dtype))
        return out_TD

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outputs_and_gradients(module, module, (x_TD, ids_TK, weight_TK))
        eager = outputs_and_gradients(plain, module, (x_TD, ids_TK, weight_TK))
    exact_inputs = (
        x_TD.detach().double().requires_grad_(),
        ids_TK,
        weight_TK.detach().double().requires_grad_(),
    )
    exact = outputs_and_gradients(plain, module.double(), exact_inputs)
    for name, wanted in exact.items():
        assert got[name].dtype == eager[name].dtype == torch.float32
        floor = 2**-8 if name == "weight" else 2**-9
        assert relative(got[name], wanted) <= 2 * max(relative(eager[name], wanted), floor), name
    assert relative(got["out"], exact["out"]) > 2**-12, "the products ran in bf16"


def test_peft_parametrized_weights_are_read_folded():
    peft = pytest.importorskip("peft")
    config = tiny_config("qwen3_moe")
    model = AutoModelForCausalLM.from_config(config, experts_implementation="fastexperts")
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=4)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 97, (2, 9))

    def run(implementation):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        with Ops() as ops:
            logits = model(ids).logits
            logits.logsumexp(-1).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in trained)
        return ops, {"logits": logits.detach(), **trained}

    ops, got = run("fastexperts")
    _, reference = run("eager")
    assert ops.names.count("fastexperts::moe_mlp") == 2
    assert_close(got, reference)


def fp8_module():
    return toy_experts_named("FP8Experts")


def toy_experts_named(name):
    module = toy_experts()
    type(module).__name__ = name
    return module


class _Wrapper(torch.Tensor):
    """A tensor subclass such as torchao's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *args):
        return _Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # what nn.Parameter does
            return _Wrapper(args[0].inner)
        raise AssertionError(f"{func} reached the tensor")


def with_weight(name, make):
    def build():
        module = toy_experts()
        value = nn.Parameter(make(getattr(module, name).detach()), requires_grad=False)
        module.register_parameter(name, value)
        return module

    return build


REFUSED = {
    "int8 weights": (with_weight("down_proj", lambda w: w.to(torch.int8)), "int8"),
    "fp8 weights": (with_weight("gate_up_proj", lambda w: w.to(torch.float8_e4m3fn)), "float8"),
    "tensor subclass": (with_weight("gate_up_proj", _Wrapper), "_Wrapper"),
    "2-D weights": (with_weight("down_proj", lambda w: w.flatten(0, 1)), "dimensions"),
    "another hidden dim": (with_weight("down_proj", lambda w: w[:, :-1]), "dim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case):
    build, named = REFUSED[case]
    module = build()
    with pytest.raises(FastexpertsError, match=FORM) as error:
        module(*layer_inputs(module))
    assert named in str(error.value)


@pytest.mark.parametrize("allow_unsupported", [False, True])
def test_enable_refuses_a_tensor_subclass(allow_unsupported):
    model = tiny_model("qwen3_moe", "eager")
    module = model.model.layers[1].mlp.experts
    module.down_proj = nn.Parameter(_Wrapper(module.down_proj.detach()), requires_grad=False)
    # one config for both layers: neither can be switched
    with pytest.raises(FastexpertsError, match="none of whose experts can be served") as error:
        fastexperts.enable(model, allow_unsupported=allow_unsupported)
    reason = str(error.value)
    assert "Qwen3MoeExperts: `down_proj` got a _Wrapper; it needs a plain tensor" in reason
    assert "Load the model dequantised" in reason
    assert module.config._experts_implementation == "eager"


def test_fp8_experts_are_refused_with_the_way_out():
    class Config:
        hidden_size, num_local_experts, moe_intermediate_size, hidden_act = 128, 4, 128, "silu"
        _experts_implementation = "fastexperts"

    cls = finegrained_fp8.use_experts_implementation(
        experts_class=type("FP8Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    module = cls(Config(), block_size=(128, 128))
    with pytest.raises(FastexpertsError, match=FORM) as error:
        module(torch.randn(3, 128), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
    assert "dequantize=True" in str(error.value)
    with pytest.raises(FastexpertsError, match="FP8"):
        experts.check_served(module)


def test_a_module_without_the_weights_is_refused():
    module = toy_experts()
    del module.down_proj
    with pytest.raises(FastexpertsError, match="`down_proj` got no such parameter"):
        experts.check_served(module)


def test_a_deep_copy_serves_as_well():
    module = toy_experts(gate=clamped, values={"limit": 7.0})
    module(*layer_inputs(module))
    twin = copy.deepcopy(module)
    twin.limit = 3.0
    assert (activation_of(module), activation_of(twin)) == (
        replace(SWIGLU, limit=7.0),
        replace(SWIGLU, limit=3.0),
    )
