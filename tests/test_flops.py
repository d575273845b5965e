"""FLOPs are those that PyTorch counts: every family, forward and backward, whatever is frozen or adapted."""

import re
from dataclasses import fields

import pytest
import torch
from families import case_of, cases, has_all_families, tiny_family
from peft import LoraConfig, get_peft_model
from support_hf import tiny_config, tiny_model, tokens
from support_outside import build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING

from fastexperts.errors import FastexpertsError
from fastexperts.metrics.flops import FlopsPerToken, Work, count_flops
from fastexperts.metrics.mixers import Span
from fastexperts.metrics.places import Place
from fastexperts.metrics.products import weights

LENGTH = 8  # the shrunk families' window: within it, eager attention computes what is counted
BATCH = 2
CHUNKS = "its chunked form computes more than the recurrence that is counted"
APART = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "kimi_linear", "glm5_next", "bailing_hybrid"), CHUNKS),
    **dict.fromkeys(("minimax", "granitemoehybrid", "nemotron_h", "jamba", "qwen4_exp"), CHUNKS),
    **dict.fromkeys(("inkling", "inkling2", "lfm2_moe", "zaya"), "PyTorch counts a grouped dW as a full one"),
    "deepseek_v4": "its residual streams are mixed by a product, which is not counted",
    "openai_privacy_filter": "its head is no LM head",
}
"""Families whose whole count differs, and why; their weights are compared one by one."""
DIFFUSION = "diffusion_gemma"  # its encoder runs on other tokens, and is named as not counted
TALKER = "Qwen3OmniMoeTalkerTextExperts"
PLAIN = [case for case in cases() if case.family not in {*APART, DIFFUSION} and case.experts != TALKER]
OVERRIDES = {"unlimited_ocr": {"text_config": {"num_key_value_heads": 4}}}  # its eager attention knows no GQA


def eager(model):
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    return model.train()


def measured(model, length=LENGTH):
    """(forward, backward) FLOPs of a token, as PyTorch counts them on eager attention and experts."""
    ids = tokens(batch=BATCH, length=length, vocabulary=90)
    with FlopCounterMode(display=False) as forward:
        out = model(input_ids=ids)
    with FlopCounterMode(display=False) as backward:
        (out.logits if "logits" in out else out.last_hidden_state).sum().backward()
    return [counter.get_total_flops() / (BATCH * length) for counter in (forward, backward)]


def assert_counted(model, length=LENGTH):
    forward, backward = measured(model, length)
    counted = count_flops(model).per_token(length).by("full")
    assert (counted.forward, counted.backward) == pytest.approx((forward, backward), rel=1e-3)


@pytest.mark.skipif(not has_all_families(), reason="this transformers has fewer families")
def test_most_families_are_compared_as_a_whole():
    assert len({case.family for case in PLAIN}) >= 40
    assert set(APART) <= {case.family for case in cases()}, "a family of this table is gone"


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_forward_and_backward_are_what_pytorch_counts(case):
    assert_counted(eager(tiny_family(case, **OVERRIDES.get(case.family, {}))))


@pytest.mark.parametrize(
    ("family", "sizes", "tolerance"),
    [
        ("dbrx", {}, 1e-3),
        ("step3p7", {}, 1e-3),
        ("llama4", {"num_experts_per_tok": 4}, 1e-3),  # its own forward computes all of the 4
        ("longcat_flash", {}, 0.02),  # by the luck of its router, which sends tokens to identity experts too
    ],
)
def test_families_outside_the_interface_are_what_pytorch_counts(family, sizes, tolerance):
    model = eager(build(family, **sizes))
    measured_both = measured(model)
    counted = count_flops(model).per_token(LENGTH).by("full")
    assert (counted.forward, counted.backward) == pytest.approx(measured_both, rel=tolerance)


def test_llama4_is_counted_for_the_experts_of_a_token():
    one, two = (count_flops(build("llama4", num_experts_per_tok=k)).per_token(LENGTH) for k in (1, 2))
    layers, d, f = 2, 32, 48
    assert one.experts.forward == 2 * layers * 3 * d * f
    assert two.experts == one.experts * 2
    assert two.dense == one.dense


