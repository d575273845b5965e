"""The parts of a step: each is found by numbers and computes what the class does, or is refused."""

import copy
import pickle
from types import FunctionType

import pytest
import torch
from support_hf import assert_close, relative, tiny_model, tokens
from support_liger import run_liger, step
from torch import nn

from fastexperts.errors import FastexpertsError
from fastexperts.hf import liger, loss, norms, rotary, swiglu


@pytest.fixture
def device(monkeypatch):
    return run_liger(monkeypatch)


class Norm(nn.Module):
    """An RMS norm of our own, `formula` of (its rows in fp32, its weight, the dtype of the rows)."""

    def __init__(self, formula, dim=24, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))
        self.variance_eps = eps
        self.formula = formula

    def forward(self, x):
        wide = x.float()
        rows = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_eps)
        return self.formula(rows, self.weight, x.dtype)


FORMULAS = {
    (0.0, "llama"): lambda y, w, dtype: w * y.to(dtype),
    (1.0, "llama"): lambda y, w, dtype: (1 + w) * y.to(dtype),
    (0.0, "gemma"): lambda y, w, dtype: (w.float() * y).to(dtype),
    (1.0, "gemma"): lambda y, w, dtype: ((1 + w.float()) * y).to(dtype),
}


def results(module, x):
    """Output and gradients, with a residual that gets the same gradient as the norm."""
    x, residual = x.clone().requires_grad_(), torch.randn(x.shape, device=x.device).requires_grad_()
    y = module(x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    leaves = {"dx": x, "dw": module.weight, "dresidual": residual}
    gradients = torch.autograd.grad(y + residual, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_each_norm_s_formula_is_found_and_computed(device, formula):
    module = Norm(FORMULAS[formula]).to(device)
    forward = norms.forward_of(module, device)
    assert (forward.offset, forward.casting) == formula
    assert forward.eps == 1e-5
    x = torch.randn(2, 5, 24, device=device) * 1e-2
    wanted = results(module, x)
    forward.put()
    assert_close(results(module, x), wanted)
    strided = x.mT.contiguous().mT
    assert_close(results(module, strided), wanted)


def test_a_norm_on_the_meta_device_is_found():
    with torch.device("meta"):
        module = Norm(FORMULAS[0.0, "llama"])
    assert norms.forward_of(module, "cuda").casting == "llama"


NO_NORMS = {
    "mean taken off": lambda y, w, dtype: w * (y - y.mean(-1, keepdim=True)).to(dtype),
    "weight without gradient": lambda y, w, dtype: w.detach() * y.to(dtype) + 0 * w,
    "another power": lambda y, w, dtype: w * (y * y.abs()).to(dtype),
    "scaled": lambda y, w, dtype: 1.001 * w * y.to(dtype),
    "twice rounded": lambda y, w, dtype: (w.float() * y.to(dtype).float() + 0.0).to(torch.float32),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_such_norm_is_refused(name):
    with pytest.raises(FastexpertsError, match="needs the RMS norm of one tensor"):
        norms.forward_of(Norm(NO_NORMS[name]), "cpu")


def test_the_wrong_epsilon_and_a_second_argument_are_refused():
    module = Norm(FORMULAS[0.0, "llama"])
    module.forward = None
    with pytest.raises(FastexpertsError, match="put on the instance"):
        norms.forward_of(module, "cpu")

    class Shifted(Norm):
        def forward(self, x):
            return super().forward(x) + 0 * self.variance_eps

    class Outside(Norm):
        def forward(self, x):
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_eps)

    class Gated(Norm):
        def forward(self, x, gate=None):
            return super().forward(x)

    norms.forward_of(Shifted(FORMULAS[0.0, "llama"]), "cpu")
    for cls, got in ((Outside, "another function"), (Gated, "a forward of x, gate")):
        with pytest.raises(FastexpertsError, match=got):
            norms.forward_of(cls(FORMULAS[0.0, "llama"]), "cpu")


def test_a_norm_s_dtypes(device):
    """fp16, since bf16 is wrong in the interpreter: the class gives fp32 where its weight is."""
    module = Norm(FORMULAS[0.0, "llama"]).to(device)
    x = torch.randn(3, 24, device=device).half()
    wanted = module(x)
    norms.forward_of(module, device).put()
    assert wanted.dtype == module(x).dtype == torch.float32
    assert relative(module(x), wanted) < 1e-3
    with torch.autocast(device, torch.float16):
        assert module(x).dtype == torch.float16, "the next product would round it anyway"
    assert torch.equal(module(x.double()), type(module).forward(module, x.double())), "fp64: the class's own"


@pytest.mark.parametrize(("family", "once", "partial"), [
    ("qwen3_moe", False, False), ("glm4_moe", False, True), ("gpt_oss", True, False),
])  # fmt: skip
def test_each_rotation_is_found(family, once, partial):
    from importlib import import_module

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    theirs = module.apply_rotary_pos_emb

    class Attention(nn.Module):
        def forward(self, q, k, cos, sin):
            return apply_rotary_pos_emb(q, k, cos, sin)  # noqa: F821 - a global that the test gives

    scope = {"apply_rotary_pos_emb": theirs}
    Attention.forward = FunctionType(Attention.forward.__code__, scope)
    forward = rotary.forward_of(Attention(), "cpu")
    rotation = forward.others["apply_rotary_pos_emb"]
    assert (rotation.once, rotation.partial) == (once, partial)
    assert rotation.theirs is theirs


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("part", [1, 2])
def test_the_rotation_is_the_formula_and_leaves_its_operands(device, once, part):
    head, heads = 16, (4, 2)
    rotary_dim = head // part
    q, k = (torch.randn(2, 5, n, head, device=device, requires_grad=True) for n in heads)
    angle = torch.randn(2, 5, rotary_dim // 2, device=device).repeat(1, 1, 1 if once else 2)
    tables = angle.cos(), angle.sin()

    def theirs(q, k, cos, sin, unsqueeze_dim=1):
        return [rotary._formula(heads, cos, sin, rotary_dim) for heads in (q, k)]

    rotation = rotary.Rotation(theirs, device, once, partial=True)
    views = [heads.transpose(1, 2) for heads in (q, k)]
    before = [heads.clone() for heads in views]
    got, wanted = rotation(*views, *tables), theirs(*views, *tables)
    assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True)), "written over"
    douts = [torch.randn_like(heads) for heads in wanted]
    for a, b in zip(
        (*got, *torch.autograd.grad(got, (q, k), douts)),
        (*wanted, *torch.autograd.grad(wanted, (q, k), douts)),
        strict=True,
    ):
        assert relative(a, b) < 1e-6
    alone = rotary.Rotation(lambda *args, **kwargs: "theirs", device, once, partial=True)
    assert alone(*views, *tables, unsqueeze_dim=2) == "theirs"
    assert alone(views[0], cos=tables[0], sin=tables[1]) == "theirs", "of one tensor, as in qwen4_exp"
    assert alone(*(heads.double() for heads in views), *tables) == "theirs"


def test_rotations_that_differ_are_refused():
    for family, got in (("deepseek_v3", "several rotations"), ("ernie4_5_moe", "rotates otherwise")):
        model = tiny_model(family, "eager")
        attention = rotary.candidates(model)
        assert len(attention) == 2
        for module in attention.values():
            with pytest.raises(FastexpertsError, match=got):
                rotary.forward_of(module, "cpu")


class Mlp(nn.Module):
    def __init__(self, act=nn.functional.silu):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def test_an_mlp_is_computed_and_once_differentiated(device):
    module = Mlp().to(device)
    x = torch.randn(2, 5, 8, device=device, requires_grad=True)
    inputs = (x, *module.parameters())
    wanted = module(x)
    dy = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, dy)
    swiglu.forward_of(module, device).put()
    got = module(x)
    assert relative(got, wanted) < 1e-6
    for a, b in zip(torch.autograd.grad(got, inputs, dy, retain_graph=True), gradients, strict=True):
        assert relative(a, b) < 1e-6
    with pytest.raises(FastexpertsError, match=r"retain_graph.*shared_experts"):
        torch.autograd.grad(got, inputs, dy)


