"""fastexperts.hf.outside: families that transformers dispatches nowhere, against their own forwards."""

import copy
import functools
import io
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
import transformers
from spies import spy_backend, use_interpreter
from support_hf import Ops, assert_close, relative, rescale, saved_for_backward, tokens
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import fastexperts
from fastexperts.activations import ACTIVATIONS
from fastexperts.errors import FastexpertsError
from fastexperts.hf import outside

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"
COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA4 = {**COMMON, "head_dim": 8, "intermediate_size_mlp": 40}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4": ("llama4_text", {**LLAMA4, "num_experts_per_tok": 1}),
    "llama4, two experts a token": ("llama4_text", LLAMA4),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": 97,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 3,
            "moe_topk": 5,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "routed_scaling_factor": 1.5,
        },
    ),
    "jetmoe": ("jetmoe", {**COMMON, "kv_channels": 8}),
    "step3p7": (
        "step3p5",  # the text part
        {
            **COMMON,
            "moe_intermediate_size": 16,
            "share_expert_dim": 16,
            "head_dim": 8,
            "mlp_layer_types": ["sparse", "sparse"],
            "sliding_window": 16,
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    name, values = FAMILIES[family]
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = CONFIG_MAPPING[name](**{**values, **overrides})
    if family == "step3p7":  # no auto class takes its text part alone
        from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

        model = Step3p7TextModel(config)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rescale(model)
    return model.to(dtype).train()


def enabled(family: str, **overrides: Any) -> Any:
    model = build(family, **overrides)
    fastexperts.enable(model, verbose=False, allow_unsupported=family == "jetmoe")
    return model


def outputs(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"logits", each trained parameter}: what the model gives for `ids`, and gradients of a loss of it."""
    model.zero_grad()
    logits = model(ids, use_cache=False)[0]
    target = torch.randint(logits.shape[-1], ids.shape, generator=torch.Generator().manual_seed(3))
    nnf.cross_entropy(logits.flatten(0, 1).float(), target.flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


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


def test_a_changed_activation_is_seen_at_the_next_call():
    model = enabled("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    inputs = (torch.randn(1, 5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2))
    experts(*inputs)
    experts.mlp.activation_fn = nn.GELU()
    wanted = type(experts).forward(experts, *inputs)
    assert relative(experts(*inputs), wanted) <= 1e-6
    experts.mlp.activation_fn = nn.Tanh()
    with pytest.raises(FastexpertsError, match="no Activation equals"):
        experts(*inputs)


def scaled_by(factor):
    def patch(forward):
        def forward_scaled(self, *args):
            output = forward(self, *args)
            return (factor * output[0], *output[1:]) if isinstance(output, tuple) else factor * output

        return forward_scaled

    return patch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_class_that_computes_otherwise_is_refused(family, monkeypatch):
    model = build(family)
    module = next(m for m in model.modules() if type(m).__name__ in outside.ADAPTERS)
    monkeypatch.setattr(type(module), "forward", scaled_by(1.01)(type(module).forward))
    with pytest.raises(FastexpertsError, match="on 4 tokens is not that of fastexperts"):
        fastexperts.enable(model)
    assert not outside.restore(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_serves_other_dtypes(family, dtype):
    assert outside.restore(enabled(family, dtype=dtype)) == 2


def patched_instance(model):
    block = model.model.layers[0].feed_forward
    block.forward = functools.partial(type(block).forward, block)


def another_activation(model):
    model.model.layers[0].feed_forward.experts.act_fn = nn.Mish()


def patched_layer(model):
    model.model.layers[0].forward = lambda hidden_states, **kwargs: hidden_states


def quantised(model):
    experts = model.model.layers[0].feed_forward.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)


def another_signature(model):
    """What a newer transformers may do."""
    block = model.model.layers[0].feed_forward

    class Llama4TextMoe(type(block)):
        def forward(self, hidden_states, mask):
            return super().forward(hidden_states)

    block.__class__ = Llama4TextMoe


def hooked(model):
    model.model.layers[0].feed_forward.experts.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patched_instance, "`forward` got one put on the instance"),
        (another_activation, "no Activation equals"),
        (patched_layer, r"never calls self\.feed_forward"),
        (hooked, "`experts` got a Llama4TextExperts with hooks"),
        (lambda model: model.to("meta"), "the meta device"),
        (quantised, "quantised"),
        (another_signature, r"`forward` got TypeError \(.+mask"),
    ],
)
def test_what_an_adapter_does_not_serve_is_refused(change, message):
    model = build("llama4")
    change(model)
    with pytest.raises(FastexpertsError, match=FORM) as error:
        fastexperts.enable(model)
    assert error.match(message)
    assert not outside.restore(model)


def test_hooks_put_on_later_are_refused_at_the_call():
    model = enabled("llama4")
    hooked(model)
    with pytest.raises(FastexpertsError, match="with hooks"):
        model(tokens())


@pytest.mark.parametrize("family", ["llama4", "jetmoe"])
def test_peft_on_weights_that_are_read_is_refused(family):
    """Its factors would have no effect, and nothing would say so."""
    peft = pytest.importorskip("peft")
    target = {"llama4": "feed_forward.experts.gate_up_proj", "jetmoe": "mlp.input_linear.weight"}[family]
    model = peft.get_peft_model(enabled(family), peft.LoraConfig(target_parameters=[target], r=2))
    with pytest.raises(FastexpertsError, match="got a ParamWrapper"):
        model(tokens())


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


def test_a_clamp_after_the_activation_has_no_row():
    """Two layers of Step-3.7-Flash; the others are served."""
    model = build("step3p7", swiglu_limits=[0.0, 2.0])
    with pytest.raises(FastexpertsError, match="no Activation equals"):
        fastexperts.enable(model)
    summary = fastexperts.enable(model, allow_unsupported=True, verbose=False)
    assert [row.name for row in summary.served] == ["layers.0.mlp.experts"]
    assert outside.restore(model) == 1


def test_attention_experts_are_said():
    model = build("jetmoe")
    with pytest.raises(FastexpertsError, match="projections of an attention") as error:
        fastexperts.enable(model)
    assert "JetMoeMoA, 2" in str(error.value)
    assert not outside.restore(model), "nothing is switched in part"


def test_every_reason_names_a_class_that_is_found():
    assert not outside.REASONS.keys() & outside.ADAPTERS.keys()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["doge"](**{**COMMON, "is_moe": True, "num_experts": 16})
        )
    with pytest.raises(FastexpertsError, match="rows of two embeddings"):
        fastexperts.enable(model)


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
