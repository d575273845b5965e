"""The demo, shortened: what it leaves is looked at, and what it reports is computed again."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastexperts import cli
from fastexperts.errors import FastexpertsError
from fastexperts.hf.experts import NAME, register
from fastexperts.train.demo import run_demo
from fastexperts.train.proof import Check, prove
from fastexperts.train.recipe import load_recipe

STEPS = 40


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a short demo, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastexperts", "demo", "--steps", str(STEPS), "--output", str(folder)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert (stopped.value.code or 0) == 0
    return folder


@pytest.mark.slow
def test_the_demo_leaves_what_it_says(demo):
    text = (demo / "report.html").read_text()
    assert text.count("<td class='ok'>ok</td>") >= 9, "the proof"
    assert "FAILED" not in text
    report = json.loads((demo / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert all(check["passed"] for check in report["checks"])
    assert len(report["samples"]) == 3
    assert report["losses"][-1][1] < report["losses"][0][1] - 1
    state = json.loads((demo / f"run/checkpoint-{STEPS}/trainer_state.json").read_text())
    logged = [[entry["step"], entry["loss"]] for entry in state["log_history"] if "loss" in entry]
    assert report["losses"] == logged


@pytest.mark.slow
def test_the_load_adds_up(demo):
    report = json.loads((demo / "report.json").read_text())
    load_LE = torch.tensor(report["routing"]["load_LE"])
    config = json.loads((demo / "run/model/config.json").read_text())
    assert load_LE.shape == (config["num_hidden_layers"], config["num_local_experts"])
    assert len(set(load_LE.sum(1).tolist())) == 1, "each layer routes the same tokens"
    per_step = load_LE[0].sum() / config["num_experts_per_tok"] / STEPS
    assert 0.9 * 4 * 256 < per_step <= 4 * 256
    logs = report["routing"]["logs"]
    assert [entry["step"] for entry in logs] == [step for step, _ in report["losses"]]
    worst = dict(report["series"]["routing/max_violation_worst"])
    assert {entry["step"]: max(entry["max_violation"]) for entry in logs} == worst


@pytest.mark.slow
def test_the_checkpoint_is_per_expert_and_plain_transformers_agrees(demo):
    folder = demo / "run/model"
    config = json.loads((folder / "config.json").read_text())
    want = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_local_experts"])
        for projection in ("gate", "up", "down")
    }
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {key for key in tensors.keys() if ".experts." in key} == want  # noqa: SIM118 - no mapping

    register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The following sections describe the standard types. " * 3, return_tensors="pt")[
        "input_ids"
    ]
    results = {}
    for implementation in ("eager", NAME):
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        results[implementation] = output.logits.detach(), model.model.layers[0].mlp.experts.gate_up_proj.grad
    for ours, theirs in zip(results[NAME], results["eager"], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert results["eager"][0].argmax(-1)[0, :-1].eq(tokens[0, 1:]).float().mean() > 0.15, (
        "it has learned something"
    )


@pytest.mark.slow
def test_its_recipe_trains_again_to_the_same_losses(demo, tmp_path):
    from rich.console import Console

    from fastexperts.train.sft import train

    recipe = load_recipe(demo / "demo.yaml", output_dir=str(tmp_path / "again"))
    losses = train(recipe, console=Console(quiet=True)).losses
    report = json.loads((demo / "report.json").read_text())
    assert [list(entry) for entry in losses] == report["losses"]


@pytest.mark.slow
def test_a_demo_writes_over_nothing(demo, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    with pytest.raises(FastexpertsError, match="not empty"):
        run_demo(demo, steps=1)
    assert before == {path: path.stat().st_mtime_ns for path in demo.rglob("*")}


@pytest.fixture
def proven(tmp_path):
    """A small model on fastexperts, its checkpoint and a batch."""
    from recipes import SMALL

    from fastexperts.train.models import load_model, load_tokenizer
    from fastexperts.train.recipe import ModelSettings

    chosen = ModelSettings(config="tiny-qwen3-moe", overrides=SMALL["tiny-qwen3-moe"])
    model = load_model(chosen, load_tokenizer(chosen), torch.float32, 0)
    model.eval().save_pretrained(tmp_path)
    tokens = torch.randint(256, (2, 24))
    return model, tmp_path, {"input_ids": tokens, "labels": tokens}


def failed(checks):
    return {check.name for check in checks if not check.passed}


def test_the_proof_passes_what_is_right(proven):
    model, folder, batch = proven
    checks = prove(model, folder, batch)
    assert failed(checks) == set()
    calls = next(check for check in checks if check.name == "calls of fastexperts' ops missing")
    assert "moe_mlp 2" in calls.detail
    assert "moe_mlp_backward 2" in calls.detail
    assert model.training is False
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_proof_fails_on_another_weight(proven):
    model, folder, batch = proven
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] += 0.1
    assert "reloaded weights that differ" in failed(prove(model, folder, batch))


def test_the_proof_fails_on_another_function(proven, monkeypatch):
    import fastexperts.hf.experts as adapter

    model, folder, batch = proven
    original = adapter.moe_mlp
    monkeypatch.setattr(adapter, "moe_mlp", lambda *a, **k: original(*a, **k) * 1.001)
    names = failed(prove(model, folder, batch))
    assert {"logits, relative error", "gradients, worst relative error"} <= names


def test_the_proof_fails_if_our_ops_did_not_run(proven):
    model, folder, batch = proven
    model.set_experts_implementation("eager")
    assert failed(prove(model, folder, batch)) == {"calls of fastexperts' ops missing"}


def test_the_proof_fails_on_a_fused_checkpoint(proven):
    from safetensors.torch import load_file, save_file

    model, folder, batch = proven
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if ".experts." not in key}
    tensors |= {key: value for key, value in model.state_dict().items() if ".experts." in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "wrong keys in the checkpoint" in failed(prove(model, folder, batch))


def test_nan_passes_no_check():
    assert not Check("", float("nan"), 1).passed
    assert Check("", 1, 1).passed


def test_a_failed_proof_exits_1(tmp_path, monkeypatch, capsys):
    import fastexperts.train.demo as module

    result = module.DemoResult(tmp_path, [Check("what", 2, 1)])
    monkeypatch.setattr(module, "run_demo", lambda *_, **__: result)
    monkeypatch.setattr(sys, "argv", ["fastexperts", "demo"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "a check failed" in capsys.readouterr().err
