"""fastexperts.enable and its Summary: what is switched, what is not and why; nothing is switched in part."""

import pytest
import torch
from support_hf import Ops, tiny_config, tiny_model, tokens, toy_experts
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel

import fastexperts
from fastexperts.activations import ACTIVATIONS, Activation
from fastexperts.errors import FastexpertsError
from fastexperts.hf.inventory import Row, Summary, label_of, outside_modules, row_of

FORM = r"`.+` got (.|\n)+; it needs .+\. .+"
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family, loader=AutoModelForCausalLM, **overrides):
    with torch.device("meta"):
        return loader.from_config(CONFIG_MAPPING[family](**{**COMMON, **overrides}))


def odd():
    """A model whose gate is no row of ours."""
    return tiny_model("olmoe", "eager", hidden_act="mish")


class Pair(PreTrainedModel):
    """Two models under one roof, each with its own config."""

    config_class = type(tiny_config("qwen3_moe"))

    def __init__(self, first, second):
        super().__init__(self.config_class())
        self.first, self.second = first, second


def test_every_layer_is_switched_and_shown_on_one_line(capsys):
    model = tiny_model("qwen3_moe", "eager")
    summary = fastexperts.enable(model)
    assert summary.rows[1] == Row(
        "model.layers.1.mlp.experts",
        "Qwen3MoeExperts",
        True,
        "swiglu",
        experts=8,
        top_k=2,
        hidden=32,
        intermediate=16,
    )
    assert len(summary.served) == 2
    assert model.config._experts_implementation == "fastexperts"
    printed = capsys.readouterr().out
    assert printed == f"{summary}\n"
    header, line = printed.splitlines()
    assert line.split() == [
        "2",
        "model.layers.*.mlp.experts",
        "Qwen3MoeExperts",
        "swiglu",
        "8",
        "2",
        "32",
        "16",
        "yes",
    ]
    assert header.index("top-k") == line.index("2 ", line.index("8")), "columns are aligned"


def test_it_prints_nothing_when_asked_not_to(capsys):
    fastexperts.enable(tiny_model("qwen3_moe", "eager"), verbose=False)
    assert not capsys.readouterr().out


def test_it_can_be_called_again():
    model = tiny_model("mixtral", "fastexperts")
    assert fastexperts.enable(model, verbose=False) == fastexperts.enable(model, verbose=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_dims_are_read_by_layout(transposed):
    module = toy_experts(experts=5, hidden=16, intermediate=12, is_transposed=transposed)
    module.config.moe_k = 3
    assert row_of("name", module, served=True) == Row("name", "ToyExperts", True, "", 5, 3, 16, 12)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_found(wrap):
    model = tiny_model("qwen3_moe", "eager")
    assert len(fastexperts.enable(wrap(model), verbose=False).served) == 2
    assert model.config._experts_implementation == "fastexperts"


def test_a_peft_model_is_found():
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", "eager")
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    summary = fastexperts.enable(peft.get_peft_model(model, lora), verbose=False)
    assert len(summary.rows) == len(summary.served) == 2
    assert (summary.rows[0].experts, summary.rows[0].intermediate) == (8, 16)


def test_what_lies_beside_wrapped_experts_is_not_taken_for_experts():
    """muse_spark has an `pre_expert_proj` beside its experts, and PEFT puts them two modules deeper."""
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", "eager")
    model.model.layers[0].mlp.pre_expert_proj = nn.Linear(32, 32)
    lora = peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)
    assert not list(outside_modules(model))
    assert not list(outside_modules(peft.get_peft_model(model, lora)))


class Renamed(MixtralForCausalLM):
    """Transformers looks for its decorator in the source of this file, finds none, and switches nothing."""


def test_a_class_that_transformers_does_not_recognise_is_switched():
    config = tiny_config("mixtral")
    config._experts_implementation = "eager"
    model = Renamed(config)
    assert len(fastexperts.enable(model, verbose=False).served) == 2
    with Ops() as ops:
        model(tokens())
    assert ops.names.count("fastexperts::moe_mlp") == 2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: "Qwen/Qwen3-30B-A3B", "str"),
        (lambda: None, "NoneType"),
        (lambda: nn.Linear(4, 4), "Linear"),
        (lambda: build("llama"), "no experts were found"),
        (lambda: build("mamba"), "no experts were found"),
        (odd, "OlmoeExperts._apply_gate"),
    ],
)
@pytest.mark.parametrize("allow_unsupported", [False, True])
def test_a_model_that_cannot_be_served_is_refused(make, named, allow_unsupported):
    with pytest.raises(FastexpertsError, match=FORM) as error:
        fastexperts.enable(make(), allow_unsupported=allow_unsupported)
    assert named in str(error.value)


