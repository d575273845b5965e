"""moe_mlp as an operator: what runs and is kept, autograd, autocast, compilation, determinism, odd inputs."""

from dataclasses import replace

import pytest
import torch
from spies import Ops, spy_backend, use_interpreter
from support import FROZEN, NAMES, Case, Error, build, check_case, run_moe_mlp, run_reference
from torch.utils.checkpoint import checkpoint

from fastexperts import FastexpertsError, Weight, moe_mlp, moe_mlp_reference

CASE = Case(tokens=9, dims=(32, 16))


@pytest.fixture(params=["triton", "torch"])
def backend(request, monkeypatch):
    if request.param == "triton":
        use_interpreter(monkeypatch)
    else:
        monkeypatch.setenv("FASTEXPERTS_BACKEND", "torch")
    return request.param


def leaves(case=CASE, asked=NAMES):
    """(inputs, [x, weight, w1, w2]) of a case, fresh leaves."""
    inputs = build(case)
    return inputs, [getattr(inputs, name).clone().requires_grad_(name in asked) for name in NAMES]


def call(inputs, tensors, function=moe_mlp, **options):
    x, weight, w1, w2 = tensors
    return function(x, inputs.ids, weight, w1, w2, **options)


def step(inputs, tensors, function=moe_mlp, **options):
    """[out, *gradients] of the tensors that ask for one."""
    out = call(inputs, tensors, function, **options)
    return [out.detach(), *torch.autograd.grad(out, [t for t in tensors if t.requires_grad], inputs.dout)]


# What runs.


@pytest.mark.parametrize("frozen", FROZEN)
def test_nothing_is_computed_that_nobody_asked_for(frozen, backend):
    case = replace(CASE, frozen=frozen)
    inputs, tensors = leaves(case, case.asked)
    with spy_backend() as calls, Ops() as dispatched:
        out = call(inputs, tensors)
        if case.asked:
            out.backward(inputs.dout)
    ran = [name for _, name, _ in calls]
    asked = set(case.asked)
    assert ran.count("dh") == bool(asked)
    assert ran.count("dx") == ("x" in asked)
    assert ran.count("dw") == ("w1" in asked) + ("w2" in asked)
    assert ran.count("db") == 0, "there are no biases"
    ours = [name for name in dispatched.names if name.startswith("fastexperts::")]
    assert ours == ["fastexperts::moe_mlp", *["fastexperts::moe_mlp_backward"] * bool(asked)]


@pytest.mark.parametrize("frozen", FROZEN)
def test_outputs_of_dh_that_nobody_asked_for_have_no_rows(frozen, backend):
    case = replace(CASE, frozen=frozen)
    inputs, tensors = leaves(case, case.asked)
    with spy_backend() as calls:
        out = call(inputs, tensors)
        if not case.asked:
            assert not out.requires_grad
            return
        out.backward(inputs.dout)
    pairs, asked = inputs.ids.numel(), set(case.asked)
    (results,) = (result for _, name, result in calls if name == "dh")
    assert [len(tensor) for tensor in results] == [
        pairs * bool(asked & {"x", "w1"}),
        pairs * ("w2" in asked),
        case.tokens * ("weight" in asked),
    ]


# What is kept.


def test_saved_for_backward_are_x_h_weights_and_routing(backend):
    inputs, tensors = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(inputs, tensors)
    x, weight, w1, w2 = tensors
    pairs = inputs.ids.numel()
    assert [t.data_ptr() for t in saved[:4]] == [t.data_ptr() for t in (x, weight, w1, w2)]
    assert [t.numel() for t in saved[:4]] == [t.numel() for t in (x, weight, w1, w2)]
    h, *routing = saved[4:]
    assert h.shape == (pairs, w1.shape[1])
    assert h.dtype == x.dtype
    xa, ya, row_of_pair, pair_of_row, offsets, schedule = routing
    assert xa.numel() == ya.numel() == 0  # of updates: there are none
    assert row_of_pair.shape == pair_of_row.shape == (pairs,)
    assert offsets.shape == (w2.shape[0] + 1,)
    assert schedule.shape[1] == 3
    assert {t.dtype for t in routing[2:]} == {torch.int32}


