"""Attention: the calls that cuDNN's kernel is kept from, and that all others stay as PyTorch has them."""

import copy
import functools
import pickle
import threading

import pytest
import torch
from families import case_of, tiny_family
from support_hf import assert_close, tiny_model, tokens
from support_liger import run_liger, step
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastexperts.errors import FastexpertsError
from fastexperts.hf import attention, liger, rotary
from fastexperts.hf.optimize import Part, optimize, restore
from fastexperts.hf.scoped import ScopedForward

FAMILIES = ("qwen3_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "dots1")
ERRS = 64  # a length at which cuDNN's kernel errs with a mask


@pytest.fixture
def asked(monkeypatch):
    """(whether cuDNN's kernel may run, the arguments) of each call of sdpa, which runs as always."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls, sdpa = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(*args, **kwargs):
        calls.append((torch.backends.cuda.cudnn_sdp_enabled(), args))
        return sdpa(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    return calls


@pytest.fixture
def on_hopper(monkeypatch):
    """optimize() as on a card where sdpa asks cuDNN first; tensors on the CPU run as the classes have it."""
    run_liger(monkeypatch)
    monkeypatch.setattr(liger, "device_type", lambda model: "cuda")
    monkeypatch.setattr(attention, "cudnn_comes_first", lambda where: where == "cuda")


def put(model):
    for module in attention.candidates(model).values():
        attention.forward_of(module, "cpu").put()
    return model


def batch(length, padding):
    """The last sequence has `padding` tokens fewer than the others."""
    ids = tokens(length=length)
    there = torch.ones_like(ids)
    there[-1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": there, "labels": ids.where(there.bool(), -100)}


BOOL, SAME, WIDE = torch.bool, torch.float16, torch.float32


@pytest.mark.parametrize(("length", "masks", "errs"), [
    (64, (None, None), False), (64, (BOOL, None), True), (64, (SAME, None), True), (64, (None, SAME), True),
    (192, (BOOL,), True), (832, (BOOL,), True), (4096 + 64, (BOOL,), True),
    (1, (BOOL,), False), (63, (BOOL,), False), (65, (BOOL,), False), (100, (BOOL,), False),
    (128, (BOOL,), False), (256, (SAME,), False), (4096, (BOOL,), False), (128, (WIDE,), True),
    (100, (BOOL, WIDE), True), (128, (BOOL, SAME), False),
])  # fmt: skip
def test_which_calls_cudnn_errs_with(length, masks, errs):
    """By PyTorch's issue 196678: NaN at 64, 192, ..., clean at 128s and all other remainders."""
    query, key = (torch.empty(1, 2, n, 8, dtype=torch.float16, device="meta") for n in (7, length))
    masks = [dtype and torch.empty(1, 1, 7, length, dtype=dtype, device="meta") for dtype in masks]
    assert attention.cudnn_errs(query, key, *masks) is errs


def allowed():
    cuda = torch.backends.cuda
    return [
        cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(), torch._C._get_sdp_priority_order(),
    ]  # fmt: skip


def test_the_call_is_kept_from_cudnn_and_nothing_is_after_it():
    q = torch.empty(1, 1, ERRS, 8)
    mask = torch.ones(1, 1, ERRS, ERRS, dtype=torch.bool)
    call = functools.partial(attention.guarded, lambda *args, **kwargs: (args, kwargs, allowed()), "module")
    before = allowed()
    *others, order = before
    assert others == [True] * 4
    args, kwargs, during = call(q, q, q, mask, 0.5, scaling=2.0)
    assert args == ("module", q, q, q, mask, 0.5)
    assert kwargs == {"scaling": 2.0}
    assert during == [False, True, True, True, order]
    assert allowed() == before
    assert call(q, q, q, None)[2] == before
    assert call(q, q, q, attention_mask=mask)[2] == during
    assert call(q, q, q, None, position_bias=mask.float())[2] == during

    def fails(*args, **kwargs):
        raise ValueError(allowed())

    with pytest.raises(ValueError, match="False, True, True, True"):
        attention.guarded(fails, None, q, q, q, mask)
    assert allowed() == before


def test_what_the_caller_restricts_stays():
    q, mask = torch.empty(1, 1, ERRS, 8), torch.ones(1, 1, ERRS, ERRS, dtype=torch.bool)
    with sdpa_kernel(SDPBackend.MATH):
        during = attention.guarded(lambda *args, **kwargs: allowed(), None, q, q, q, mask)
        assert during == allowed()
        assert during[:4] == [False, False, False, True]


@pytest.mark.parametrize(
    ("kinds", "during"),
    [
        ([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH], [False, False, False, True]),
        ([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], [False, False, True, False]),
        ([SDPBackend.CUDNN_ATTENTION], [True, False, False, False]),
    ],
    ids=["cudnn and math", "cudnn and efficient", "cudnn alone"],
)
def test_no_kernel_that_the_caller_switched_off_comes_back(kinds, during):
    q, mask = torch.empty(1, 1, ERRS, 8), torch.ones(1, 1, ERRS, ERRS, dtype=torch.bool)
    with sdpa_kernel(kinds):
        before = allowed()
        assert attention.guarded(lambda *args, **kwargs: allowed(), None, q, q, q, mask)[:4] == during
        assert allowed() == before


def test_of_threads_that_are_inside_at_once_the_last_puts_cudnn_back():
    q, mask = torch.empty(1, 1, ERRS, 8), torch.ones(1, 1, ERRS, ERRS, dtype=torch.bool)
    before, seen = allowed(), []
    first_in, second_out = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        first_in.set()
        assert second_out.wait(10)
        seen.append(allowed()[0])

    thread = threading.Thread(target=attention.guarded, args=(slow, None, q, q, q, mask))
    thread.start()
    assert first_in.wait(10)
    attention.guarded(lambda *args, **kwargs: seen.append(allowed()[0]), None, q, q, q, mask)
    seen.append(allowed()[0])
    second_out.set()
    thread.join()
    assert seen == [False, False, False]
    assert allowed() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_s_padded_calls_and_no_others(family, asked):
    model = tiny_model(family, "eager", attn_implementation="sdpa").train()
    cases = {(ERRS, 9): False, (ERRS, 0): True, (40, 9): True}
    wanted = {case: step(model, batch(*case)) for case in cases}
    layers, before = len(asked) // 3, allowed()
    assert all(may for may, _ in asked), "as PyTorch has it"
    put(model)
    for case, may in cases.items():
        asked.clear()
        got = step(model, batch(*case))
        assert [found for found, _ in asked] == [may] * layers
        masked = asked[0][1][4] is not None
        assert masked == (case[1] > 0), "a mask where there is padding"
        assert all(torch.equal(got[name], wanted[case][name]) for name in wanted[case])
    assert allowed() == before


def test_recomputation_takes_the_same_kernel(asked):
    model = put(tiny_model("qwen3_moe", "eager", attn_implementation="sdpa")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, batch(ERRS, 9))
    assert [may for may, _ in asked] == [False] * 4, "2 layers, each twice"
    step(model, batch(ERRS, 0))
    assert [may for may, _ in asked[4:]] == [True] * 4


def test_a_class_without_sdpa_is_as_it_was(on_hopper, asked):
    model = tiny_family(case_of("gpt_oss"))
    wanted = step(model, batch(ERRS, 9))
    put(model)
    assert_close(step(model, batch(ERRS, 9)), wanted, 0)
    assert asked == []
    assert restore(model) == 2
    rows = optimize(model, checkpoint="off", verbose=False).of("attention")
    assert rows == (Part("attention", False, "eager: the class has no sdpa", 1, "GptOssForCausalLM"),)


def test_functions_that_are_registered_later_and_names_that_are_not(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = next(iter(attention.candidates(tiny_model("qwen3_moe", "eager")).values()))
    interface = attention.forward_of(module, "cpu").others[attention.INTERFACE]
    with pytest.raises(KeyError):
        interface.get_interface("later", print)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "later", max)
    assert interface.get_interface("later", print) is max
    assert interface["later"] is max
    assert interface.get_interface("eager", print) is print
    for found in (interface.get_interface("sdpa", print), interface["sdpa"]):
        assert (found.func, found.args) == (attention.guarded, (ALL_ATTENTION_FUNCTIONS["sdpa"],))


@pytest.mark.parametrize("parts", [(attention, rotary), (rotary, attention), (attention,), (rotary,)])
def test_attention_and_rotary_in_either_order(monkeypatch, asked, parts):
    device = run_liger(monkeypatch)
    model = tiny_model("qwen3_moe", "eager", attn_implementation="sdpa").to(device).train()
    data = {name: tensor.to(device) for name, tensor in batch(ERRS, 61).items()}
    wanted = step(model, data)
    for part in parts:
        for module in part.candidates(model).values():
            part.forward_of(module, device).put()
    names = {attention: attention.INTERFACE, rotary: "apply_rotary_pos_emb"}
    rotations = []
    monkeypatch.setattr(liger, "rope", _counted(liger.rope, rotations))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        forwards = [vars(module)["forward"] for module in attention.candidates(twin).values()]
        assert [set(forward.others) for forward in forwards] == [{names[part] for part in parts}] * 2
        assert len({forward.__wrapped__ for forward in forwards}) == 1, "layers share a function"
        assert all(module.forward.module is module for module in attention.candidates(twin).values())
        asked.clear(), rotations.clear()
        assert_close(step(twin, data), wanted)
        assert [may for may, _ in asked] == [attention not in parts] * 2
        assert len(rotations) == (2 if rotary in parts else 0)
    assert liger.restore(model) == 2
    assert not any("forward" in vars(module) for module in model.modules())


def _counted(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def _others(module):
    forward = vars(module).get("forward")
    return forward.others if isinstance(forward, ScopedForward) else {}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("off", [(), ("attention",), ("rotary",)], ids=str)
def test_optimize_puts_in_what_is_wanted(on_hopper, asked, family, off):
    model = tiny_model(family, "eager", attn_implementation="eager").train()
    parts = dict.fromkeys(off, False)
    summary = optimize(model, parts=parts, checkpoint="off", verbose=False)
    if "attention" in off:
        assert summary.of("attention") == (Part("attention", False, "as asked"),)
    else:
        assert summary.of("attention") == (Part("attention", True, attention.GUARDED, 2, "self_attn"),)
        step(model, batch(ERRS, 9))
        assert [may for may, _ in asked] == [False] * 2
    expected = {attention.INTERFACE: "attention"}
    if family == "qwen3_moe":  # interleaved rotations are refused
        expected["apply_rotary_pos_emb"] = "rotary"
    expected = {name for name, part in expected.items() if part not in off}
    found = [set(_others(module)) for module in model.modules()]
    assert [names for names in found if names] == ([expected] * 2 if expected else [])
    assert optimize(model, parts=parts, checkpoint="off", verbose=False) == summary, "a second time"
    restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_rows_elsewhere(on_hopper, monkeypatch):
    model = tiny_model("dots1", "eager", attn_implementation="sdpa")
    assert attention.choose(model, "cpu") == ("Dots1ForCausalLM", True, attention.ON_CPU)
    monkeypatch.setattr(attention, "cudnn_comes_first", lambda where: False)
    row = Part("attention", True, attention.SDPA, 1, "Dots1ForCausalLM")
    assert optimize(model, checkpoint="off", verbose=False).of("attention") == (row,)
    assert attention.INTERFACE not in {n for m in model.modules() for n in _others(m)}


@pytest.mark.parametrize(("version", "capability", "first"), [
    (91900, (9, 0), True), (91501, (10, 3), True), (91500, (9, 0), False), (None, (9, 0), False),
    (91900, (8, 0), False), (91900, (12, 0), False),
])  # fmt: skip
def test_where_cudnn_comes_first(monkeypatch, version, capability, first):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention.cudnn_comes_first("cuda") is first
    assert not attention.cudnn_comes_first("cpu")


def test_another_library_s_forward_stays(on_hopper):
    model = tiny_model("qwen3_moe", "eager", attn_implementation="sdpa")
    module = model.model.layers[1].self_attn
    module.forward = theirs = lambda *args, **kwargs: None
    with pytest.raises(FastexpertsError, match=r"put on the instance.*multiples of 128"):
        attention.forward_of(module, "cuda")
    on, off = optimize(model, checkpoint="off", verbose=False).of("attention")
    assert (on.on, on.modules, off.on, off.modules) == (True, 1, False, 1)
    assert module.forward is theirs


def test_no_other_module_is_a_candidate():
    model = tiny_model("qwen3_moe", "eager")
    assert set(attention.candidates(model)) == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    assert attention.candidates(nn.Linear(2, 2)) == {}


def test_compiled_as_one_graph():
    """The context is in the graph of the calls that need it, and in no other."""
    model = put(tiny_model("qwen3_moe", "eager", attn_implementation="sdpa"))
    for module in rotary.candidates(model).values():
        rotary.forward_of(module, "cuda").put()  # to tensors on the CPU that of the class
    module = model.model.layers[0].self_attn
    graphs, before = [], allowed()

    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for length, masked in ((ERRS, True), (ERRS, False), (40, True)):
        x = torch.randn(1, length, model.config.hidden_size)
        tables = model.model.rotary_emb(x, torch.arange(length)[None])
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if masked else None
        got, _ = compiled(x, tables, mask)
        assert torch.equal(got, module(x, tables, mask)[0])
        assert ("_sdpa_kernel" in graphs[-1]) == (length == ERRS and masked)
    assert len(graphs) == 3
    assert allowed() == before