def doge():
    return build("doge", is_moe=True, num_experts=16, num_experts_per_tok=2)


def test_experts_outside_the_interface_are_said():
    """Transformers accepts the name for these and ignores it; tests/test_hf_outside.py has those we adapt."""
    with pytest.raises(FastexpertsError, match="rows of two embeddings") as error:
        fastexperts.enable(doge())
    assert "mlp (DogeCDMoE, 2)" in str(error.value)


def test_experts_that_nobody_knows_are_said():
    model = tiny_model("mixtral", "eager")
    model.adapter = nn.Module()
    model.adapter.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(FastexpertsError, match="not in transformers' experts interface") as error:
        fastexperts.enable(model)
    assert "adapter.experts (ModuleList, 1)" in str(error.value)


@pytest.mark.parametrize("family", ["llama", "mamba", "gemma3_text"])
def test_dense_models_have_no_experts(family):
    assert not list(outside_modules(build(family, head_dim=8)))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "ernie4_5_moe"])
def test_shared_experts_and_routers_are_not_taken_for_routed_experts(family):
    assert not list(outside_modules(tiny_model(family, "eager")))


def test_a_list_of_experts_is_found():
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    model.shared_experts = nn.ModuleList([nn.Linear(2, 2)])
    assert [name for name, _ in outside_modules(model)] == ["experts"]


def test_one_unsupported_module_stops_the_switch():
    model = Pair(tiny_model("mixtral", "eager"), odd())
    before = model.second.config._experts_implementation
    with pytest.raises(FastexpertsError, match="allow_unsupported=True") as error:
        fastexperts.enable(model)
    assert "OlmoeExperts, 2" in str(error.value)
    assert model.first.config._experts_implementation == "eager"
    assert model.second.config._experts_implementation == before


def test_an_allowed_unsupported_module_stays_as_it_was():
    model = Pair(tiny_model("mixtral", "eager"), odd())
    model.second.set_experts_implementation("batched_mm")
    summary = fastexperts.enable(model, allow_unsupported=True, verbose=False)
    assert [row.cls for row in summary.served] == ["MixtralExperts"] * 2
    assert [row.cls for row in summary.not_served] == ["OlmoeExperts"] * 2
    assert model.first.config._experts_implementation == "fastexperts"
    assert model.second.config._experts_implementation == "batched_mm"
    assert str(summary).count("no: fastexperts: `OlmoeExperts._apply_gate` got") == 1


def test_allowed_experts_outside_the_interface_are_rows():
    pair = Pair(tiny_model("mixtral", "eager"), doge())
    summary = fastexperts.enable(pair, allow_unsupported=True, verbose=False)
    assert {row.cls for row in summary.not_served} == {"DogeCDMoE"}
    assert len(summary.served) == 2


def test_modules_that_share_a_config_stay_together():
    """Transformers dispatches per config: one refused layer keeps its neighbours, and they say so."""
    mixed, whole = tiny_model("mixtral", "eager"), tiny_model("qwen3_moe", "eager")
    mixed.model.layers[1].mlp.experts._apply_gate = lambda h: h.chunk(2, dim=-1)[0]
    summary = fastexperts.enable(Pair(whole, mixed), allow_unsupported=True, verbose=False)
    assert [row.name for row in summary.served] == [f"first.model.layers.{i}.mlp.experts" for i in range(2)]
    reasons = {row.name: row.reason for row in summary.not_served}
    assert (
        "shares its config with second.model.layers.1.mlp.experts"
        in reasons["second.model.layers.0.mlp.experts"]
    )
    assert "no Activation equals" in reasons["second.model.layers.1.mlp.experts"]
    assert mixed.config._experts_implementation == "eager"
    with pytest.raises(FastexpertsError, match="none of whose experts can be served"):
        fastexperts.enable(mixed, allow_unsupported=True)


def test_a_model_inside_a_config_of_its_own_is_switched():
    config = CONFIG_MAPPING["qwen3_vl_moe"](
        text_config={
            **COMMON,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 4,
            "out_hidden_size": 32,
        },
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    summary = fastexperts.enable(model, verbose=False)
    assert len(summary.served) == 2
    assert config.text_config._experts_implementation == "fastexperts"


def test_labels_name_the_row_and_what_differs():
    assert [label_of(row) for row in ACTIVATIONS.values()] == list(ACTIVATIONS)
    assert label_of(Activation("silu", limit=10.0)) == "swiglu(limit=10.0)"
    assert label_of(Activation("relu", gated=False)) == "relu"


def test_a_summary_of_nothing_is_its_header():
    assert str(Summary(())).startswith("modules  name")
