"""`lora_config`: exactly what was asked for is trainable, on every family, and it is said in numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stock_peft import STEPS, factors, logits, loss_curve, loss_curves
from stock_peft import adapted as stock_adapted
from support_hf import RESOLUTION, TINY, Ops, relative, tiny_model, tokens
from torch import nn

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.inventory import in_interface, interface_modules
from fastexperts.hf.lora import LoraSummary, lora_summary

SHARED = ("deepseek_v3", "ernie4_5_moe", "glm4_moe", "dots1", "qwen2_moe")
KINDS = ("experts", "attention", "shared experts", "router")


def adapted(model):
    """{kind: names of the adapted weights}, from the modules that PEFT put in, by family-free rules."""
    found = {kind: set() for kind in KINDS}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"
        weight = weight.removeprefix("base_model.model.")
        if in_interface(module.get_base_layer()):
            kind = "experts"
        elif "shared_expert" in name:
            kind = "shared experts"
        else:
            kind = "attention" if "attn" in name else "router"
        found[kind].add(weight)
    return found


def weights(model):
    """{kind: names of the weights that can be adapted}, of the tiny families, from their names."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]
    ends = {
        "experts": r"mlp\.experts\.(gate_up|down)_proj",
        "attention": r"self_attn\.\w*proj\w*\.weight",
        "shared experts": r"mlp\.shared_experts?\.\w+\.weight",
        "router": r"mlp\.gate\.weight",
    }
    return {kind: {name for name in names if re.search(rf"\.{end}$", name)} for kind, end in ends.items()}


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


CASES = {
    "default": {},
    "experts alone": {"attention": False},
    "attention alone": {"experts": False},
    "router alone": {"experts": False, "attention": False, "router": True},
    "everything": {"shared_experts": True, "router": True, "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", TINY)
def test_exactly_what_was_asked_for_is_trainable(family, case, capsys):
    asked = dict(CASES[case])
    if family not in SHARED:
        asked.pop("shared_experts", None)
    model = tiny_model(family, "eager")
    every, total = weights(model), trainable(model)
    assert all(every[kind] for kind in KINDS if kind != "shared experts" or family in SHARED)
    config = fastexperts.lora_config(model, 3, **asked)
    said = int(re.search(r": ([\d,]+) trainable parameters", capsys.readouterr().out)[1].replace(",", ""))
    peft_model = get_peft_model(model, config)
    defaults = {"experts": True, "attention": True, "shared_experts": False, "router": False}
    for kind, names in adapted(peft_model).items():
        wanted = every[kind] if (defaults | asked)[kind.replace(" ", "_")] else set()
        assert names == wanted, kind
    assert trainable(peft_model) == said
    assert 0 < said < total
    if "modules_to_save" not in asked:
        assert all("lora_" in name for name, p in peft_model.named_parameters() if p.requires_grad)
    # Each expert has an update of rank 3 of its own, whatever else is adapted.
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.lora_A["default"].weight.shape[0] == 3 * getattr(module, "num_experts", 1), name


@pytest.mark.parametrize("family", TINY)
def test_every_trainable_tensor_gets_a_gradient(family):
    fastexperts.register()
    model = tiny_model(family, "fastexperts")
    config = fastexperts.lora_config(model, 3, shared_experts=family in SHARED, router=True, verbose=False)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    peft_model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in peft_model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.norm() > 0, name


def test_the_summary_counts(capsys):
    model = tiny_model("qwen3_moe", "eager")
    fastexperts.lora_config(model, 4, alpha=8, router=True)
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["trained", "weights", "name", "experts", "rank", "parameters"]
    # 2 layers x 8 experts x 4 x (32 + 32), and the same with (16 + 32)
    assert lines[1] == ["experts", "2", "mlp.experts.gate_up_proj", "8", "4", "4,096"]
    assert lines[2] == ["experts", "2", "mlp.experts.down_proj", "8", "4", "3,072"]
    assert lines[3] == ["attention", "2", "self_attn.q_proj.weight", "-", "4", "512"]
    assert lines[7] == ["router", "2", "mlp.gate.weight", "-", "4", "320"]
    assert "rank 4, scale 2, in 2 layers: 9,280 trainable parameters" in lines[8][0]


def test_silence_and_the_config(capsys):
    model = tiny_model("deepseek_v3", "eager")
    config = fastexperts.lora_config(model, 8, alpha=4, verbose=False, use_rslora=True)
    assert capsys.readouterr().out == ""
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (8, 4, True, "CAUSAL_LM")
    assert config.target_parameters == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert fastexperts.lora_config(model, 8, verbose=False).lora_alpha == 8
    fastexperts.lora_config(model, 16, alpha=4, use_rslora=True)
    assert "scale 1," in capsys.readouterr().out, "alpha over the root of r"


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "dots1"])
def test_shared_experts_are_not_taken_for_routed_ones(family):
    """What a plain target_modules comes to: PEFT rewrites the names, and adapts the routed experts."""
    plain = LoraConfig(target_modules=[f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")])
    naive = adapted(get_peft_model(tiny_model(family, "eager"), plain))
    assert naive["experts"], "PEFT still rewrites: else target_modules would do"
    assert not naive["shared experts"]
    model = tiny_model(family, "eager")
    asked = {"experts": False, "attention": False, "shared_experts": True}
    ours = adapted(get_peft_model(model, fastexperts.lora_config(model, verbose=False, **asked)))
    assert len(ours["shared experts"]) == 3
    assert not ours["experts"]


def two_towers():
    """A text model beside a tower whose attention has the same names."""
    model = tiny_model("qwen3_moe", "eager")
    attention = nn.Module()
    attention.q_proj = nn.Linear(4, 4)
    layers = nn.ModuleList([nn.ModuleDict({"self_attn": attention})])
    model.vision = nn.ModuleDict({"layers": layers})
    return model


def test_another_tower_with_the_same_names_is_left_alone():
    model = two_towers()
    config = fastexperts.lora_config(model, 2, verbose=False)
    full = {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert full <= config.target_modules
    assert "self_attn.q_proj" not in config.target_modules
    assert "self_attn.k_proj" in config.target_modules, "no other has it: short names where they suffice"
    names = adapted(get_peft_model(model, config))["attention"]
    assert len(names) == 8
    assert not any("vision" in name for name in names)


def dense():
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    return AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads))


def test_attention_of_a_dense_model_with_dropout():
    model = dense()
    config = fastexperts.lora_config(model, experts=False, verbose=False, lora_dropout=0.1)
    assert config.lora_dropout == 0.1
    assert len(adapted(get_peft_model(model, config))["attention"]) == 8


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, num_local_experts=4, pad_token_id=0))


