"""fastexperts.hf.gate: rows are found by numbers, gates without one refused, changed ones compared again."""

import copy
import math
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from support_hf import assert_close, layer_inputs, outputs_and_gradients, tiny_model, tokens, toy_experts
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward

import fastexperts
from fastexperts.activations import ACTIVATIONS, GPT_OSS, SWIGLU, Activation
from fastexperts.hf.gate import activation_of, checked_gate, find_activation

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def scaled(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def scaled_interleaved(self, gate_up):
    return scaled(self, torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=-1))


def softcapped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    linear = self.gate_softcap * torch.tanh(gate / self.gate_softcap)
    return linear * torch.sigmoid(gate) * self.up_softcap * torch.tanh(up / self.up_softcap)


def in_fp32(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


@pytest.mark.parametrize(
    ("module", "row"),
    [
        (toy_experts, SWIGLU),
        (lambda: toy_experts(ACT2FN["gelu"]), ACTIVATIONS["geglu"]),
        (lambda: toy_experts(ACT2FN["gelu_python"]), ACTIVATIONS["geglu"]),
        (lambda: toy_experts(ACT2FN["gelu_pytorch_tanh"]), ACTIVATIONS["geglu_tanh"]),
        (lambda: toy_experts(ACT2FN["gelu_new"]), ACTIVATIONS["geglu_tanh"]),
        (lambda: toy_experts(ACT2FN["quick_gelu"]), Activation("silu", alpha=1.702)),
        (lambda: toy_experts(ACT2FN["relu"]), ACTIVATIONS["reglu"]),
        (lambda: toy_experts(ACT2FN["relu2"], has_gate=False), ACTIVATIONS["relu2"]),
        (lambda: toy_experts(ACT2FN["silu"], has_gate=False), ACTIVATIONS["silu"]),
        (lambda: toy_experts(gate=in_fp32), SWIGLU),
        (lambda: toy_experts(gate=clamped, values={"limit": 10.0}), replace(SWIGLU, limit=10.0)),
        (lambda: toy_experts(gate=clamped, values={"limit": 200}), replace(SWIGLU, limit=200.0)),
        (lambda: toy_experts(gate=scaled, values={"limit": 7.0, "alpha": 1.702}), GPT_OSS),
        (
            lambda: toy_experts(gate=scaled, values={"limit": 5.0, "alpha": 1.5}),
            replace(GPT_OSS, alpha=1.5, limit=5),
        ),
        (
            lambda: toy_experts(
                gate=scaled_interleaved, is_concatenated=False, values={"limit": 7.0, "alpha": 1.702}
            ),
            replace(GPT_OSS, interleaved=True),
        ),
        (
            lambda: toy_experts(gate=softcapped, values={"gate_softcap": 3.0, "up_softcap": 5.0}),
            replace(SWIGLU, gate_cap=3.0, up_cap=5.0),
        ),
    ],
)
def test_the_row_that_equals_the_gate_is_found(module, row):
    assert find_activation(module()) == row


def swapped(self, gate_up):
    up, gate = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


def hard_limit(limit):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=limit)) * up

    return gate


def straight_through(self, gate_up):
    """The right value, a wrong derivative."""
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up.detach() + (up - up.detach())