@pytest.mark.parametrize("family", APART)
def test_each_weight_is_what_pytorch_counts(family):
    model = eager(tiny_family(case_of(family)))
    decoder = model.get_decoder()
    counted = {}
    for weight in weights(decoder):
        counted[weight.module] = counted.get(weight.module, 0) + 2 * weight.products
    with FlopCounterMode(display=False, depth=99) as counter:
        model(input_ids=tokens(batch=BATCH, length=LENGTH, vocabulary=90))
    root = next(name for name, module in model.named_modules() if module is decoder)
    prefix = f"{type(model).__name__}.{root}."
    got = {
        name.removeprefix(prefix): sum(ops.values()) / (BATCH * LENGTH)
        for name, ops in counter.get_flop_counts().items()
    }
    linear = {
        name: flops for name, flops in counted.items() if isinstance(decoder.get_submodule(name), nn.Linear)
    }
    # Not called as modules, or on one token more: what they are worth is in the weights, all the same.
    outside = re.compile(r"indexer|dt_proj|v_proj_delayed")
    compared = {name for name in linear if not outside.search(name)}
    assert len(compared) > 0.7 * len(linear)
    assert {name: got[name] for name in compared} == pytest.approx({name: linear[name] for name in compared})
    experts = {name: flops for name, flops in counted.items() if name.endswith(".experts")}
    assert experts
    assert {name: got[name] for name in experts} == pytest.approx(experts)


# State elements from each family's tiny config, times 2 FLOPs, times the products with the state.
RECURRENCES = {
    # S_t = a S_(t-1) (I - b k k^T) + b v k^T, o = S q: Gated Delta Networks, arXiv 2412.06464, eq. 10.
    # Read by k, written, read by q: 3. 4 value heads of 8 x 8.
    "qwen3_next": 2 * 3 * (4 * 8 * 8),
    "qwen3_5_moe": 2 * 3 * (4 * 8 * 8),
    # The same with a decay for each channel: Kimi Linear, arXiv 2510.26692, eq. 1. 4 heads of 16 x 16.
    "kimi_linear": 2 * 3 * (4 * 16 * 16),
    # h_t = A_t h_(t-1) + B_t x_t, y = C_t h_t: Mamba-2, arXiv 2405.21060, eq. 1. Written, read: 2. 8 heads of
    # 8, states of 8.
    "granitemoehybrid": 2 * 2 * (8 * 8 * 8),
    "nemotron_h": 2 * 2 * (8 * 8 * 8),
    # The same with a state of 16 for each of 64 channels: Mamba, arXiv 2312.00752, eq. 2.
    "jamba": 2 * 2 * (64 * 16),
    # kv_t = r kv_(t-1) + k^T v, o = q kv: Lightning Attention-2, arXiv 2401.04658, eq. 4. 4 heads of 8 x 8.
    "minimax": 2 * 2 * (4 * 8 * 8),
}


@pytest.mark.parametrize("family", RECURRENCES)
def test_a_recurrence_is_counted_by_its_formula(family):
    """One of the two layers has it; its backward is twice its forward."""
    per_token = count_flops(tiny_family(case_of(family))).per_token(LENGTH)
    forward = RECURRENCES[family]
    assert per_token.recurrence == Work(forward, 2 * forward, forward)
    assert count_flops(tiny_model("qwen3_moe", "eager")).per_token(LENGTH).recurrence == Work()


FROZEN = {
    "nothing": ".",
    "all but the last layer": r"layers\.1",
    "all but a middle block": r"layers\.0\.mlp",
    "all but a router": r"gate\.",
    "all but experts": "experts",
    "all but the head": "lm_head",
    "embeddings": "^(?!.*embed)",
    "all but down projections": r"layers\.1.*down_proj",
    "all but norms": "norm",
    "all but attention": r"layers\.1\.self_attn",
}


@pytest.mark.parametrize("pattern", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_frozen_weights_are_what_pytorch_counts(family, pattern):
    model = eager(tiny_model(family, "eager"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert_counted(model, 16)


ATTENTION = {
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}


@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]], ids=["lora", "lora and whole modules"])
@pytest.mark.parametrize("family", ATTENTION)
def test_lora_of_attention_is_what_pytorch_counts(family, saved):
    config = LoraConfig(r=4, target_modules=ATTENTION[family], modules_to_save=saved)
    assert_counted(get_peft_model(eager(tiny_model(family, "eager")), config), 16)


@pytest.mark.parametrize("targets", [["lm_head"], [*ATTENTION["qwen3_moe"], "lm_head"]], ids=["alone", "too"])
def test_lora_of_the_head_is_what_pytorch_counts(targets):
    config = LoraConfig(r=4, target_modules=targets)
    assert_counted(get_peft_model(eager(tiny_model("qwen3_moe", "eager")), config), 16)