@pytest.mark.parametrize("asked", [(), NAMES])
def test_without_gradients_h_is_not_kept(asked, backend):
    inputs, tensors = leaves(asked=asked)
    with spy_backend() as calls:
        with torch.set_grad_enabled(not asked):
            out = call(inputs, tensors)
        assert torch.equal(out, call(inputs, leaves()[1]))
    assert [len(result[0]) for _, name, result in calls if name == "up"] == [0, inputs.ids.numel()]


# Autograd.


def test_double_backward_is_refused(backend):
    inputs, tensors = leaves()
    out = call(inputs, tensors)
    (dx,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        dx.sum().backward()


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "gpt_oss", "gelu"])
def test_gradcheck(activation, backend):
    case = Case(3, 3, 2, (5, 4), "sentinels", "contiguous", activation, dtype=torch.float64)
    inputs, tensors = leaves(case)
    assert torch.autograd.gradcheck(
        lambda *t: call(inputs, t, activation=case.act), tensors, fast_mode=backend == "triton"
    )


def test_a_stride_0_gradient(backend):
    inputs, tensors = leaves()
    call(inputs, tensors).sum().backward()
    ones = replace(inputs, dout=torch.ones_like(inputs.x))
    for tensor, grad in zip(tensors, step(ones, leaves()[1])[1:], strict=True):
        assert torch.equal(tensor.grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant, backend):
    inputs, tensors = leaves()
    plain = step(inputs, tensors)
    x, weight, w1, w2 = tensors
    with spy_backend() as calls:
        out = checkpoint(moe_mlp, x, inputs.ids, weight, w1, w2, use_reentrant=reentrant)
        out.backward(inputs.dout)  # the reentrant form takes no autograd.grad
    assert [name for _, name, _ in calls].count("up") == 2
    assert all(map(torch.equal, [out, *(t.grad for t in tensors)], plain))


def test_weight_gradients_keep_the_strides_of_the_parameter(backend):
    inputs, (x, weight, w1, w2) = leaves()
    w1 = w1.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    w2 = w2.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    grads = step(inputs, [x, weight, w1, w2])[3:]
    assert [g.stride() for g in grads] == [w1.stride(), w2.stride()]
    stored = w1.detach().transpose(1, 2).requires_grad_()
    out = moe_mlp(x, inputs.ids, weight, Weight(stored, transposed=True), w2)
    (grad,) = torch.autograd.grad(out, stored, inputs.dout)
    assert grad.is_contiguous()
    assert torch.equal(grad.transpose(1, 2), grads[0])


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", ["nothing", "experts"])
def test_autocast_over_fp32_weights(dtype, frozen):
    """h is of the autocast dtype, what is saved of the weights is the parameters, gradients are fp32."""
    case = Case(tokens=33, dims=(48, 80), frozen=frozen)
    inputs, tensors = leaves(case, case.asked)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=dtype),
    ):
        out = call(inputs, tensors)
    assert [t.data_ptr() for t in saved[:4]] == [t.data_ptr() for t in tensors]
    assert saved[4].dtype == dtype
    asked = [t for t in tensors if t.requires_grad]
    result = [out.detach(), *torch.autograd.grad(out, asked, inputs.dout)]
    assert {t.dtype for t in result} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        eager = run_reference(case, inputs)
    ref = run_reference(case, inputs.double())
    for (name, truth), value in zip(ref.items(), result, strict=True):
        error = Error(name, dtype)
        error.add(value, eager[name], truth)
        error.check()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32], ids=str)
def test_biases_of_another_dtype_than_the_products(kept, bias_dtype):
    """As gpt_oss has under autocast, or with fp32 biases alone."""
    case = Case(tokens=33, dims=(48, 80), bias=True)
    inputs = build(case)
    w1, w2 = (inputs.w1.to(kept).requires_grad_(), inputs.w2.to(kept).requires_grad_())
    b1, b2 = (inputs.b1.to(bias_dtype).requires_grad_(), inputs.b2.to(bias_dtype).requires_grad_())
    x = inputs.x.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe_mlp(x, inputs.ids, inputs.weight, Weight(w1, bias=b1), Weight(w2, bias=b2))
    grads = torch.autograd.grad(out, [x, w1, w2, b1, b2], inputs.dout.to(out.dtype))
    assert [out.dtype, *(grad.dtype for grad in grads)] == [x.dtype] * 2 + [kept] * 2 + [bias_dtype] * 2
    truth = run_reference(case, inputs.double())
    for name, got in zip(("out", "dx", "dw1", "dw2", "db1", "db2"), (out, *grads), strict=True):
        assert (got.double() - truth[name]).norm() < 0.02 * truth[name].norm(), name


