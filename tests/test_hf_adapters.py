"""Adapters in files: each layout against stock PEFT's logits, and back to the same bits."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support_adapters import EXPERTS, Trained, config_of
from support_hf import relative

from fastexperts.errors import FastexpertsError
from fastexperts.hf.adapters import CONFIG, WEIGHTS, differences, read_adapter
from fastexperts.hf.checkpoint import open_checkpoint

LAYER = "base_model.model.model.layers.1"
# r unlike E and above it; r = E; D = 2F, where [D, 2F] of gate and up is square.
CASES = {
    "r below E": {"r": 3},
    "r = E": {"r": 8},
    "r above E": {"r": 11},
    "D = 2F": {"r": 3, "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16},
    "D = F": {"r": 3, "hidden_size": 32, "moe_intermediate_size": 32, "intermediate_size": 32},
}


@pytest.fixture
def trained(tmp_path):
    def make(family="qwen3_moe", **arguments):
        return Trained(tmp_path, family, **arguments)

    return make


def assert_same_file(a, b):
    a, b = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.norm() > 0, key
        assert torch.equal(tensor, b[key]), key


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("qwen3_moe", case) for case in CASES),
        ("mixtral", "r above E"),
        ("deepseek_v3", "D = 2F"),
        ("glm4_moe", "D = 2F"),
    ],
)
def test_per_expert_and_back(trained, tmp_path, family, case):
    overrides = dict(CASES[case])
    made = trained(family, r=overrides.pop("r"), overrides=overrides)
    assert made.adapter.layout == "peft"
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    again = read_adapter(per_expert, made.base)
    assert again.layout == "per-expert"
    assert differences(made.adapter, again) == []
    back = made.written("peft", tmp_path / "back", again)
    assert_same_file(made.folder, back)
    assert made.notes == ()
    assert relative(made.stock(back), made.logits) <= 1e-6
    assert relative(made.stock(per_expert), made.logits) <= 1e-5
    assert relative(made.logits, made.run(made.model())) > 0.05


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", {"mlp.experts.7.gate_proj", "mlp.experts.7.up_proj", "mlp.experts.7.down_proj"}),
        (
            "mixtral",
            {
                "block_sparse_moe.experts.3.w1",
                "block_sparse_moe.experts.3.w3",
                "block_sparse_moe.experts.3.w2",
            },
        ),
    ],
)
def test_per_expert_has_the_names_and_numbers_of_the_checkpoint(trained, tmp_path, family, names):
    made = trained(family)
    folder = made.written("per-expert", tmp_path / "per-expert")
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    base = open_checkpoint(made.base_folder)
    last = next(iter(names)).split(".")[2]
    ours = [key.partition("layers.1.")[2] for key in tensors if f"layers.1.{next(iter(names))[:8]}" in key]
    found = {key.partition(".lora")[0] for key in ours if f"experts.{last}." in key}
    assert found == names
    assert config["target_modules"] == sorted({"q_proj", *(name.rpartition(".")[2] for name in names)})
    assert (config["r"], config["lora_alpha"], config["target_parameters"]) == (3, 5, None)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    # PEFT's own merge, read where the checkpoint keeps each matrix, is W + s B A of the pair beside it.
    merged = PeftModel.from_pretrained(made.model(), made.folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    wanted = open_checkpoint(tmp_path / "merged")
    for name in (f"model.layers.1.{name}" for name in names):
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        w = base.tensor(f"{name}.weight")
        assert relative(w + 5 / 3 * b @ a, wanted.tensor(f"{name}.weight")) <= 1e-6
        assert relative(w, wanted.tensor(f"{name}.weight")) > 0.05


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[::-1], ["gate_up_proj", "down_proj"]])
def test_the_order_of_target_parameters_does_not_nest(trained, targets):
    made = trained(overrides={"hidden_size": 32, "moe_intermediate_size": 16}, target_parameters=targets)
    inner = load_file(made.folder / WEIGHTS)[f"{LAYER}.mlp.experts.base_layer.lora_A.weight"]
    gate_up = made.adapter.experts["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up.a.flatten(0, 1), inner)
    assert gate_up.b.shape == (8, 32, 3)


@pytest.mark.parametrize("target", EXPERTS)
def test_a_lone_wrapper_is_what_the_config_targets(trained, tmp_path, target):
    made = trained(target_parameters=[target])
    assert {name.rpartition(".")[2] for name in made.adapter.experts} == {target.rpartition(".")[2]}
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    back = made.written("peft", tmp_path / "back", read_adapter(per_expert, made.base))
    assert config_of(back)["target_parameters"] == [target]
    assert_same_file(made.folder, back)
    assert relative(made.stock(back), made.logits) <= 1e-6


def test_a_nesting_the_other_way_round_is_seen_by_its_shapes(trained):
    made = trained()
    tensors = load_file(made.folder / WEIGHTS)

    def turned(key):
        if ".base_layer." in key:
            return key.replace(".base_layer.", ".")
        return key.replace(".experts.lora_", ".experts.base_layer.lora_")

    save_file({turned(key): tensor for key, tensor in tensors.items()}, made.folder / WEIGHTS)
    assert differences(made.adapter, read_adapter(made.folder, made.base)) == []


def test_reading_b_by_expert_changes_the_logits(trained):
    """B [out, r*E] read as [out, E, r], the classic bug: no symmetry hides it from the logits here."""
    made = trained()
    tensors = load_file(made.folder / WEIGHTS)
    for key, tensor in tensors.items():
        if ".experts." in key and "lora_B" in key:
            out = tensor.shape[0]
            tensors[key] = tensor.reshape(out, 8, 3).permute(0, 2, 1).reshape(out, 24).contiguous()
    save_file(tensors, made.folder / WEIGHTS)
    swapped = read_adapter(made.folder, made.base)
    assert len(differences(made.adapter, swapped)) == 4
    assert relative(made.stock(made.folder), made.logits) > 0.05


def test_gate_and_up_trained_apart_join_at_twice_the_rank(trained, tmp_path):
    made = trained()
    first = made.written("per-expert", tmp_path / "first")
    tensors = load_file(first / WEIGHTS)
    for key, tensor in tensors.items():
        if "up_proj.lora_A" in key:
            tensor.mul_(-0.5).add_(0.1)
    save_file(tensors, first / WEIGHTS)
    apart = read_adapter(first, made.base)
    joined = made.written("peft", tmp_path / "joined", apart)
    assert made.notes == ("gate and up have an A each: joined at rank 6, twice theirs",)
    config = config_of(joined)
    assert config["rank_pattern"] == {"mlp.experts.gate_up_proj": 6}
    assert config["alpha_pattern"] == {"mlp.experts.gate_up_proj": 10}
    # Stock PEFT joins the per-expert file in its own way: the numbers are its word against ours.
    assert relative(made.stock(joined), made.stock(first)) <= 1e-5
    assert relative(made.stock(joined), made.logits) > 0.01
    assert_same_file(first, made.written("per-expert", tmp_path / "back", read_adapter(joined, made.base)))
    assert config_of(tmp_path / "back")["rank_pattern"] == {}


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_their_own(trained, tmp_path, rslora):
    made = trained(
        rank_pattern={"experts.down_proj": 4},
        alpha_pattern={"mlp.experts.gate_up_proj": 9, "q_proj": 2},
        use_rslora=rslora,
    )
    scales = {name.rpartition(".")[2]: lora.scale for name, lora in made.adapter.experts.items()}
    root = (lambda r: r**0.5) if rslora else float
    assert scales == {"gate_up_proj": pytest.approx(9 / root(3)), "down_proj": pytest.approx(5 / root(4))}
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    assert "alpha_pattern" in made.notes[-1]
    assert "vLLM" in made.notes[-1]
    assert ("use_rslora" in made.notes[0]) == rslora
    again = read_adapter(per_expert, made.base)
    assert differences(made.adapter, again) == []
    back = made.written("peft", tmp_path / "back", again)
    assert_same_file(made.folder, back)
    assert relative(made.stock(back), made.logits) <= 1e-6


def test_what_peft_makes_of_rslora_per_expert_is_said(trained, tmp_path):
    made = trained(use_rslora=True)
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    assert "sqrt(2) too large" in made.notes[0]
    assert relative(made.stock(per_expert), made.logits) > 0.05, "PEFT scales it right by now: drop the note"


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
def test_what_peft_makes_of_gate_and_up_alone_is_said(trained, tmp_path, targets):
    made = trained(target_parameters=targets, target_modules=[])
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    lost = targets == EXPERTS[:1]
    assert (made.notes == ("without down, PEFT 0.21 reads gate and up as zeros; give it --to peft",)) == lost
    assert (relative(made.stock(per_expert), made.logits) > 0.05) == lost, "PEFT reads it by now?"


def test_some_layers_and_shared_experts_keep_to_themselves(trained, tmp_path):
    """PEFT takes the module name gate_proj for the experts: shared experts stay parameters."""
    shared = "mlp.shared_experts.gate_proj.weight"
    made = trained(
        "deepseek_v3",
        overrides={"num_hidden_layers": 3},
        target_modules=["o_proj"],
        target_parameters=["layers.2.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj", shared],
    )
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    assert not any("layers.1.mlp.experts" in key for key in load_file(per_expert / WEIGHTS))
    back = made.written("peft", tmp_path / "back", read_adapter(per_expert, made.base))
    experts = [f"model.layers.2.{name}" for name in reversed(EXPERTS)]
    assert config_of(back)["target_parameters"] == sorted([shared, *experts])
    assert_same_file(made.folder, back)
    assert relative(made.stock(back), made.logits) <= 1e-6


def test_shared_experts_named_as_modules_become_parameters(trained, tmp_path):
    shared = "mlp.shared_experts.gate_proj.weight"
    made = trained("deepseek_v3", target_modules=[], target_parameters=[*EXPERTS, shared])
    per_expert = made.written("per-expert", tmp_path / "per-expert")
    config = config_of(per_expert) | {"target_parameters": None}
    (per_expert / CONFIG).write_text(json.dumps(config))
    back = made.written("peft", tmp_path / "back", read_adapter(per_expert, made.base))
    assert config_of(back)["target_parameters"] == sorted([*EXPERTS, shared])
    assert config_of(back)["target_modules"] == []
    assert relative(made.stock(back), made.logits) <= 1e-6


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


WRONG = {
    "a layer too many": (
        "peft",
        rename(
            f"{LAYER}.mlp.experts.lora_A.weight", "base_model.model.model.layers.9.mlp.experts.lora_A.weight"
        ),
        "layers.1.mlp.experts.lora_A.weight",
    ),
    "a module that is not there": (
        "peft",
        rename(f"{LAYER}.self_attn.q_proj.lora_A.weight", f"{LAYER}.self_attn.query.lora_A.weight"),
        f"{LAYER}.self_attn.query.lora_A.weight",
    ),
    "another kind of key": (
        "peft",
        lambda tensors: tensors.update({f"{LAYER}.self_attn.q_proj.lora_magnitude_vector": torch.ones(4)}),
        "q_proj.lora_magnitude_vector",
    ),
    "no prefix": (
        "peft",
        rename(f"{LAYER}.self_attn.q_proj.lora_A.weight", "model.layers.1.self_attn.q_proj.lora_A.weight"),
        "got the key model.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "half a pair": (
        "peft",
        lambda tensors: tensors.pop(f"{LAYER}.mlp.experts.base_layer.lora_B.weight"),
        f"no {LAYER}.mlp.experts.base_layer.lora_B.weight",
    ),
    "a wrapper less than targets": (
        "peft",
        lambda tensors: [tensors.pop(f"{LAYER}.mlp.experts.base_layer.lora_{f}.weight") for f in "AB"],
        f"{LAYER}.mlp.experts",
    ),
    "another rank": (
        "peft",
        lambda tensors: tensors.update(
            {f"{LAYER}.mlp.experts.lora_A.weight": torch.ones(16, 16)}
            | {f"{LAYER}.mlp.experts.lora_B.weight": torch.ones(32, 16)}
        ),
        "rank 2 for model.layers.1.mlp.experts.down_proj",
    ),
    "another width": (
        "peft",
        lambda tensors: tensors.update({f"{LAYER}.self_attn.q_proj.lora_A.weight": torch.ones(3, 31)}),
        f"{LAYER}.self_attn.q_proj.lora_A.weight [3, 31]",
    ),
    "an expert missing": (
        "per-expert",
        lambda tensors: tensors.pop(f"{LAYER}.mlp.experts.5.up_proj.lora_B.weight"),
        f"no {LAYER}.mlp.experts.5.up_proj.lora_B.weight",
    ),
    "an expert too many": (
        "per-expert",
        rename(f"{LAYER}.self_attn.q_proj.lora_A.weight", f"{LAYER}.mlp.experts.8.up_proj.lora_A.weight"),
        f"{LAYER}.mlp.experts.8.up_proj.lora_A.weight",
    ),
    "gate without up": (
        "per-expert",
        lambda tensors: [
            tensors.pop(key) for key in list(tensors) if "layers.1.mlp" in key and "up_proj" in key
        ],
        f"no {LAYER}.mlp.experts.0.up_proj.lora_A.weight",
    ),
    "an expert of another shape": (
        "per-expert",
        lambda tensors: tensors.update({f"{LAYER}.mlp.experts.2.up_proj.lora_A.weight": torch.ones(4, 32)}),
        f"{LAYER}.mlp.experts.2.up_proj.lora_A.weight [4, 32]",
    ),
    "two layouts": (
        "per-expert",
        lambda tensors: tensors.update(
            {
                f"{LAYER}.mlp.experts.base_layer.lora_A.weight": torch.ones(24, 32),
                f"{LAYER}.mlp.experts.base_layer.lora_B.weight": torch.ones(32, 24),
                f"{LAYER}.mlp.experts.lora_A.weight": torch.ones(24, 16),
                f"{LAYER}.mlp.experts.lora_B.weight": torch.ones(32, 24),
            }
        ),
        "the layouts peft and per-expert",
    ),
}


@pytest.fixture(scope="module")
def both_layouts(tmp_path_factory):
    made = Trained(tmp_path_factory.mktemp("wrong"))
    return {
        "peft": made.folder,
        "per-expert": made.written("per-expert", made.folder.parent / "x"),
    }, made.base


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_place_raises_and_is_named(both_layouts, tmp_path, case):
    folders, base = both_layouts
    layout, break_it, complaint = WRONG[case]
    tensors = load_file(folders[layout] / WEIGHTS)
    break_it(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((folders[layout] / CONFIG).read_text())
    with pytest.raises(FastexpertsError) as raised:
        read_adapter(tmp_path, base)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"of_a_later_peft": {"rank": 1}}, "of_a_later_peft"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused(both_layouts, tmp_path, change, complaint):
    folders, base = both_layouts
    (tmp_path / WEIGHTS).symlink_to(folders["peft"] / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config_of(folders["peft"]) | change))
    with pytest.raises(FastexpertsError, match=complaint):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_every_setting_of_a_plain_lora_is_known(tmp_path, start):
    """Read as it is made: none of PEFT's defaults is taken for something else."""
    made = Trained(tmp_path, r=4, init_lora_weights=start, target_parameters=None, use_rslora=True)
    assert made.adapter.rest