def softcap(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.tanh(gate / 30) * 30 * torch.sigmoid(gate) * up


def clamp_of_gate_alone(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up


def clamp_after_activation(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (swapped, r"deviates by .+ at gate -?\d.*, up -?\d"),
        (lambda self, h: 1.002 * self.act_fn(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], "deviates by"),
        (lambda self, h: self.act_fn(h[..., ::2]) * h[..., 1::2], "deviates by"),
        (lambda self, h: self.act_fn(h.chunk(2, -1)[0]), "deviates by"),
        (lambda self, h: self.act_fn(h.chunk(2, -1)[0]) * (h.chunk(2, -1)[1] + 0.5), "deviates by"),
        (lambda self, h: torch.zeros_like(h.chunk(2, -1)[0]).mul(h.sum()), "deviates by"),
        (lambda self, h: torch.full_like(h.chunk(2, -1)[0], math.nan) * h.sum(), "deviates by"),
        (straight_through, r"\(derivative\)"),
        (softcap, "deviates by"),
        (hard_limit(7.0), "deviates by"),
        (hard_limit(29.9), "deviates by"),
        (hard_limit(500.0), "deviates by"),
        (clamp_of_gate_alone, "deviates by"),
        (clamp_after_activation, "deviates by"),
        (lambda self, h: h, "shape"),
        (lambda self, h: h @ torch.ones(3, 3), "RuntimeError"),
        (lambda self, h: self.not_there, "AttributeError"),
    ],
)
def test_a_gate_that_no_row_equals_is_refused(gate, message):
    module = toy_experts(gate=gate, values={"limit": 9.0})
    with pytest.raises(fastexperts.FastexpertsError, match=message) as error:
        module(*layer_inputs(module))
    assert "ToyExperts._apply_gate" in str(error.value)
    assert "grouped_mm" in str(error.value), "the way out"


@pytest.mark.parametrize("act_fn", ["tanh", "relu6", "mish", "gelu_10", "leaky_relu"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_an_activation_without_a_row_is_refused(act_fn, has_gate):
    module = toy_experts(ACT2FN[act_fn], has_gate=has_gate)
    with pytest.raises(fastexperts.FastexpertsError, match=FORM):
        module(*layer_inputs(module))


def test_the_rows_that_we_ship_are_told_apart():
    rows = [*ACTIVATIONS.values(), *(replace(SWIGLU, limit=limit) for limit in (7.0, 7.01, 10.0))]
    for row in rows:
        module = toy_experts(
            gate=lambda self, h, row=row: row.forward(h),
            act_fn=_Row(row),
            has_gate=row.gated,
            values={"limit": row.limit, "alpha": row.alpha},
        )
        assert find_activation(module) == row


class _Row(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, h):
        return self.row.forward(h)


def test_an_instance_value_changed_after_the_first_call_is_compared_again():
    module = toy_experts(gate=clamped, values={"limit": 1.0})
    inputs = layer_inputs(module)
    first = outputs_and_gradients(module, module, inputs)
    module.limit = 0.25
    second = outputs_and_gradients(module, module, inputs)
    assert not torch.equal(first["out"], second["out"])
    reference = outputs_and_gradients(lambda *args: batched_mm_experts_forward(module, *args), module, inputs)
    assert_close(second, reference)


def test_a_gate_patched_after_the_first_call_is_compared_again():
    module = toy_experts()
    inputs = layer_inputs(module)
    module(*inputs)
    type(module)._apply_gate = swapped
    with pytest.raises(fastexperts.FastexpertsError, match="no Activation equals"):
        module(*inputs)


def test_a_gate_patched_on_the_instance_is_compared_again():
    module = toy_experts()
    inputs = layer_inputs(module)
    module(*inputs)
    module._apply_gate = lambda h: swapped(module, h)
    with pytest.raises(fastexperts.FastexpertsError, match="no Activation equals"):
        module(*inputs)


@pytest.mark.parametrize("change", ["replaced", "value", "forward"])
def test_a_changed_act_fn_is_compared_again(change):
    module = toy_experts(nn.Softplus(beta=1.0) if change == "value" else nn.SiLU(), gate=silu_times_up)
    if change == "value":
        module.act_fn = _Power()
    assert activation_of(module) == SWIGLU
    if change == "replaced":
        module.act_fn = nn.GELU()
        assert activation_of(module) == ACTIVATIONS["geglu"]
    elif change == "value":
        module.act_fn.scale = 2.0
        with pytest.raises(fastexperts.FastexpertsError, match="no Activation equals"):
            activation_of(module)
    else:
        module.act_fn.forward = nnf.relu
        assert activation_of(module) == ACTIVATIONS["reglu"]


def read_as(how):
    """A gate that takes `self.scale`, however it likes, for a constant."""

    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return how(self.scale) * self.act_fn(gate) * up

    return gate


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # what float() says
@pytest.mark.parametrize(
    "how",
    [
        lambda t: t,
        lambda t: t.item(),
        float,
        lambda t: t.data,
        lambda t: t.detach().double(),
        lambda t: t > 0,
    ],
)
@pytest.mark.parametrize("kind", ["parameter", "buffer", "tensor"])
def test_a_gate_that_reads_a_tensor_is_refused(kind, how):
    """Also where it equals a row today: the tensor would get no gradient, and change unseen."""
    module = toy_experts(gate=read_as(how), values={"scale": 1.0})
    del module.scale
    one = torch.tensor(1.0)
    module.scale = {"parameter": nn.Parameter(one), "buffer": nn.Buffer(one), "tensor": one}[kind]
    message = "that is no parameter" if kind == "tensor" else f"reads the {kind} scale; "
    with pytest.raises(fastexperts.FastexpertsError, match=message) as error:
        module(*layer_inputs(module))
    assert re.fullmatch(FORM, str(error.value).partition(": ")[2])


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * nnf.silu(x)


@pytest.mark.parametrize("has_gate", [True, False])
def test_an_act_fn_with_a_parameter_is_refused(has_gate):
    module = toy_experts(_Scaled(), has_gate=has_gate)
    with pytest.raises(fastexperts.FastexpertsError, match=r"reads the parameter act_fn\.scale"):
        module(*layer_inputs(module))


def test_a_gate_may_make_tensors_of_its_own():
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        ones = torch.tensor(1.0) * gate.new_tensor(1.0) * torch.ones_like(up[0])[None]
        return self.act_fn(gate) * up * ones

    assert find_activation(toy_experts(gate=gate)) == SWIGLU


def times(factor_of):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return factor_of(self) * self.act_fn(gate) * up

    return gate


class _Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = _Power()

    def forward(self, x):
        return self.inner(x)


CHANGES = {
    "a value of the config": (lambda m: m.config.factor, lambda m: setattr(m.config, "factor", 2.0)),
    "a dict of the config": (
        lambda m: m.config.factors["gate"],
        lambda m: m.config.factors.update(gate=2.0),
    ),
    "a number of NumPy's": (lambda m: float(m._double), lambda m: setattr(m, "_double", np.float64(2.0))),
    "a list": (lambda m: m.factors[0], lambda m: m.factors.insert(0, 2.0)),
    "a private value": (lambda m: m._factor, lambda m: setattr(m, "_factor", 2.0)),
    "a number that becomes a tensor": (
        lambda m: m._factor,
        lambda m: setattr(m, "_factor", torch.tensor(1.0)),
    ),
    "a value deep in act_fn": (lambda m: 1.0, lambda m: setattr(m.act_fn.inner, "scale", 2.0)),
    "a module of another class in act_fn": (lambda m: 1.0, lambda m: setattr(m.act_fn, "inner", nn.GELU())),
    "the mode": (lambda m: 2.0 if m.training else 1.0, lambda m: m.train()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_the_gate_reads_is_compared_again_when_it_changes(what):
    factor_of, change = CHANGES[what]
    values = {"factors": [1.0], "_factor": 1.0, "_double": np.float64(1.0)}
    module = toy_experts(_Outer(), gate=times(factor_of), values=values).eval()
    module.config.factor, module.config.factors = 1.0, {"gate": 1.0}
    assert activation_of(module) == SWIGLU
    change(module)
    if "another class" in what:
        assert activation_of(module) == ACTIVATIONS["geglu"]
        return
    with pytest.raises(fastexperts.FastexpertsError, match=r"no Activation equals|reads a tensor"):
        activation_of(module)


def silu_times_up(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


class _Power(nn.Module):
    scale: float

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return self.scale * nnf.silu(x)


def test_the_comparison_runs_once(monkeypatch):
    from fastexperts.hf import gate

    ran = []
    monkeypatch.setattr(gate, "find_activation", lambda module: ran.append(module) or find_activation(module))
    module = toy_experts()
    for _ in range(3):
        module(*layer_inputs(module))
    assert ran == [module]


def test_the_comparison_runs_once_for_training_and_once_for_eval(monkeypatch):
    """Whatever runs in turns: as DPO, evaluation and generation have it, with adapters on and off."""
    from peft import get_peft_model

    from fastexperts.hf import gate

    ran = []
    monkeypatch.setattr(gate, "find_activation", lambda module: ran.append(module) or find_activation(module))
    model = tiny_model("qwen3_moe", "fastexperts", num_hidden_layers=1)
    model = get_peft_model(model, fastexperts.lora_config(model, r=2, verbose=False))
    with torch.no_grad():
        for _ in range(2):
            for mode in (model.train, model.eval):
                mode()(tokens())
                with model.disable_adapter():
                    model(tokens())
    assert len(ran) == 2


def test_a_copied_or_pickled_module_is_compared_again():
    module = toy_experts()
    checked = checked_gate(module)
    assert pickle.loads(pickle.dumps(checked)) is None
    twin = copy.deepcopy(module)
    assert twin.__dict__["_fastexperts_checked_gate"] is None
    assert checked_gate(twin).activation == checked.activation


def test_the_comparison_leaves_no_trace_in_the_first_forward():
    """A fresh module under a selective checkpoint that keeps products: one op more would shift them all."""

    def policy(ctx, op, *args, **kwargs):
        keep = "mul" in op.name() or "fastexperts" in op.name()
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    module = toy_experts()
    inputs = layer_inputs(module)

    def run(*args):
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(lambda *a: 2 * module(*a) * 0.5, *args, use_reentrant=False, context_fn=contexts)

    fresh = outputs_and_gradients(run, module, inputs)
    reference = outputs_and_gradients(lambda *args: batched_mm_experts_forward(module, *args), module, inputs)
    assert_close(fresh, reference)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),
    ],
)
def test_the_first_comparison_may_run_in_any_context(context):
    module = toy_experts(gate=clamped, values={"limit": 7.0})
    with context():
        assert activation_of(module) == replace(SWIGLU, limit=7.0)
