"""Every activation row: its derivative against autograd, its value against transformers, its Triton form."""

import dataclasses
import math

import pytest
import torch
from spies import use_interpreter
from support import ACTIVATION_ROWS, Case, check_case
from transformers.activations import ACT2FN

from fastexperts import ACTIVATIONS, Activation, FastexpertsError, moe_mlp
from fastexperts.activations import FUNCTIONS, SWIGLU, resolve

THEIR_NAME = {"gelu_tanh": "gelu_pytorch_tanh"}


def pre_activations(rows=400, columns=8):
    """Spread beyond every limit in use, 7 included; never a kink exactly."""
    return torch.randn(rows, columns, dtype=torch.float64) * 4


@pytest.mark.parametrize("name", ACTIVATION_ROWS)
def test_vjp_is_the_derivative_of_forward(name):
    act = ACTIVATION_ROWS[name]
    h = pre_activations().requires_grad_()
    a = act.forward(h)
    da = torch.randn_like(a)
    (expected,) = torch.autograd.grad(a, h, da)
    a_again, dh = act.vjp(h.detach(), da)
    torch.testing.assert_close(a_again, a.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dh, expected, rtol=1e-12, atol=1e-12)
    assert a.shape[1] * act.parts == h.shape[1]


@pytest.mark.parametrize("name", ["swiglu clamped", "gpt_oss clamped", "gelu clamped"])
def test_clamps_bite_and_pass_their_bounds(name):
    """Gradient as torch.clamp's: inside and at the bound it passes, beyond it does not."""
    act = ACTIVATION_ROWS[name]
    limit = act.limit
    g = torch.tensor([-9.0, limit - 0.1, limit, limit + 0.1, 9.0], dtype=torch.float64)
    h = torch.stack([g, torch.ones_like(g) * 0.3], dim=1)[:, : act.parts].clone().requires_grad_()
    a = act.forward(h)
    (expected,) = torch.autograd.grad(a, h, torch.ones_like(a))
    _, dh = act.vjp(h.detach(), torch.ones_like(a))
    torch.testing.assert_close(dh, expected, rtol=1e-12, atol=1e-12)
    assert (dh[3:, 0] == 0).all()
    assert (dh[1:3, 0] != 0).all()


@pytest.mark.parametrize("fn", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_values_are_those_of_transformers(fn, gated):
    h, theirs = pre_activations(), ACT2FN[THEIR_NAME.get(fn, fn)]
    act = Activation(fn, gated=gated)
    g, u = h.chunk(2, dim=-1)
    expected = theirs(g) * u if gated else theirs(h)
    torch.testing.assert_close(act.forward(h), expected, rtol=1e-12, atol=1e-12)


def test_gpt_oss_is_their_gate():
    """transformers' GptOssExperts._apply_gate, whose gate and up are interleaved."""
    h = pre_activations()
    g, u = h.chunk(2, dim=-1)
    g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
    expected = (u + 1) * g * torch.sigmoid(1.702 * g)
    torch.testing.assert_close(ACTIVATIONS["gpt_oss"].forward(h), expected, rtol=1e-12, atol=1e-12)
    assert (h.abs() > 7).any()


@pytest.mark.parametrize("name", [name for name, act in ACTIVATION_ROWS.items() if act.gated])
def test_gate_and_up_in_turn(name):
    act = ACTIVATION_ROWS[name]
    h = pre_activations()
    turned = torch.stack(h.chunk(2, dim=1), dim=-1).flatten(1)
    a, dh = act.vjp(h, torch.ones(len(h), h.shape[1] // 2, dtype=h.dtype))
    other = dataclasses.replace(act, interleaved=True)
    a_turned, dh_turned = other.vjp(turned, torch.ones_like(a))
    assert torch.equal(other.forward(turned), act.forward(h))
    assert torch.equal(a_turned, a)
    assert torch.equal(dh_turned, torch.stack(dh.chunk(2, dim=1), dim=-1).flatten(1))


def test_caps_are_smooth_bounds():
    """transformers' Inkling2SoftcappedSwiGLU: the sigmoid sees the raw gate."""
    h = pre_activations()
    g, u = h.chunk(2, dim=-1)
    expected = 1.5 * torch.tanh(g / 1.5) * torch.sigmoid(g) * 0.75 * torch.tanh(u / 0.75)
    torch.testing.assert_close(ACTIVATION_ROWS["swiglu capped"].forward(h), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATION_ROWS)
def test_triton_form(name, monkeypatch):
    """Beyond the rows of the covering cases: fp64, all gradients, one tile."""
    use_interpreter(monkeypatch)
    case = Case(5, 2, 1, (32, 16), activation=name, dtype=torch.float64)
    assert case.act == ACTIVATION_ROWS[name]
    check_case(case)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_caps_of_small_values_keep_their_digits(scale, monkeypatch):
    """In fp32, tanh by a sigmoid cancels near 0."""
    use_interpreter(monkeypatch)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * scale
    ids, weight, w1 = torch.zeros(64, 1, dtype=torch.long), torch.ones(64, 1), torch.eye(16)[None]
    act = dataclasses.replace(ACTIVATION_ROWS["swiglu capped"], gate_cap=4.0, up_cap=25.0)
    x.requires_grad_()
    out = moe_mlp(x, ids, weight, torch.cat([w1, w1], dim=1), w1, activation=act)
    wide = x.detach().double().requires_grad_()
    truth = act.forward(torch.cat([wide, wide], dim=1))
    for got, wanted in (
        (out, truth),
        (torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(truth.sum(), wide)[0]),
    ):
        assert (got - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ACTIVATION_ROWS)
def test_travels_through_a_schema(name):
    act = ACTIVATION_ROWS[name]
    assert Activation.of(act.fn, act.params) == act


def test_names_resolve_and_others_are_refused():
    assert resolve("swiglu", "here") is SWIGLU
    assert resolve(SWIGLU, "here") is SWIGLU
    with pytest.raises(FastexpertsError, match=r"here: `activation` got 'swish'; .*swiglu.* Other gates"):
        resolve("swish", "here")


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"fn": "mish"}, "fn"),
        ({"fn": []}, "fn"),
        ({"fn": "silu", "limit": 0.0}, "limit"),
        ({"fn": "silu", "limit": math.nan}, "limit"),
        ({"fn": "gelu", "alpha": 1.702}, "alpha"),
        ({"fn": "gelu", "gate_cap": 2.0}, "gate_cap"),
        ({"fn": "silu", "up_cap": -1.0}, "up_cap"),
        ({"fn": "relu2", "gated": False, "interleaved": True}, "interleaved"),
        ({"fn": "silu", "gated": False, "up_shift": 1.0}, "up_shift"),
        ({"fn": "silu", "gated": False, "up_cap": 2.0}, "up_cap"),
        ({"fn": "silu", "alpha": math.nan}, "alpha"),
        ({"fn": "silu", "limit": None}, "limit"),
        ({"fn": "silu", "limit": "7"}, "limit"),
    ],
    ids=str,
)
def test_rows_that_mean_nothing_are_refused(fields, argument):
    with pytest.raises(FastexpertsError, match=f"Activation: `{argument}` got"):
        Activation(**fields)


def test_rows_are_constants():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SWIGLU.limit = 1.0
