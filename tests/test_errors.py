"""Bad calls of moe_mlp: each is refused before anything runs, naming argument, got, needs and the way out."""

import re

import numpy as np
import pytest
import torch
from spies import spy_backend

from fastexperts import Activation, FastexpertsError, Weight, moe_mlp, moe_mlp_reference

T, K, E, D, F = 3, 2, 4, 8, 6
ENV = ("FASTEXPERTS_BACKEND", "FASTEXPERTS_CHECK", "FASTEXPERTS_TMA")


def good() -> dict:
    return {
        "x_TD": torch.randn(T, D),
        "ids_TK": torch.tensor([[0, 1], [2, 3], [3, 0]]),
        "weight_TK": torch.rand(T, K),
        "w1": torch.randn(E, 2 * F, D),
        "w2": torch.randn(E, D, F),
    }


# what is wrong -> (changed arguments, the argument named, what it got, what it needs, words of the way out)
CALLS = {
    "x is a list": ({"x_TD": [[0.0] * D] * T}, "x_TD", "list", "a torch.Tensor", "torch.as_tensor"),
    "x is a NumPy array": (
        {"x_TD": np.zeros((T, D))},
        "x_TD", "ndarray", "a torch.Tensor", "torch.as_tensor",
    ),
    "x is integer": ({"x_TD": torch.ones(T, D, dtype=torch.int64)}, "x_TD", "int64", "bfloat16", ".to("),
    "x is complex": ({"x_TD": torch.ones(T, D) * 1j}, "x_TD", "complex64", "bfloat16", ".to("),
    "x has a batch": ({"x_TD": torch.zeros(2, T, D)}, "x_TD", "[2, 3, 8]", "2 dimensions", ".flatten(0, -2)"),
    "x is one token": ({"x_TD": torch.zeros(D)}, "x_TD", "[8]", "2 dimensions", ".flatten"),
    "x has fewer tokens": ({"x_TD": torch.zeros(2, D)}, "ids_TK", "3 tokens", "2, as x_TD", "Route"),
    "x is narrower": (
        {"x_TD": torch.zeros(T, 4)},
        "w2", "output dim 8", "4, the hidden dim", "transposed=True",
    ),
    "x is elsewhere": (
        {"x_TD": torch.zeros(T, D, device="meta")},
        "ids_TK", "device cpu", "device meta", ".to(",
    ),
    "ids are a list": ({"ids_TK": [[0, 1]] * T}, "ids_TK", "list", "a torch.Tensor", "torch.as_tensor"),
    "ids are floats": ({"ids_TK": torch.zeros(T, K)}, "ids_TK", "float32", "int64 or int32", ".long()"),
    "ids are short": (
        {"ids_TK": torch.zeros(T, K, dtype=torch.int16)}, "ids_TK", "int16", "int64 or int32", ".long()",
    ),
    "ids have one choice without its dim": (
        {"ids_TK": torch.zeros(T, dtype=torch.int64)},
        "ids_TK", "[3]", "2 dimensions [tokens, top-k]", "Flatten",
    ),
    "ids are elsewhere": (
        {"ids_TK": torch.zeros(T, K, dtype=torch.int64, device="meta")},
        "ids_TK", "device meta", "device cpu", ".to(",
    ),
    "ids have other tokens": (
        {"ids_TK": torch.zeros(5, K, dtype=torch.int64)}, "ids_TK", "5 tokens", "3, as x_TD", "Route",
    ),
    "more choices than experts": (
        {"ids_TK": torch.zeros(T, 5, dtype=torch.int64), "weight_TK": torch.zeros(T, 5)},
        "ids_TK", "top-k 5", "1 to 4", "expert_parallel=True",
    ),
    "no choice": (
        {"ids_TK": torch.zeros(T, 0, dtype=torch.int64), "weight_TK": torch.zeros(T, 0)},
        "ids_TK", "top-k 0", "1 to 4", "top-k",
    ),
    "weights of another top-k": ({"weight_TK": torch.zeros(T, 3)}, "weight_TK", "[3, 3]", "[3, 2]", "per id"),
    "weights are flat": (
        {"weight_TK": torch.zeros(T * K)},
        "weight_TK", "[6]", "2 dimensions [tokens, top-k]", "Flatten",
    ),
    "weights are integers": (
        {"weight_TK": torch.ones(T, K, dtype=torch.int32)}, "weight_TK", "int32", "bfloat16", ".to(",
    ),
    "weights are elsewhere": (
        {"weight_TK": torch.zeros(T, K, device="meta")}, "weight_TK", "device meta", "device cpu", ".to(",
    ),
    "w1 is a list": ({"w1": [[[0.0]]]}, "w", "list", "a torch.Tensor", "torch.as_tensor"),
    "w1 has two dimensions": ({"w1": torch.zeros(2 * F, D)}, "w", "2 dimensions", "3 dimensions", "Stack"),
    "w1 is gate alone": ({"w1": torch.zeros(E, F, D)}, "w1", "[4, 6, 8]", "[4, 12, 8]", "transposed=True"),
    "w1 is transposed unsaid": (
        {"w1": torch.zeros(E, D, 2 * F)},
        "w1", "[4, 8, 12]", "[4, 12, 8]", "Weight(w1",
    ),
    "w1 is said transposed and is not": (
        {"w1": Weight(torch.zeros(E, 2 * F, D), transposed=True)},
        "w1", "[4, 8, 12]", "[4, 12, 8]", "Weight(w1",
    ),
    "w1 of other experts": ({"w1": torch.zeros(5, 2 * F, D)}, "w1", "[5, 12, 8]", "[4, 12, 8]", "Weights"),
    "w1 is quantised": (
        {"w1": torch.zeros(E, 2 * F, D, dtype=torch.int8)}, "w1", "int8", "bfloat16", "quantised",
    ),
    "w1 is fp8": (
        {"w1": torch.zeros(E, 2 * F, D).to(torch.float8_e4m3fn)},
        "w1", "float8_e4m3fn", "bfloat16", "quantised",
    ),
    "w1 is elsewhere": (
        {"w1": torch.zeros(E, 2 * F, D, device="meta")},
        "w1", "device meta", "device cpu", ".to(",
    ),
    "w1 is gated, the activation not": (
        {"activation": "relu2"},
        "w1", "[4, 12, 8]", "[4, 6, 8]", "Weight(w1",
    ),
    "w2 is transposed unsaid": (
        {"w2": torch.zeros(E, F, D)},
        "w2", "output dim 6", "8", "Weight(w2, transposed=True)",
    ),
    "w2 of another F": ({"w2": torch.zeros(E, D, 5)}, "w1", "[4, 12, 8]", "[4, 10, 8]", "Weights"),
    "w2 without experts": ({"w2": torch.zeros(0, D, F)}, "w2", "0 experts", "at least 1", "experts"),
    "w2 is one matrix": ({"w2": torch.zeros(D, F)}, "w", "2 dimensions", "3 dimensions", "Stack"),
    "w2 is integer": ({"w2": torch.zeros(E, D, F, dtype=torch.uint8)}, "w2", "uint8", "bfloat16", ".to("),
    "an unknown activation": ({"activation": "swish"}, "activation", "'swish'", "swiglu", "Activation(fn="),
    "an activation in a list": ({"activation": []}, "activation", "[]", "swiglu", "Activation(fn="),
    "no activation": ({"activation": None}, "activation", "None", "swiglu", "Activation(fn="),
    "an fp8 product": ({"dtype": torch.float8_e4m3fn}, "dtype", "float8_e4m3fn", "bfloat16", "Leave it out"),
    "an integer product": ({"dtype": torch.int32}, "dtype", "int32", "bfloat16", "Leave it out"),
}  # fmt: skip

