"""optimize(): a model's whole step, with every part on and with each off, beside the model as it was."""

import pytest
import torch
import transformers
from families import cases, tiny_family
from support_hf import assert_close, relative, tiny_model, tokens
from support_liger import DEVICE, run_liger, step

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf import attention, liger, linear_lora, loss, norms, recompute, rotary, swiglu
from fastexperts.hf.optimize import PARTS, Part, optimize, restore
from fastexperts.metrics.flops import count_flops

PARTS_FOUND = {"norms": norms, "rotary": rotary, "shared_experts": swiglu, "loss": loss}


@pytest.fixture
def device(monkeypatch):
    return run_liger(monkeypatch)


def batch(device):
    ids = tokens(batch=1, length=3).to(device)
    return {"input_ids": ids, "labels": ids}


EXPECTED = {
    "qwen3_moe": {"experts", "norms", "rotary", "loss", "attention"},
    "deepseek_v3": {"experts", "norms", "shared_experts", "loss", "attention"},
    "glm4_moe": set(PARTS) - {"adapters"},
    "ernie4_5_moe": {"experts", "norms", "shared_experts", "loss", "attention"},
}


@pytest.mark.parametrize("family", EXPECTED)
def test_loss_and_every_gradient_are_the_model_s(device, family):
    model = tiny_model(family, "eager", attn_implementation="eager").to(device).train()
    data = batch(device)
    wanted = step(model, data)
    logits = model(**data).logits
    summary = optimize(model, checkpoint="keep-experts", verbose=False)
    assert {part for part in PARTS if summary.on(part)} == EXPECTED[family]
    assert model.config._attn_implementation == "sdpa"
    assert summary.checkpoint == "keep-experts"
    got = step(model, data)
    assert_close(got, wanted)
    assert relative(model.eval()(**data).logits, logits) <= 1e-5
    again = optimize(model, checkpoint="keep-experts", verbose=False)
    assert again == summary, "a second time changes nothing"


@pytest.mark.slow  # 65 tiny models
def test_how_many_families_each_part_serves():
    """What docs/optimize.md says of transformers 5.23; other versions have other families."""
    if not transformers.__version__.startswith("5.23."):
        pytest.skip(f"the numbers are those of transformers 5.23, and this is {transformers.__version__}")
    served = dict.fromkeys(("attention", *PARTS_FOUND), 0)
    for case in cases():
        model = tiny_family(case)
        served["attention"] += bool(attention.candidates(model))
        for name, part in PARTS_FOUND.items():
            for module in part.candidates(model).values():
                try:
                    part.forward_of(module, "cpu")
                except FastexpertsError:
                    continue
                served[name] += 1
                break
    assert len(cases()) == 65
    assert served == {"attention": 65, "norms": 63, "rotary": 42, "shared_experts": 35, "loss": 49}


@pytest.mark.parametrize("name", PARTS)
def test_each_part_can_be_left_out(device, name):
    peft = pytest.importorskip("peft")
    model = tiny_model("glm4_moe", "eager").to(device)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    summary = optimize(model, parts={name: False}, checkpoint="off", verbose=False)
    assert {part for part in PARTS if summary.on(part)} == set(PARTS) - {name}
    assert summary.of(name) == (Part(name, False, "as asked"),)
    assert (model.config._experts_implementation == "fastexperts") == (name != "experts")
    layers = [f"layers.{i}" for i in (0, 1)]
    changed = {
        "norms": range(9),
        "rotary": layers,
        "shared_experts": range(20, 22),
        "loss": [30],
        "adapters": range(40, 44),
    }
    if attention.cudnn_comes_first(device):
        changed["attention"] = layers  # the same modules that rotate
    assert restore(model) == len({at for part, places in changed.items() if part != name for at in places})


def test_nothing_of_liger_without_a_gpu(monkeypatch, capsys):
    if torch.cuda.is_available():
        monkeypatch.setenv("FASTEXPERTS_BACKEND", "torch")
    model = tiny_model("dots1", "eager")
    summary = fastexperts.optimize(model, tokens=64)
    reason = "FASTEXPERTS_BACKEND is torch" if torch.cuda.is_available() else "no CUDA device"
    for name in PARTS_FOUND:
        assert summary.of(name) == (Part(name, False, reason),)
    assert restore(model) == (2 if attention.cudnn_comes_first(liger.device_type(model)) else 0)
    assert capsys.readouterr().out == f"{summary}\n"
    lines = str(summary).splitlines()
    assert lines[0].split() == ["step", "modules"]
    assert lines[1].split()[:3] == ["experts", "on", "1"]
    assert f"off  -        {reason}" in lines[2]
    assert "checkpoint" in lines[-1]
    assert "estimated GiB at 64 tokens: off 0.00" in lines[-1]


def test_liger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    reason = "liger-kernel is not installed (pip install 'fastexperts[train]')"
    rows = [PARTS[name](tiny_model("qwen3_moe", "eager"), "cuda") for name in PARTS_FOUND]
    assert rows == [[Part(name, False, reason)] for name in PARTS_FOUND]