def test_lora_of_experts_is_counted_for_the_experts_of_a_token():
    """By hand: stock PEFT folds the update into all experts, which is no model FLOP."""
    rank, names = 4, ["gate_up_proj", "down_proj"]
    config = LoraConfig(r=rank, target_parameters=[f"mlp.experts.{name}" for name in names])
    model = get_peft_model(tiny_model("qwen3_moe", "eager"), config)
    per_token = count_flops(model).per_token(LENGTH)
    layers, k, d, f = 2, 2, 32, 16
    gate_up, down = d * 2 * f, f * d
    a_up, b_up, a_down, b_down = d * rank, 2 * f * rank, f * rank, d * rank
    factors = a_up + b_up + a_down + b_down
    forward = 2 * layers * k * (gate_up + down + factors)
    # dW of every factor; dx of all but the first layer's gate_up and A, which read frozen embeddings only
    # through frozen attention.
    dx = layers * (gate_up + down + factors) - gate_up - a_up
    backward = 2 * k * (layers * factors + dx)
    assert per_token.experts == Work(forward, backward, forward)


def test_a_compiled_model_counts_the_same():
    model = tiny_model("qwen3_moe", "eager")
    assert count_flops(torch.compile(model, backend="eager")) == count_flops(model)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "gemma4"])
def test_a_config_counts_like_its_model(family):
    model = tiny_family(case_of(family))
    assert count_flops(model.config) == count_flops(model)


@pytest.mark.parametrize(
    ("family", "total", "active"),
    [
        # Model cards: DeepSeek-V3 671B, 37B activated; Mixtral-8x7B 46.7B, 12.9B. Embeddings are included
        # here, where DeepSeek leaves the input's out: 0.9B of 129,280 x 7168.
        ("deepseek_v3", 671.0e9, 37.5e9),
        ("mixtral", 46.7e9, 12.9e9),
    ],
)
def test_published_sizes(family, total, active):
    counted = count_flops(CONFIG_MAPPING[family]())
    assert counted.parameters == pytest.approx(total, rel=2e-3)
    assert counted.active_parameters == pytest.approx(active, rel=3e-3)


def test_training_costs_six_flops_a_weight_and_twelve_a_key():
    """6 N + 12 L H Q S, of PaLM's appendix B, with N the weights that a token meets: no embeddings."""
    config = CONFIG_MAPPING["mixtral"]()
    counted, length = count_flops(config), 4096
    met = counted.active_parameters - config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    heads = config.num_hidden_layers * config.num_attention_heads * 128
    total = 6 * (met - norms) + 12 * heads * length
    assert counted.per_token(length).by("full").total == pytest.approx(total, rel=1e-9)
    causal = total - 12 * heads * (length - (length + 1) / 2)
    assert counted.per_token(length).by("causal").total == pytest.approx(causal, rel=1e-9)


def test_a_window_limits_the_keys():
    """gpt_oss: one layer of the two has the window."""
    config = tiny_family(case_of("gpt_oss")).config
    config.sliding_window = 8
    length = 24
    per_token = count_flops(config).per_token(length)
    heads = config.num_attention_heads * config.head_dim
    seen = torch.arange(1, length + 1).double()
    causal = 4 * heads * (seen.mean() + seen.clamp(max=8).mean())
    assert per_token.attention_scores_full.forward == 4 * heads * (length + 8)
    assert per_token.attention_scores_causal.forward == pytest.approx(causal.item())


@pytest.mark.parametrize(
    ("family", "sizes", "windows"),
    [
        ("mixtral", {"sliding_window": 16}, {16}),  # every layer's, from the config
        ("phimoe", {"sliding_window": 16}, {16}),
        ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": False}, {None}),
        (
            "exaone_moe",
            {"sliding_window": 16},
            {16, None},
        ),  # modules keep the window where they do not use it
        ("kolibri1", {"sliding_window": 16}, {16, None}),
        ("gemma4", {"sliding_window": 16}, {16, None}),
    ],
)
def test_windows_are_read_where_a_family_keeps_them(family, sizes, windows):
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if len(windows) == 2 else {}
    spans = count_flops(tiny_family(case_of(family), **sizes, **layers)).pairs
    assert {span.limit for span in spans} == windows


def test_tied_embeddings_are_parameters_once():
    untied, tied = (count_flops(tiny_config("qwen3_moe", tie_word_embeddings=tie)) for tie in (False, True))
    assert untied.parameters - tied.parameters == 97 * 32
    assert untied.active_parameters - tied.active_parameters == 97 * 32
    assert untied.per_token(8) == tied.per_token(8)


