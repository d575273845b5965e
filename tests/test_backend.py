"""The layer as PyTorch sees it: schema, fake shapes, autograd registration; and backends agree primitive by
primitive.
"""

import contextlib
from unittest import mock

import pytest
import torch
from spies import use_interpreter
from support import Case, build

import fastexperts
from fastexperts import FastexpertsError, backend, cpu, kernels, ops
from fastexperts.backend import Backend

CASE = Case(tokens=9, dims=(32, 16), routing="sentinels", bias=True)
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def arguments(case=CASE):
    """(live rows, {primitive: its arguments}), tensors as a forward and a backward of `case` pass them."""
    inputs = build(case)
    x, weight, dout = inputs.x, inputs.weight, inputs.dout
    module = backend.load(x.device)
    block_m = module.block_m(x.device, x.dtype)
    routing = module.route(inputs.ids, case.experts, block_m)
    w1, every = inputs.w1, (True, True, True)
    rows = slice(0, int(routing.offsets_E1[-1]))
    h, a = module.up(x, w1, inputs.b1, routing, case.act, True)
    dh, wa, _ = module.dh(dout, inputs.w2, h, weight, routing, case.act, every)
    y = module.down(a, inputs.w2, inputs.b2, routing)
    return rows, {
        "block_m": (x.device, x.dtype),
        "route": (inputs.ids, case.experts, block_m),
        "up": (x, w1, inputs.b1, routing, case.act, True),
        "down": (a, inputs.w2, inputs.b2, routing),
        "combine": (y, weight, routing, x.dtype),
        "dh": (dout, inputs.w2, h, weight, routing, case.act, every),
        "dx": (dh, w1, routing),
        "shrink": (x, w1[:, :5], routing, True),
        "dw": (dout, wa, routing, inputs.w2, "left"),
        "db": (dout, weight, routing, inputs.b2),
        "dfactor": (x, y[:, :16], routing, w1[:, :5], True, 0.5),
        "shrink_dfactor": (y, w1[:, :16], y[:, 16:], routing, w1[:, :7].mT.contiguous().mT, False),
        "weigh": (y, weight, routing),
        "pack": (w1[:, :5], w1.mT[:, :, :5], 0.5, 16, torch.float32),
    }


def test_backends_have_every_primitive_and_no_other():
    primitives = {name for name in vars(Backend) if not name.startswith("_")}
    assert primitives == set(kernels.__all__) == set(cpu.__all__) == arguments()[1].keys()


@pytest.fixture(params=["triton", "torch"])
def either(request, monkeypatch):
    if request.param == "triton":
        use_interpreter(monkeypatch)