@pytest.mark.parametrize(("act", "got"), [
    (nn.functional.gelu, "geglu"),
    (lambda x: nn.functional.silu(x.clamp(max=7.0)), "does not know"),
    (lambda x: 1.001 * nn.functional.silu(x), "does not know"),
])  # fmt: skip
def test_an_mlp_of_another_activation_is_refused(act, got):
    with pytest.raises(FastexpertsError, match=got):
        swiglu.forward_of(Mlp(act), "cpu")


def batch(device, length=6):
    ids = tokens(length=length).to(device)
    labels = ids.clone()
    labels[0, 2] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(7)}], ids=["mean", "count"])
def test_the_loss_and_its_gradients_are_the_model_s(device, family, extra):
    model = tiny_model(family, "eager", output_router_logits=True).to(device).train()
    data = batch(device) | extra
    wanted, logits = step(model, data), model(**data).logits
    loss.forward_of(model, device).put()
    assert_close(step(model, data), wanted)
    out = model(**data)
    assert out.logits is None
    assert (out.get("aux_loss") is not None) == (family == "qwen3_moe")
    assert torch.equal(model(input_ids=data["input_ids"]).logits, logits), "no labels: logits"
    assert any(part.shape == logits.shape for part in model(**data, return_dict=False))
    bound = model.forward(model, **data)  # as accelerate's unwrap_model leaves it
    assert relative(bound.loss, wanted["loss"]) <= 1e-6
    model.eval()
    evaluated = model(**data)
    assert torch.equal(evaluated.logits, logits)
    assert torch.equal(evaluated.loss, wanted["loss"])