def test_forward_mode_is_refused(backend):
    inputs, (x, *others) = leaves(asked=())
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda a: call(inputs, [a, *others]), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode"):
            call(inputs, [torch.autograd.forward_ad.make_dual(x, x), *others])
        assert call(inputs, [x, *others]).isfinite().all()


def test_fp64_is_left_alone_by_autocast():
    """As by PyTorch's own."""
    inputs, tensors = leaves(Case(tokens=33, dims=(48, 80), dtype=torch.float64))
    plain = call(inputs, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(inputs, tensors), plain)


def test_gradients_of_strided_biases_are_contiguous():
    """As the fake says to torch.compile."""
    inputs = build(Case(tokens=33, dims=(48, 80), bias=True))
    b1 = torch.zeros(160, 4).t().requires_grad_()
    out = moe_mlp(inputs.x, inputs.ids, inputs.weight, Weight(inputs.w1, bias=b1), inputs.w2)
    assert torch.autograd.grad(out.sum(), b1)[0].is_contiguous()


def test_autocast_is_only_the_default_of_dtype():
    inputs, tensors = leaves()
    plain = step(inputs, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explicit = step(inputs, tensors, dtype=torch.float32)
        low = call(inputs, tensors)
    assert all(map(torch.equal, explicit, plain))
    assert not torch.equal(low, plain[0])


@pytest.mark.parametrize("weights", [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes_compute_in_that_of_x(weights, backend):
    """Gradients come back in each tensor's own dtype; the weights are cast for the length of the call."""
    inputs, tensors = leaves(Case(tokens=9, dims=(32, 16), dtype=torch.float16))
    x, weight, w1, w2 = tensors
    w1, w2 = (w.detach().to(weights).requires_grad_() for w in (w1, w2))
    mixed = step(inputs, [x, weight, w1, w2])
    assert [t.dtype for t in mixed] == [torch.float16, torch.float16, torch.float32, weights, weights]
    for got, same in zip(mixed, step(inputs, tensors), strict=True):
        torch.testing.assert_close(got, same.to(got.dtype), rtol=2**-10, atol=2**-14)


def test_low_precision_routing_weights(backend):
    inputs, (x, weight, w1, w2) = leaves(Case(tokens=9, dims=(32, 16), dtype=torch.float16))
    low = weight.detach().half().requires_grad_()
    dweight = step(inputs, [x, low, w1, w2])[2]
    assert dweight.dtype == torch.float16
    wide = step(inputs, [x, low.detach().float().requires_grad_(), w1, w2])[2]
    torch.testing.assert_close(dweight, wide.half())


# Compilation.


@pytest.mark.parametrize("frozen", ["nothing", "experts", "weight"])
def test_compiled_whole(frozen, backend):
    case = replace(CASE, frozen=frozen)
    inputs, tensors = leaves(case, case.asked)
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, step(inputs, tensors, compiled), step(inputs, tensors)))


def test_compiled_once_for_any_number_of_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for tokens in (9, 33, 70):
        inputs, tensors = leaves(replace(CASE, tokens=tokens))
        assert all(map(torch.equal, step(inputs, tensors, compiled), step(inputs, tensors)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_under_autocast():
    inputs, tensors = leaves()
    torch._dynamo.reset()
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(inputs, tensors, compiled), call(inputs, tensors))


# Determinism and odd inputs.


def test_twenty_runs_are_bitwise_equal(backend):
    case = replace(CASE, tokens=12, routing="zipf")
    inputs, tensors = leaves(case)
    first = step(inputs, tensors)
    for _ in range(19):
        assert all(map(torch.equal, step(inputs, tensors), first))


def test_a_tokens_row_does_not_depend_on_its_mates(monkeypatch):
    """The first tokens keep their places in the tiles: NumPy's products round by place, unlike a GPU's."""
    use_interpreter(monkeypatch)
    inputs, tensors = leaves(replace(CASE, tokens=70, experts=3))
    whole = step(inputs, tensors)[:3]
    few = replace(inputs, ids=inputs.ids[:33], dout=inputs.dout[:33])
    x, weight = (t.detach()[:33].requires_grad_() for t in tensors[:2])
    for part, full in zip(step(few, [x, weight, *tensors[2:]])[:3], whole, strict=True):
        assert torch.equal(part, full[:33])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tma", ["0", "1"])
def test_a_non_finite_token_poisons_its_own_rows_alone(value, tma, backend, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", tma)
    inputs, tensors = leaves(replace(CASE, tokens=12, dims=(48, 80)))
    clean = step(inputs, tensors)
    with torch.no_grad():
        tensors[0][5, 3] = value
    out, dx, dweight, dw1, dw2 = step(inputs, tensors)
    others = torch.arange(12) != 5
    assert not out[5].isfinite().all()
    for got, wanted in zip((out, dx, dweight), clean[:3], strict=True):
        torch.testing.assert_close(got[others], wanted[others])
    spared = torch.ones(4, dtype=torch.bool)
    spared[inputs.ids[5]] = False
    for got, wanted in zip((dw1, dw2), clean[3:], strict=True):
        torch.testing.assert_close(got[spared], wanted[spared])


def test_non_finite_routing_weights(backend):
    inputs, tensors = leaves()
    with torch.no_grad():
        tensors[1][2, 0] = torch.nan
    out, *_ = step(inputs, tensors)
    assert out[2].isnan().all()
    assert out[torch.arange(9) != 2].isfinite().all()


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_ids_of_either_width(ids, backend):
    inputs, tensors = leaves()
    narrow = replace(inputs, ids=inputs.ids.to(ids))
    assert all(map(torch.equal, step(narrow, tensors), step(inputs, tensors)))


def test_strided_ids_and_routing_weights(backend):
    """A slice of a wider top-k, as some routers return it."""
    inputs, tensors = leaves()
    ids, weight = (t.detach().repeat(1, 2) for t in (inputs.ids, tensors[1]))
    sliced = replace(inputs, ids=ids[:, :2])
    others = [tensors[0], weight[:, :2].requires_grad_(), *tensors[2:]]
    assert not sliced.ids.is_contiguous()
    assert all(map(torch.equal, step(sliced, others), step(inputs, tensors)))


def test_more_choices_than_local_experts(backend):
    """Expert parallelism: other ranks' experts are sentinels here."""
    inputs, (x, _, w1, w2) = leaves(replace(CASE, experts=2))
    ids = torch.tensor([[0, 2, 1], [2, 2, 2], [1, 2, 2]])
    weight = torch.rand(3, 3, requires_grad=True)
    tensors = [x.detach()[:3].requires_grad_(), weight, w1, w2]
    local = replace(inputs, ids=ids, dout=inputs.dout[:3])
    got = step(local, tensors, expert_parallel=True)
    assert got[0][1].equal(torch.zeros(32))
    for value, wanted in zip(got, step(local, tensors, moe_mlp_reference), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_ids_are_checked_where_asked(compiled, monkeypatch):
    inputs, tensors = leaves(replace(CASE, routing="sentinels"))
    function = moe_mlp
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    call(inputs, tensors, function)
    monkeypatch.setenv("FASTEXPERTS_CHECK", "1")
    with pytest.raises(FastexpertsError, match=r"`ids_TK` got the id 7; .*\[0, 4\)"):
        call(inputs, tensors, function)
    allowed = replace(inputs, ids=inputs.ids.clamp(-1, 4))
    checked = call(allowed, tensors, function)
    monkeypatch.delenv("FASTEXPERTS_CHECK")
    assert torch.equal(checked, call(inputs, tensors, function))


def test_the_first_of_all_cases_fails_with_another_gate():
    """check_case can fail: the same inputs with another activation."""
    inputs = build(CASE)
    got = run_moe_mlp(replace(CASE, activation="geglu"), inputs)
    check_case(CASE, inputs)
    assert not torch.allclose(got["out"], run_reference(CASE, inputs)["out"], rtol=1e-2)
