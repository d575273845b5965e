"""Training runs through TRL, small: they learn, count what they route, and run as two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import SMALL, settings, write_recipe
from rich.console import Console
from safetensors.torch import load_file

from fastexperts.errors import FastexpertsError
from fastexperts.hf.recompute import MODES
from fastexperts.train.data import load_documents
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import TrainingSettings, parse_recipe
from fastexperts.train.sft import make_trainer, sft_config, train

PROCESS = Path(__file__).parent / "train_process.py"


def run(folder, config="tiny-qwen3-moe", data=(), model=(), **training):
    content = settings(folder, config, **training)
    content["data"] |= dict(data)
    content["model"] = dict(model) or content["model"]
    return train(parse_recipe(content), console=Console(quiet=True))


@pytest.mark.parametrize("config", sorted(SMALL))
def test_the_loss_goes_down(tmp_path, config):
    result = run(tmp_path, config, steps=12, checkpoint="keep-experts")
    losses = [loss for _, loss in result.losses]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(5.56, abs=0.2), "log(260) at the start"
    assert losses[-1] < losses[0] - 0.5
    keys = load_file(result.model_folder / "model.safetensors").keys()
    assert any(".experts.0." in key for key in keys), "per expert, as the family's checkpoints are"
    assert not any("gate_up_proj" in key for key in keys)
    # Each routed token is counted once, though routers run again in the backward.
    layers, experts = result.routing.load_LE.shape
    top_k = result.trainer.model.config.num_experts_per_tok
    tokens = result.trainer._total_train_tokens
    assert result.routing.load_LE.sum(1).tolist() == [tokens * top_k] * layers
    assert experts == {"tiny-mixtral": 8}.get(config, 16)


def test_the_run_s_ops_are_ours(tmp_path, monkeypatch):
    import fastexperts.hf.experts as adapter

    calls = []
    original = adapter.moe_mlp
    monkeypatch.setattr(adapter, "moe_mlp", lambda *a, **k: calls.append(1) or original(*a, **k))
    run(tmp_path, steps=2, checkpoint="off")
    assert len(calls) >= 2 * SMALL["tiny-qwen3-moe"]["num_hidden_layers"]


def test_checkpointing_and_accumulation_change_no_loss(tmp_path):
    losses = []
    for mode in MODES:
        folder = tmp_path / mode
        folder.mkdir()
        losses.append(run(folder, steps=3, gradient_accumulation=2, checkpoint=mode).losses)
    assert all(each == losses[0] for each in losses[1:])


def test_evaluation_padding_and_tensorboard(tmp_path):
    data = {"eval_fraction": 0.2, "packing": False}
    result = run(tmp_path, data=data, steps=4, eval_steps=2, report_to="tensorboard")
    evaluated = [entry["step"] for entry in result.trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [2, 4]
    assert list(result.folder.rglob("events.out.tfevents.*"))
    assert result.routing.load_LE.sum(1).tolist() == [result.trainer._total_train_tokens * 4] * 2, (
        "no padding, no evaluation"
    )


def test_a_trained_model_is_trained_on(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    before = run(first, steps=8)
    after = run(second, model={"path": str(before.model_folder)}, steps=2)
    assert after.losses[0][1] < before.losses[0][1] - 0.5
    assert len(after.trainer.processing_class) == 260


@pytest.mark.parametrize(("coefficient", "logged"), [(None, True), (0.5, True), (0.0, False)])
def test_auxiliary_loss_as_asked(tmp_path, coefficient, logged):
    result = run(tmp_path, steps=1, router_aux_loss_coef=coefficient)
    assert ("aux_loss" in result.trainer.state.log_history[0]) == logged
    assert result.trainer.model.config.router_aux_loss_coef == (0.001 if coefficient is None else coefficient)


def test_auxiliary_loss_that_a_model_does_not_have(tmp_path):
    with pytest.raises(FastexpertsError, match="router_aux_loss_coef"):
        run(tmp_path, "tiny-deepseek-v3", router_aux_loss_coef=0.1)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    recipe = parse_recipe(settings(tmp_path))
    tokenizer = load_tokenizer(recipe.model)
    model = load_model(recipe.model, tokenizer, torch.float32, 0).requires_grad_(False)
    documents = load_documents(recipe.data, 0)
    with pytest.raises(FastexpertsError, match="without a trainable parameter"):
        make_trainer(sft_config(recipe), model, tokenizer, documents, Console(quiet=True))


def test_chat_needs_a_template(tmp_path):
    from fastexperts.train.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    model = settings(tmp_path)["model"] | {"tokenizer": str(tmp_path / "tokenizer")}
    with pytest.raises(FastexpertsError, match=r"model.tokenizer.*without a chat template"):
        run(tmp_path, data={"files": str(tmp_path / "chat.jsonl")}, model=model)


def test_a_failed_start_claims_no_folder(tmp_path):
    chat = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "cut off"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    data = {"files": str(tmp_path / "chat.jsonl"), "packing": False, "assistant_only_loss": True}
    with pytest.raises(FastexpertsError, match="no sequence to learn from"):
        run(tmp_path, data=data)
    assert list((tmp_path / "run").rglob("*")) == []


# A setting of the recipe, none of them TRL's default -> what TRL has to get.
ASKED = {
    "training.steps": (7, {"max_steps": 7}),
    "training.epochs": (2.5, {"num_train_epochs": 2.5, "max_steps": -1}),
    "training.batch_size": (3, {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}),
    "training.gradient_accumulation": (5, {"gradient_accumulation_steps": 5}),
    "training.learning_rate": (3e-4, {"learning_rate": 3e-4}),
    "training.scheduler": ("cosine", {"lr_scheduler_type": "cosine"}),
    "training.warmup": (0.25, {"warmup_steps": 0.25}),
    "training.weight_decay": (0.125, {"weight_decay": 0.125}),
    "training.max_grad_norm": (0.5, {"max_grad_norm": 0.5}),
    "training.optimizer": ("sgd", {"optim": "sgd"}),
    "training.seed": (11, {"seed": 11, "data_seed": 11}),
    "training.router_aux_loss_coef": (0.0625, {"router_aux_loss_coef": 0.0625}),
    "training.logging_steps": (13, {"logging_steps": 13, "logging_first_step": True}),
    "training.save_steps": (17, {"save_steps": 17}),
    "training.eval_steps": (19, {"eval_steps": 19, "eval_strategy": "steps"}),
    "training.keep_checkpoints": (2, {"save_total_limit": 2}),
    "training.report_to": ("tensorboard", {"report_to": ["tensorboard"]}),
    "data.eval_fraction": (0.0, {"eval_strategy": "no", "eval_steps": None}),
    "data.max_length": (48, {"max_length": 48}),
    "data.packing": (True, {"packing": True, "packing_strategy": "bfd_split"}),
    "data.assistant_only_loss": (True, {"assistant_only_loss": True}),
}
# Settings that are not TRL's, or that depend on the machine; they have tests of their own.
NOT_TRL_S = {f"training.{key}" for key in ("method", "precision", "optimize", "checkpoint", "balancing")}


@pytest.mark.parametrize("name", ASKED)
def test_trl_gets_what_the_recipe_says(tmp_path, name):
    value, wanted = ASKED[name]
    content = settings(tmp_path)
    content["data"]["eval_fraction"] = 0.25
    del content["training"]["steps"]
    section, key = name.split(".")
    content[section][key] = value
    arguments = sft_config(parse_recipe(content))
    assert {attribute: getattr(arguments, attribute) for attribute in wanted} == wanted


def test_no_training_setting_is_left_out():
    assert {f"training.{key}" for key in TrainingSettings.model_fields} - NOT_TRL_S == {
        name for name in ASKED if name.startswith("training.")
    }


def test_precision_on_this_machine(tmp_path):
    on_gpu = torch.cuda.is_available()
    wanted = {"auto": on_gpu, "fp32": False, "bf16_autocast": True, "bf16": False}
    for precision, autocast in wanted.items():
        arguments = sft_config(parse_recipe(settings(tmp_path, precision=precision)))
        assert (arguments.bf16, arguments.fp16) == (autocast, False), precision


@pytest.mark.slow
def test_two_processes(tmp_path):
    path = write_recipe(tmp_path, settings(tmp_path, steps=6, save_steps=3, logging_steps=2))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def launch(*options):
        command = [*launcher, str(PROCESS), str(path), *options]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    done = launch()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 6/6") == 1, "the first rank alone prints"
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert {path.name for path in (tmp_path / "run/checkpoint-3").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }

    want = load_file(tmp_path / "run/checkpoint-6/model.safetensors")
    (tmp_path / "run/checkpoint-6/optimizer.pt").unlink()  # half a checkpoint: checkpoint-3 is resumed
    again = launch("--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    got = load_file(tmp_path / "run/checkpoint-6/model.safetensors")
    assert [key for key in want if not torch.equal(want[key], got[key])] == []

    refused = launch()
    assert refused.returncode != 0
    assert "not empty" in refused.stderr