def test_sparse_attention_meets_what_its_indexer_chooses():
    config = tiny_config("deepseek_v3").to_dict() | {
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
    }
    config = CONFIG_MAPPING["deepseek_v32"](
        **{key: config[key] for key in config if not key.startswith(("model_type", "rope", "layer"))}
    )
    per_token = count_flops(config).per_token(16)
    scores, indexer = 4 * (16 + 8), 2 * (16 + 1)
    layers = config.num_hidden_layers
    assert per_token.attention_scores_full.forward == 2 * layers * (4 * scores + 16 * indexer)
    assert per_token.attention_scores_full.backward == 2 * 2 * layers * 4 * scores, (
        "no gradient through a choice"
    )


def test_compressed_attention_meets_every_nth_key_too():
    model = tiny_family(case_of("deepseek_v4"))
    spans = set(count_flops(model).pairs)
    assert {Span(8), Span(None, 128), Span(512, 4)} <= spans
    met = Span(2, 4).met(torch.arange(1, 14))
    assert met.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_checkpointing_repeats_the_layers(family):
    model = eager(tiny_model(family, "eager"))
    counted = count_flops(model).per_token(16).by("full")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, backward = measured(model, 16)
    # PyTorch stops before a dense layer's last product, which nothing in the backward reads.
    assert counted.backward + counted.repeated == pytest.approx(backward, rel=0.03)
    assert counted.repeated > 0.3 * counted.backward


def test_the_parts_add_up_and_are_shown():
    per_token = count_flops(tiny_model("qwen2_moe", "eager")).per_token(16)
    parts = [getattr(per_token, field.name) for field in fields(FlopsPerToken) if field.name != "length"]
    both = sum(part.total for part in parts)
    assert per_token.by("full").total + per_token.attention_scores_causal.total == pytest.approx(both)
    text = str(per_token)
    for row in ("experts", "dense", "router", "lm head", "attention scores full", "attention scores causal"):
        assert row in text
    for row in ("total, causal attention", "total, full attention"):
        assert row in text
    assert "recurrence" not in text, "what the model does not have is not shown"


def test_what_is_not_counted_is_named():
    assert count_flops(tiny_family(case_of("qwen3_vl_moe"))).not_counted == ("model.visual",)
    assert count_flops(tiny_model("qwen3_moe", "eager")).not_counted == ()


def test_differential_attention_weighs_two_heads_values():
    """Scores once for each head, and what a head weighs is twice as wide: arXiv 2410.05258, eq. 1.

    transformers 5.23 computes the scores twice, once for each half of the values.
    """
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    per_token = count_flops(CONFIG_MAPPING["diffllama"](**sizes)).per_token(LENGTH)
    assert per_token.attention_scores_full.forward == 2 * 2 * 4 * (8 + 2 * 8) * LENGTH


@pytest.mark.parametrize(
    "family", ["t5", "switch_transformers", "jetmoe", "bert", "gptj", "codegen", "openai-gpt"]
)
def test_what_cannot_be_told_is_refused(family):
    config = CONFIG_MAPPING[family](num_hidden_layers=1, num_layers=1)
    with pytest.raises(FastexpertsError, match=r"count_flops: `model` got .*; it needs "):
        count_flops(config)


def test_a_mixer_that_is_not_known_is_refused():
    class StrangeMixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(2, 2)

    model = tiny_model("qwen3_moe", "eager")
    model.model.layers[1].self_attn = StrangeMixer()
    with pytest.raises(FastexpertsError, match=r"layers\.1\.self_attn, a StrangeMixer"):
        count_flops(model)


def test_sharded_weights_and_lengths_of_nothing_are_refused():
    model = tiny_model("qwen3_moe", "eager")
    with pytest.raises(FastexpertsError, match="length"):
        count_flops(model).per_token(0)
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(torch.empty(0, 32, 16))
    with pytest.raises(FastexpertsError, match="sharded"):
        count_flops(model)


def test_places_are_in_the_order_of_the_forward():
    places = {weight.module: weight.place for weight in weights(tiny_model("qwen3_moe", "eager").model)}
    first = places["layers.0.self_attn.q_proj"]
    assert first == places["layers.0.self_attn.v_proj"]
    assert first < places["layers.0.self_attn.o_proj"] < places["layers.0.mlp.gate"]
    assert places["layers.0.mlp.gate"] < places["layers.1.self_attn.q_proj"] < Place(float("inf"), 0, 0)