@pytest.mark.parametrize("keep_h", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_opcheck_of_the_layer(keep_h, grad, more, either):
    inputs = build(CASE)
    tensors = [t.requires_grad_(grad) for t in (inputs.x, inputs.weight, inputs.w1, inputs.w2)]
    how = ("silu", [*CASE.act.params, 2.0, 0.5], torch.float32, keep_h or grad)
    call = (tensors[0], inputs.ids, *tensors[1:], *(extras(grad) if more else [None] * 6), *how)
    result = torch.library.opcheck(torch.ops.fastexperts.moe_mlp.default, call, test_utils=TESTS)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needs", [(True,) * 4, (True, False, False, False), (False, True, False, True)])
@pytest.mark.parametrize("more", [False, True])
def test_opcheck_of_the_backward(needs, more, either):
    _, calls = arguments()
    dout, w2, h, weight, routing, *_ = calls["dh"]
    x, w1, *_ = calls["up"]
    rows = [torch.zeros(len(h), 16) if more else torch.zeros(0)] * 2
    primals = [x, weight, w1, w2, *(extras(False) if more else [None] * 6)]
    asked = [*needs, *[more] * 6]
    numbers = [*CASE.act.params, 2.0, 0.5]
    call = (dout, primals, [h, *rows, *routing.tensors], "silu", numbers, x.dtype, asked)
    result = torch.library.opcheck(torch.ops.fastexperts.moe_mlp_backward.default, call, test_utils=TESTS)
    assert set(result.values()) == {"SUCCESS"}
    grads = ops._moe_mlp_backward(*call)
    assert [grad.numel() > 0 for grad in grads] == asked


def extras(grad):
    """[bias1, bias2, a1, b1, a2, b2] of ranks 3 and 5."""
    (d, f), e = CASE.dims, CASE.experts
    inputs = build(CASE)
    shapes = ((e, 3, d), (e, 2 * f, 3), (e, 5, f), (e, d, 5))
    strided = [torch.randn(shape[::-1]).permute(2, 1, 0) for shape in shapes]  # as PEFT stores them, nearly
    return [extra.requires_grad_(grad) for extra in (inputs.b1, inputs.b2, *strided)]


@pytest.mark.parametrize(
    "primitive",
    ["up", "down", "combine", "dh", "dx", "shrink", "dw", "dfactor", "shrink_dfactor", "db", "weigh", "pack"],
)
def test_backends_agree(primitive, monkeypatch):
    """Row by row, so that a fault names its primitive; the whole is held to fp64 in test_moe_cases."""
    use_interpreter(monkeypatch)
    rows, _ = arguments()
    pairs = build(CASE).ids.numel()
    # arguments of its own for each: one of them is written to
    results = [getattr(module, primitive)(*arguments()[1][primitive]) for module in (kernels, cpu)]
    one, other = (r if isinstance(r, tuple) else (r,) for r in results)
    for got, wanted in zip(one, other, strict=True):
        # rows behind the last are undefined
        live = rows if got.shape[0] == pairs else slice(None)
        torch.testing.assert_close(got[live], wanted[live])


@pytest.mark.parametrize("needed", range(3))
def test_what_dh_is_not_asked_for_takes_no_memory(needed):
    """Also not as an empty view of what was computed."""
    rows, calls = arguments()
    *call, everything = calls["dh"]
    every = cpu.dh(*call, everything)
    got = cpu.dh(*call, tuple(i == needed for i in range(3)))
    for i, (tensor, whole) in enumerate(zip(got, every, strict=True)):
        assert tensor.shape == (whole.shape if i == needed else (0, *whole.shape[1:]))
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    live = slice(None) if needed == 2 else rows  # dweight has all its rows
    assert torch.equal(got[needed][live], every[needed][live])


@pytest.mark.parametrize("activation", ["relu2", "reglu"])
def test_a_nan_before_a_relu_stays_a_nan(monkeypatch, activation):
    use_interpreter(monkeypatch)
    row = fastexperts.ACTIVATIONS[activation]
    x = torch.ones(2, 16)
    x[1, 0] = torch.nan
    w1, w2 = torch.ones(1, row.parts * 16, 16), torch.ones(1, 16, 16)
    ids, weight = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    out = fastexperts.moe_mlp(x, ids, weight, w1, w2, activation=row)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_bf16_in_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, w = torch.ones(2, 16, dtype=torch.bfloat16), torch.ones(1, 16, 16, dtype=torch.bfloat16)
    ids, weight = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(
        fastexperts.FastexpertsError, match=r"1, for bfloat16.*Unset it and FASTEXPERTS_BACKEND"
    ):
        fastexperts.moe_mlp(x, ids, weight, w, w, activation="relu2")
    with pytest.raises(fastexperts.FastexpertsError, match="1, for bfloat16"):  # whatever the tensors' device
        kernels.block_m(torch.device("cuda", 0), torch.bfloat16)


def test_layers_run_on_the_device_of_their_tensors():
    """As a model spread over GPUs calls them: Triton launches on the current device."""
    with mock.patch.object(torch.cuda, "current_device", return_value=0):
        assert isinstance(backend.current(torch.device("cuda", 1)), torch.cuda.device)
        for here in (torch.device("cuda", 0), torch.device("cpu")):
            assert isinstance(backend.current(here), contextlib.nullcontext)


def test_a_schedule_of_another_backend_is_refused(monkeypatch):
    """As FASTEXPERTS_BACKEND switched between a forward and its backward makes it: tiles of 128, not 32."""
    use_interpreter(monkeypatch)
    ids = torch.arange(300)[:, None] % 5
    routing = cpu.route(ids, 5, 128)
    with pytest.raises(FastexpertsError, match="the backend that routed"):
        kernels.down(torch.zeros(300, 16), torch.zeros(5, 8, 16), None, routing)
