"""Experts that are not plain SwiGLU on a GPU, at the shapes of real models: the error rule."""

from dataclasses import replace

import pytest
import torch
from spies import spy_backend
from support_gpu import build, check, equal, ours, shapes

from fastexperts import ACTIVATIONS

pytestmark = pytest.mark.gpu


def inputs_of(name, tokens, kind, dtype=torch.bfloat16, device="cuda", shape=None):
    special = shapes.SPECIALS[name]
    activation = replace(ACTIVATIONS[special.activation], limit=special.limit)
    return build(
        shape or special.shape, tokens, kind, dtype,
        parts=special.parts, bias=special.bias, activation=activation, stored=special.stored, device=device,
    )  # fmt: skip


@pytest.mark.usefixtures("one_large")
@pytest.mark.parametrize(("tokens", "kind"), [(4096, "balanced"), (1000, "skewed")])
@pytest.mark.parametrize("name", shapes.SPECIALS)
def test_real_shapes(name, tokens, kind):
    inputs = inputs_of(name, tokens, kind)
    with spy_backend() as calls:
        out = ours(inputs)
    assert {backend for backend, *_ in calls} == {"kernels"}
    check(inputs, out, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tma", ["1", "0"])
def test_as_gpt_oss_stores_them(dtype, tma, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", tma)
    shape = shapes.Shape("tails", 336, 208, 6, 3)
    inputs = inputs_of("gpt-oss-20b", 777, "skewed", dtype, shape=shape)
    out = ours(inputs)
    check(inputs, out, dtype)
    assert equal(out, ours(inputs))