def qwen():
    return tiny_model("qwen3_moe", "eager")


def with_adapters():
    model = qwen()
    return get_peft_model(model, fastexperts.lora_config(model, verbose=False))


REFUSALS = {
    "no experts": (dense, {}, "`experts` got True, and Qwen3ForCausalLM has no experts", "experts=False"),
    "experts outside the interface": (llama4, {}, "does not dispatch 2 experts modules", "experts=False"),
    "no shared experts": (
        qwen,
        {"shared_experts": True},
        "`shared_experts` got True",
        "shared_experts=False",
    ),
    "no router": (dense, {"experts": False, "router": True}, "`router` got True", "router=False"),
    "nothing": (qwen, {"experts": False, "attention": False}, "nothing else to adapt", "attention=True"),
    "rank 0": (qwen, {"r": 0}, "`r` got 0", "from 1 to 128"),
    "rank 129": (qwen, {"r": 129}, "`r` got 129", "from 1 to 128"),
    "no whole rank": (qwen, {"r": 1.5}, "`r` got 1.5", "a whole number"),
    "a rank that is a bool": (qwen, {"r": True}, "`r` got True", "a whole number"),
    "alpha": (qwen, {"alpha": 0}, "`alpha` got 0", "more than 0"),
    "dropout": (qwen, {"lora_dropout": 0.1}, "`lora_dropout` got 0.1", "experts=False"),
    "DoRA": (qwen, {"use_dora": True}, "PEFT supports it on no experts", "attention alone"),
    "PiSSA": (qwen, {"init_lora_weights": "pissa"}, "`init_lora_weights` got 'pissa'", "True, False or"),
    "targets": (qwen, {"target_modules": ["x"]}, "`target_modules` got ['x']", "explicit targets"),
    "biases": (qwen, {"bias": "all"}, "`bias` got 'all'", "explicit targets"),
    "no such module": (qwen, {"modules_to_save": ["lm_heat"]}, "'lm_heat', which is no module", "lm_head"),
    "saved and adapted": (qwen, {"modules_to_save": ["mlp"]}, "`modules_to_save` got 'mlp'", "Leave one"),
    "adapters": (with_adapters, {}, "a model with adapters", "add_adapter"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_adapted_is_refused(case, capsys):
    make, options, *parts = REFUSALS[case]
    with pytest.raises(FastexpertsError) as error:
        fastexperts.lora_config(make(), **options)
    for part in (*parts, "it needs"):
        assert part in str(error.value)
    assert capsys.readouterr().out == ""


def test_ranks_at_the_ends():
    for rank in (1, 128):
        model = qwen()
        assert fastexperts.lora_config(model, rank, verbose=False).r == rank


def test_experts_that_are_quantised_are_refused_only_where_they_are_adapted():
    model = qwen()
    experts = next(iter(interface_modules(model).values()))
    experts.down_proj = nn.Parameter(torch.zeros(8, 32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(FastexpertsError, match=r"mlp.experts.down_proj, which is no plain floating-point"):
        fastexperts.lora_config(model)
    assert fastexperts.lora_config(model, experts=False, verbose=False).target_parameters is None


def test_layers_and_totals_of_the_summary():
    model = tiny_model("deepseek_v3", "eager")
    summary = lora_summary(model, 2, attention=False)
    assert isinstance(summary, LoraSummary)
    assert (summary.layers, len(summary.rows)) == (1, 2), "the first layer is dense"
    assert summary.trainable == 2 * 8 * ((32 + 32) + (32 + 16))
    assert summary.total == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def beside_stock(tmp_path_factory):
    """{family: (ours, stock's)}: the same training and the same adapters, there in a process of its own."""
    fastexperts.register()
    folder, ours = tmp_path_factory.mktemp("beside"), {}
    for family in ("qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral"):
        config = fastexperts.lora_config(
            tiny_model(family, "eager"), 4, alpha=8, shared_experts=family in SHARED, verbose=False
        )
        config.save_pretrained(folder / family / "config")
        model = stock_adapted(family, "fastexperts", config)
        start = factors(model)
        with Ops() as ops:
            losses = loss_curve(model)
        model.save_pretrained(folder / family / "adapter")
        end, folds = factors(model), ops.names.count("aten::baddbmm")
        ours[family] = {"losses": losses, "start": start, "end": end, "folds": folds, "logits": logits(model)}
    command = [sys.executable, str(Path(__file__).with_name("stock_peft.py")), str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, {family: (mine, torch.load(folder / family / "stock.pt")) for family, mine in ours.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral"])
def test_the_first_ten_losses_are_those_of_stock_peft(beside_stock, family, record_property):
    ours, stock = beside_stock[1][family]
    assert all(torch.equal(ours["start"][key], tensor) for key, tensor in stock["start"].items())
    assert stock["losses"][-1] < 0.9 * stock["losses"][0], "it trains"
    apart = ((ours["losses"] - stock["losses"]).abs() / stock["losses"]).max().item()
    print(f"{family}: largest relative deviation of {STEPS} losses {apart:.1e}")
    assert apart <= 1e-5
    assert ours["folds"] == 0
    assert stock["folds"] >= 2 * STEPS, "stock PEFT folds"


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral"])
def test_later_losses_are_as_near_as_those_of_grouped_mm(beside_stock, family):
    """Of five seeds, the median of what each deviates from eager at most."""
    folder, results = beside_stock
    eager, grouped = (results[family][1][f"curves of {name}"] for name in ("eager", "grouped_mm"))
    config = LoraConfig.from_pretrained(folder / family / "config")
    ours = loss_curves(family, "fastexperts", config)
    (early, late), (_, late_of_grouped) = (
        ((losses - eager).abs() / eager).split(STEPS, dim=1) for losses in (ours, grouped)
    )
    assert early.max() <= 1e-5
    apart, allowed = (part.amax(1).median().item() for part in (late, late_of_grouped))
    print(f"{family}: median deviation {apart:.1e}, of grouped_mm {allowed:.1e}")
    assert apart <= 2 * max(allowed, RESOLUTION)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral"])
def test_adapters_go_to_stock_peft_and_come_from_it(beside_stock, family):
    folder, results = beside_stock
    ours, stock = results[family]
    shapes = {key: tensor.shape for key, tensor in ours["end"].items()}
    assert shapes == {key: tensor.shape for key, tensor in stock["end"].items()}
    assert any("experts.base_layer.lora_A" in key for key in shapes)
    assert all(torch.equal(ours["end"][key], tensor) for key, tensor in stock["loaded"].items())
    assert relative(stock["logits of adapter"], ours["logits"]) <= 1e-5
    theirs = PeftModel.from_pretrained(tiny_model(family, "fastexperts"), folder / family / "stock")
    assert all(torch.equal(tensor, stock["end"][key]) for key, tensor in factors(theirs).items())
    with Ops() as ops:
        got = logits(theirs)
    assert ops.names.count("aten::baddbmm") == 0
    assert relative(got, stock["logits of stock"]) <= 1e-5
    assert relative(logits(tiny_model(family, "eager")), got) > 1e-2, "the adapter does something"


def test_a_model_that_does_not_generate_is_wrapped_all_the_same():
    """PEFT's wrapper of a causal model asks for what others do not have."""
    model = tiny_model("qwen3_moe", "eager").model
    config = fastexperts.lora_config(model, r=2, verbose=False)
    assert config.task_type is None
    assert get_peft_model(model, config)(tokens()).last_hidden_state.isfinite().all()
