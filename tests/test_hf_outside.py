"""fastexperts.hf.outside: families that transformers dispatches nowhere, against their own forwards."""

import copy
import io
from collections import Counter

import pytest
import torch
from spies import spy_backend, use_interpreter
from support_hf import Ops, assert_close, relative, saved_for_backward, tokens
from support_outside import FAMILIES, build, enabled, outputs
from torch._dynamo.backends.common import aot_autograd

import fastexperts
from fastexperts.activations import ACTIVATIONS
from fastexperts.hf import outside


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_class(family, checkpointing):
    ids, ours = tokens(), enabled(family)
    wanted = outputs(build(family), ids)
    if checkpointing:
        if not ours.supports_gradient_checkpointing:
            pytest.skip(f"transformers' {family} has no gradient checkpointing")
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Ops() as ops:
        got = outputs(ours, ids)
    assert ops.names.count("fastexperts::moe_mlp") == 2 * (1 + checkpointing)
    assert not {"aten::index_add", "aten::index_add_", "aten::one_hot"} & set(ops.names) or family == "jetmoe"
    assert any("expert" in name or "mlp.input_linear" in name for name in wanted)
    assert_close(got, wanted, tolerance=1e-5)


@pytest.mark.slow  # 4 s a family
@pytest.mark.parametrize("family", FAMILIES)
def test_the_triton_kernels_read_the_weights_as_they_are_stored(family, monkeypatch):
    """Transposed, flat, a part of a parameter, and two of them in one."""
    wanted = outputs(build(family), tokens(length=5))
    ours = enabled(family)
    use_interpreter(monkeypatch)
    with spy_backend() as calls:
        got = outputs(ours, tokens(length=5))
    assert {where for where, *_ in calls} == {"kernels"}
    assert_close(got, wanted, tolerance=1e-5)


def test_identity_experts_are_chosen_in_the_test():
    """Of longcat_flash, alone and beside others."""
    model, chosen = build("longcat_flash"), []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1] >= 4))
    model(tokens())
    counts = Counter(torch.cat(chosen).sum(-1).tolist())
    assert {1, 2, 3} <= counts.keys()