# (environment, the variable, got, needs, way out)
ENVIRONMENTS = {
    "an unknown backend": (
        {"FASTEXPERTS_BACKEND": "cuda"},
        "FASTEXPERTS_BACKEND", "'cuda'", "triton", "Unset",
    ),
    "an empty backend": ({"FASTEXPERTS_BACKEND": ""}, "FASTEXPERTS_BACKEND", "''", "auto", "Unset"),
    "triton on a CPU": ({"FASTEXPERTS_BACKEND": "triton"}, "FASTEXPERTS_BACKEND", "CPU", "CUDA", "Unset"),
    "a check that is no flag": (
        {"FASTEXPERTS_CHECK": "yes"},
        "FASTEXPERTS_CHECK", "'yes'", "0 or 1", "Unset",
    ),
    "a TMA that is no flag": (
        {"FASTEXPERTS_TMA": "off", "FASTEXPERTS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
        "FASTEXPERTS_TMA", "'off'", "0 or 1", "Unset",
    ),
}  # fmt: skip


def check_message(error, argument, got, needs, way_out):
    text = str(error)
    match = re.fullmatch(r"\w+: `(\w+)` got (.+); it needs (.+?)\. (.+)", text)
    assert match, text
    assert match[1] == argument
    assert got in match[2]
    assert needs in match[3]
    assert way_out in match[4]
    assert "\n" not in text


def test_the_good_call_is_good():
    arguments = good()
    torch.testing.assert_close(moe_mlp(**arguments), moe_mlp_reference(**arguments))


def test_there_are_enough_bad_calls():
    assert len(CALLS) + len(ENVIRONMENTS) >= 25


@pytest.mark.parametrize("wrong", CALLS)
def test_bad_calls(wrong):
    changed, *message = CALLS[wrong]
    arguments = {**good(), **changed}
    with spy_backend() as calls, pytest.raises(FastexpertsError) as error:
        moe_mlp(**arguments)
    assert calls == []
    check_message(error.value, *message)


@pytest.mark.parametrize("wrong", ENVIRONMENTS)
def test_bad_environments(wrong, monkeypatch):
    environment, *message = ENVIRONMENTS[wrong]
    for name in (*ENV, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FastexpertsError) as error:
        moe_mlp(**good())
    check_message(error.value, *message)


@pytest.mark.parametrize("missing", ["x_TD", "ids_TK", "weight_TK", "w1", "w2"])
def test_a_missing_argument_is_pythons_own_error(missing):
    arguments = good()
    del arguments[missing]
    with pytest.raises(TypeError, match=missing):
        moe_mlp(**arguments)


def test_the_error_is_a_value_error():
    with pytest.raises(ValueError, match="activation"):
        moe_mlp(**good(), activation="?")
    with pytest.raises(FastexpertsError, match="`fn` got 'mish'"):
        Activation("mish")