def test_shifted_labels_and_another_ignore_index(device):
    model = tiny_model("qwen3_moe", "eager").to(device).train()
    data = batch(device)
    shifted = nn.functional.pad(data["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    wanted = model(**data, shift_labels=shifted).loss
    loss.forward_of(model, device).put()
    assert relative(model(**data, shift_labels=shifted).loss, wanted) < 1e-6
    nothing = {**data, "labels": torch.full_like(data["labels"], -100)}
    assert model(**nothing).loss.isnan(), "as the model's own mean over no tokens"


def test_losses_that_are_more_than_a_head_s_are_refused():
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def small(name, **settings):
        config = CONFIG_MAPPING[name](
            vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, **settings,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)

    for model in (small("granitemoe", logits_scaling=3.0), small("gemma2", head_dim=8)):
        with pytest.raises(FastexpertsError, match="scales, caps or casts"):
            loss.forward_of(model, "cpu")
    model = tiny_model("qwen3_moe", "eager")
    model.loss_function = lambda logits, labels, *_, **__: logits.square().mean()
    with pytest.raises(FastexpertsError, match="another loss"):
        loss.forward_of(model, "cpu")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(FastexpertsError, match="hooks"):
        loss.forward_of(model, "cpu")


def test_an_adapter_that_comes_upon_the_head_later_is_refused(device):
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", "eager").to(device)
    loss.forward_of(model, device).put()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"])).train()
    with pytest.raises(FastexpertsError, match="adapter"):
        adapted(**batch(device))


def test_a_copied_and_a_pickled_model_know_themselves(device):
    model = tiny_model("qwen3_moe", "eager").to(device).train()
    for part in (norms, rotary, loss):
        for module in part.candidates(model).values():
            part.forward_of(module, device).put()
    data = batch(device, length=3)
    wanted = step(model, data)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        assert_close(step(twin, data), wanted, 0)
        assert {id(m.forward.module) for m in twin.modules() if "forward" in vars(m)} <= {
            *map(id, twin.modules())
        }
        with torch.no_grad():
            model.model.norm.weight.div_(2)
    assert model.state_dict().keys() == tiny_model("qwen3_moe", "eager").state_dict().keys()
    assert liger.restore(model) == 9 + 2 + 1
    assert not any("forward" in vars(module) for module in model.modules())