def test_sentinels_of_identity_experts_pass_the_check_of_ids(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_CHECK", "1")
    outputs(enabled("longcat_flash"), tokens())


def test_what_is_never_chosen_gets_a_zero_gradient():
    """The rows that longcat_flash's gate_up_proj has for identity experts."""
    got = outputs(enabled("longcat_flash"), tokens())
    gradient = got["model.layers.0.mlp.experts.gate_up_proj"]
    assert gradient.shape[0] == 7
    assert gradient[:4].any()
    assert not gradient[4:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_forward_of_the_class_back(family):
    model = enabled(family)
    ids = tokens()
    assert "forward" not in model.state_dict()
    assert outside.restore(model) == 2
    with Ops() as ops:
        logits = model(ids, use_cache=False)[0]
    assert not ops.ours()
    assert torch.equal(logits, build(family)(ids, use_cache=False)[0])
    assert outside.restore(model) == 0


def test_enable_can_be_called_again():
    model = enabled("dbrx")
    again = fastexperts.enable(model, verbose=False)
    assert len(again.served) == 2
    assert outside.restore(model) == 2


def test_the_row_says_what_is_served():
    row = fastexperts.enable(build("llama4"), verbose=False).rows[0]
    assert (row.name, row.cls, row.activation) == ("model.layers.0.feed_forward", "Llama4TextMoe", "swiglu")
    assert (row.experts, row.top_k, row.hidden, row.intermediate) == (4, 1, 32, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_and_a_pickle_compute_with_their_own_weights(family):
    model, ids = enabled(family), tokens()
    wanted = model(ids, use_cache=False)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        with Ops() as ops:
            assert torch.equal(twin(ids, use_cache=False)[0], wanted)
        assert ops.names.count("fastexperts::moe_mlp") == 2
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1.0)


@pytest.mark.parametrize("family", ["llama4", "dbrx", "longcat_flash", "jetmoe"])
def test_generation_after_a_step_is_that_of_the_class(family):
    prompt, written = tokens(length=6), []
    for make in (build, enabled):
        model = make(family)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outputs(model, tokens())
        optimizer.step()
        written.append(model.eval().generate(prompt, max_new_tokens=8, do_sample=False))
    assert written[0].shape[1] > 6
    assert torch.equal(*written)


@pytest.mark.parametrize("family", ["llama4", "longcat_flash", "step3p7"])  # that of dbrx raises
def test_autocast_keeps_dtypes_and_an_error_like_that_of_the_class(family):
    ids = tokens()
    exact = outputs(build(family), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, got = outputs(build(family), ids), outputs(enabled(family), ids)
    for name, tensor in got.items():
        assert tensor.dtype == theirs[name].dtype, name
    for name in (name for name in exact if "expert" in name or name == "logits"):
        # which of two near scores is taken can flip: the bound is on what the class itself errs
        assert relative(got[name], exact[name]) <= 2 * max(relative(theirs[name], exact[name]), 2**-8), name
    assert relative(got["logits"], exact["logits"]) > 2**-12, "the products ran in bf16"


def test_a_token_is_kept_once_and_no_dense_product_runs():
    """llama4 computes every expert for every token; here only what was chosen."""
    model = enabled("llama4")
    model(tokens())
    with saved_for_backward() as saved, spy_backend() as calls:
        model.model.layers[0].feed_forward(torch.randn(1, 48, 32))
    assert {tuple(result[0].shape) for _, name, result in calls if name == "up"} == {(48, 96)}
    assert not any(tensor.shape[0] == 4 * 48 for tensor in saved if tensor.dim() == 2)


def test_a_token_less_batch():
    block = enabled("llama4, two experts a token").model.layers[0].feed_forward
    assert block(torch.randn(1, 0, 32))[0].shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_serves_other_dtypes(family, dtype):
    assert outside.restore(enabled(family, dtype=dtype)) == 2


@pytest.mark.parametrize("family", ["longcat_flash", "step3p7"])
def test_peft_on_a_module_that_is_called_trains(family):
    peft = pytest.importorskip("peft")
    got = {}
    for make in (build, enabled):
        lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
        model = peft.get_peft_model(make(family), lora)
        rescale_factors(model)
        got[make] = outputs(model, tokens())
    assert all("lora_" in name for name in got[build] if name != "logits")
    assert_close(got[enabled], got[build])


def rescale_factors(model):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("family", ["llama4", "dbrx", "longcat_flash"])
def test_compiles_without_a_graph_break(family):
    torch._dynamo.reset()
    model, graphs = enabled(family), []

    def keep(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    module, *inputs = {
        "llama4": lambda: (model.model.layers[0].feed_forward,),
        "dbrx": lambda: (model.transformer.blocks[0].ffn.experts, *routing(4)),
        "longcat_flash": lambda: (model.model.layers[0].mlp.experts, *routing(7)),
    }[family]()
    x = torch.randn(1, 9, 32)
    x = x[0] if family == "longcat_flash" else x
    wanted = module(x, *inputs)
    with torch.no_grad():
        got = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x, *inputs)
    assert "fastexperts.moe_mlp.default" in graphs[0]
    first = (lambda output: output[0]) if family == "llama4" else (lambda output: output)
    assert relative(first(got), first(wanted)) <= 1e-6


def routing(ids, length=9):
    weight_TK, ids_TK = torch.rand(length, ids, generator=torch.Generator().manual_seed(0)).topk(3)
    return ids_TK, weight_TK


def test_the_activations_are_found_by_numbers():
    model = build("llama4", hidden_act="gelu")
    summary = fastexperts.enable(model, verbose=False)
    assert {row.activation for row in summary.served} == {"geglu"}
    assert "geglu" in ACTIVATIONS