def test_what_another_library_does_stands_in_the_summary():
    summary = optimize(tiny_model("qwen3_moe", "eager"), parts={"loss": False}, verbose=False)
    theirs = Part("loss", True, "TRL's own fused LM head")
    told = summary.with_rows(theirs)
    assert told.of("loss") == (theirs,)
    assert [row.part for row in told.rows] == [row.part for row in summary.rows]
    assert "TRL's own fused LM head" in str(told)
    several = told.with_rows(*(Part("adapters", on, "what") for on in (True, False)))
    assert [row.on for row in several.of("adapters")] == [True, False]
    names = [row.part for row in several.rows]
    assert names == [name for name in [*PARTS, "checkpoint"] for _ in several.of(name)]


@pytest.mark.parametrize(("arguments", "complaint"), [
    ({"parts": {"norm": False}}, r"`parts` got 'norm'.*norms, rotary"),
    ({"parts": {"checkpoint": False}}, r"argument of its own"),
    ({"checkpoint": "selective"}, r"`checkpoint` got 'selective'.*keep-experts"),
    ({"checkpoint": "keep-experts", "parts": {"experts": False}}, "experts left as they are"),
])  # fmt: skip
def test_what_cannot_be_is_refused(arguments, complaint):
    model = tiny_model("qwen3_moe", "eager")
    with pytest.raises(FastexpertsError, match=complaint):
        optimize(model, **arguments, verbose=False)
    assert model.config._experts_implementation == "eager", "nothing was switched"


def test_a_model_without_experts_or_of_another_library_is_refused():
    with pytest.raises(FastexpertsError, match="optimize: `model` got Linear"):
        optimize(torch.nn.Linear(2, 2))
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    dense = AutoModelForCausalLM.from_config(config)
    with pytest.raises(FastexpertsError, match="no experts were found"):
        optimize(dense, verbose=False)
    assert optimize(dense, parts={"experts": False}, verbose=False).of("experts") == (
        Part("experts", False, "as asked"),
    )


@pytest.mark.parametrize("first", ["optimize", "adapter"])
def test_before_and_after_an_adapter(device, first):
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3_moe", "eager").to(device)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)

    def adapted(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).train()

    wanted = step(adapted(tiny_model("qwen3_moe", "eager").to(device)), batch(device))
    if first == "optimize":
        summary = optimize(model, verbose=False)
        model = adapted(model)
    else:
        model = adapted(model)
        summary = optimize(model, verbose=False)
    assert {"norms", "rotary", "loss"} <= {part for part in PARTS if summary.on(part)}
    (row,) = summary.of("adapters")
    if first == "optimize":
        assert (row.on, row.what) == (False, linear_lora.NONE_FOUND)
        assert "after get_peft_model" in row.what
    else:
        assert (row.on, row.modules, row.names) == (True, 4, "q_proj, o_proj")
    assert_close(step(model, batch(device)), wanted)


@pytest.mark.parametrize("mode", recompute.MODES)
def test_adapters_of_linear_layers_in_each_mode_of_checkpointing(mode):
    """On any device. Those of shared experts are on parameters in `lora_config`, which PEFT folds in."""
    peft = pytest.importorskip("peft")
    results = []
    for fast in (False, True):
        model = tiny_model("deepseek_v3", "eager")
        config = fastexperts.lora_config(model, 3, shared_experts=True, verbose=False)
        config.init_lora_weights = False
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).to(DEVICE).train()
        if fast:
            parts = {name: name in ("experts", "adapters") for name in PARTS}
            summary = optimize(model, parts=parts, checkpoint=mode, verbose=False)
            assert summary.checkpoint == mode
            on, off = summary.of("adapters")
            assert {"q_a_proj", "o_proj"} <= set(on.names.split(", "))
            assert off.names == "gate_proj, up_proj, down_proj"
            assert "ParamWrapper: `forward` got that of another class" in off.what
            assert (on.on, off.on) == (True, False)
        results.append(step(model, batch(DEVICE)))
    assert_close(results[1], results[0])


def test_a_trainer_sees_the_inputs_and_the_meter_the_same_model(device):
    import inspect

    model = tiny_model("glm4_moe", "eager").to(device)
    columns, flops = list(inspect.signature(model.forward).parameters), count_flops(model)
    optimize(model, verbose=False)
    assert list(inspect.signature(model.forward).parameters) == columns
    assert count_flops(model) == flops


@pytest.mark.slow
def test_a_plain_trainer_takes_the_same_steps(device, tmp_path):
    """transformers' Trainer: its columns, `num_items_in_batch` over micro-batches, evaluation with logits."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=6, length=3)]
    rows[0]["labels"] = torch.where(torch.arange(3) == 1, -100, rows[0]["labels"])
    histories = []
    for fast in (False, True):
        model = tiny_model("qwen3_moe", "eager", output_router_logits=True)
        if fast:
            assert optimize(model, checkpoint="off", verbose=False).on("loss")
        arguments = TrainingArguments(
            str(tmp_path / str(fast)), per_device_train_batch_size=1, gradient_accumulation_steps=2,
            max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3, use_cpu=device == "cpu",
            report_to="none", learning_rate=1e-3,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        histories.append([e[k] for e in trainer.state.log_history for k in ("loss", "eval_loss") if k in e])
        assert any(part.shape == (2, 3, 97) for part in trainer.predict(rows[:2]).predictions), "logits"
    assert len(histories[0]) == 4
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)  # logs are rounded
