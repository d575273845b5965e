"""`method: lora`: what the recipe asks for is trained, saved, read back, resumed, and loads in plain PEFT."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipes import SMALL, settings, write_recipe
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastexperts.errors import FastexpertsError
from fastexperts.hf import recompute
from fastexperts.hf.linear_lora import LoraForward
from fastexperts.train.adapter import check_saved
from fastexperts.train.gradients import ExpertGradients
from fastexperts.train.recipe import load_recipe, parse_recipe
from fastexperts.train.sft import train

PROCESS = Path(__file__).parent / "train_process.py"
ADAPTER = "adapter_model.safetensors"


def run(folder, config="tiny-qwen3-moe", lora=(), resume=False, model=None, **training):
    """(result, what was printed) of a small LoRA run in `folder`."""
    folder.mkdir(exist_ok=True)
    content = settings(folder, config, **({"method": "lora", "learning_rate": 1e-2} | training))
    content["lora"] = {"r": 4} | dict(lora)
    content["model"] = model or content["model"]
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    result = train(parse_recipe(content), resume=resume, console=console)
    return result, console.export_text()


def reloaded(folder):
    """The run's adapter in plain PEFT, on its base, with transformers' eager experts."""
    source = json.loads((folder / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder / "model").eval()


@pytest.mark.parametrize("config", sorted(SMALL))
def test_a_run_trains_saves_and_loads_in_plain_peft(tmp_path, config):
    shared = {"shared_experts": True} if config == "tiny-deepseek-v3" else {}
    result, printed = run(tmp_path, config, shared, steps=8, save_steps=8)
    losses = [loss for _, loss in result.losses]
    assert losses[-1] < losses[0] - 0.1
    model = result.trainer.accelerator.unwrap_model(result.trainer.model, keep_fp32_wrapper=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert f"{sum(p.numel() for p in trained.values()):,} trainable parameters" in printed
    assert "Gradients: every LoRA factor of the experts gets one" in printed
    assert f"Adapter: {len(trained)} tensors saved, and read back bit by bit." in printed

    saved = load_file(result.model_folder / ADAPTER)
    keys = {name.replace(".default", ""): p for name, p in trained.items()}
    assert saved.keys() == keys.keys()
    assert all(torch.equal(saved[key], p.detach().cpu()) for key, p in keys.items())
    assert all(tensor.norm() > 0 for tensor in saved.values()), "every factor has moved from zero"

    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    twin = reloaded(result.folder)
    with torch.no_grad():
        ours, theirs = model.eval()(ids.to(model.device)).logits.cpu(), twin(ids).logits
        with twin.disable_adapter():
            bare = twin(ids).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (bare - theirs).norm() > 1e-2 * theirs.norm(), "the adapter does something"
    assert len(AutoTokenizer.from_pretrained(result.folder / "base")) == 260


def test_the_memory_estimate_counts_no_gradient_of_the_base(tmp_path, monkeypatch):
    told, estimate = [], recompute.estimate
    monkeypatch.setattr(
        recompute, "estimate", lambda *args, **kw: told.append(estimate(*args, **kw)) or told[-1]
    )
    result, printed = run(tmp_path, steps=1)
    base = sum(p.numel() * 4 for n, p in result.trainer.model.named_parameters() if "lora" not in n)
    assert base <= told[0].fixed < 2 * base
    assert str(told[0]) in printed
    assert "TRL's own fused LM head" in printed


def test_the_adapters_that_the_trainer_makes_are_optimized(tmp_path):
    result, printed = run(tmp_path / "on", steps=1)
    served = [m for m in result.trainer.model.modules() if isinstance(vars(m).get("forward"), LoraForward)]
    assert len(served) == 4 * result.trainer.model.config.num_hidden_layers
    assert re.search(rf"adapters +on +{len(served)} +q_proj, k_proj, v_proj, o_proj: LoRA", printed)
    assert printed.count("adapters  ") == 1
    result, printed = run(tmp_path / "off", steps=1, optimize={"adapters": False})
    assert not any(isinstance(vars(m).get("forward"), LoraForward) for m in result.trainer.model.modules())
    assert re.search(r"adapters +off +- +as asked", printed)


def test_the_base_beside_the_adapter_is_the_model_that_was_trained_on(tmp_path):
    result, _ = run(tmp_path, steps=1)
    base = AutoModelForCausalLM.from_pretrained(result.folder / "base", dtype=torch.float32)
    weights = base.state_dict()
    inner = result.trainer.model.get_base_model().state_dict()
    frozen = {name.replace(".base_layer", ""): w for name, w in inner.items() if "lora_" not in name}
    assert weights.keys() == frozen.keys()
    assert all(torch.equal(weights[name], frozen[name].cpu()) for name in weights)


def test_what_the_recipe_leaves_out_is_not_trained(tmp_path):
    lora = {"experts": False, "router": True, "alpha": 16}
    result, printed = run(tmp_path, lora=lora, steps=2)
    config = result.trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_parameters)) == (4, 16, {"mlp.gate.weight"})
    assert not any(
        "experts" in name for name, p in result.trainer.model.named_parameters() if p.requires_grad
    )
    assert "Gradients:" not in printed, "no expert is adapted: nothing to check"


def test_a_checkpoint_of_a_model_is_the_base_itself(tmp_path):
    from fastexperts.train.models import load_model, load_tokenizer
    from fastexperts.train.recipe import ModelSettings

    chosen = ModelSettings(config="tiny-mixtral", overrides=SMALL["tiny-mixtral"])
    tokenizer = load_tokenizer(chosen)
    load_model(chosen, tokenizer, torch.float32, 3).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    model = {"path": str(tmp_path / "theirs")}
    torch.manual_seed(1)
    first, _ = run(tmp_path / "a", model=model, steps=2)
    torch.manual_seed(2)
    second, _ = run(tmp_path / "b", model=model, steps=2)
    assert not (first.folder / "base").exists()
    named = json.loads((first.model_folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == model["path"]
    one, two = (load_file(result.model_folder / ADAPTER) for result in (first, second))
    assert all(torch.equal(one[key], two[key]) for key in one), "the seed decides what the factors start as"


@pytest.mark.parametrize("config", ["tiny-qwen3-moe", "tiny-deepseek-v3"])
def test_two_steps_and_two_resumed_are_four_bitwise(tmp_path, config):
    training = {"steps": 4, "save_steps": 2, "gradient_accumulation": 2, "scheduler": "cosine"}
    straight, _ = run(tmp_path / "straight", config, **training)
    stopped, _ = run(tmp_path / "stopped", config, **training)
    (stopped.folder / "checkpoint-4" / "trainer_state.json").unlink()  # as if killed while it saved
    for path in stopped.model_folder.iterdir():
        path.unlink()
    resumed, printed = run(tmp_path / "stopped", config, resume=True, **training)
    assert f"Resuming from {stopped.folder / 'checkpoint-2'}" in printed
    assert [step for step, _ in resumed.losses] == [1, 2, 3, 4]
    assert resumed.losses == straight.losses
    for name in ("checkpoint-4", "model"):
        want, got = (load_file(result.folder / name / ADAPTER) for result in (straight, resumed))
        assert want.keys() == got.keys()
        assert [key for key in want if not torch.equal(want[key], got[key])] == []
    optimizers = [torch.load(r.folder / "checkpoint-4/optimizer.pt")["state"] for r in (straight, resumed)]
    assert all(
        torch.equal(value, optimizers[1][index][key])
        for index, state in optimizers[0].items()
        for key, value in state.items()
    )
    before, after = (load_file(straight.folder / f"checkpoint-{step}" / ADAPTER) for step in (2, 4))
    assert all(not torch.equal(before[key], after[key]) for key in before), (
        "steps 3 and 4 changed each factor"
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_straight_bitwise(tmp_path):
    import signal

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def process(*arguments):
        command = [sys.executable, str(PROCESS), *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        content = settings(tmp_path / name, steps=6, save_steps=2, method="lora", learning_rate=1e-2)
        write_recipe(tmp_path / name, content | {"lora": {"r": 4}})
    assert process(tmp_path / "straight/recipe.yaml").returncode == 0
    assert process(tmp_path / "killed/recipe.yaml", "--kill-at", 5).returncode == -signal.SIGKILL
    again = process(tmp_path / "killed/recipe.yaml", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    want, got = (load_file(tmp_path / name / "run/model" / ADAPTER) for name in ("straight", "killed"))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


@pytest.fixture
def finished(tmp_path):
    return run(tmp_path, steps=2, save_steps=2)[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_adapter_is_no_model_to_train_on(finished, tmp_path, method):
    """Loaded as one it has frozen weights, and a full run would train nothing."""
    again = tmp_path / "again"
    again.mkdir()
    content = settings(again, method=method) | {"model": {"path": str(finished.model_folder)}}
    with pytest.raises(FastexpertsError, match=r"model.path.*an adapter.*--to merged"):
        train(parse_recipe(content), console=Console(quiet=True))
    assert not (again / "run").exists()


def drop(tensors):
    tensors.pop(next(iter(tensors)))


def nudge(tensors):
    key = next(key for key in tensors if "experts" in key and "lora_B" in key)
    tensors[key].view(-1)[7] = torch.nextafter(tensors[key].view(-1)[7], torch.tensor(9.0))


def rename(tensors):
    """What PEFT passes over in silence: keys that it does not know."""
    key = next(key for key in tensors if "experts" in key and "lora_A" in key)
    tensors[key.replace("experts", "expert")] = tensors.pop(key)


@pytest.mark.parametrize("damage", [drop, nudge, rename])
def test_an_adapter_that_is_not_the_trained_one_is_refused(finished, damage):
    path = finished.model_folder / ADAPTER
    model = finished.trainer.model
    assert check_saved(model, finished.model_folder) == 24
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FastexpertsError, match=r"tensors that are not the model's, first .*lora_"):
        check_saved(model, finished.model_folder)


def test_a_trained_parameter_that_is_not_saved_is_refused(finished):
    model = finished.trainer.model
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(FastexpertsError, match=r"first base_model.model.model.embed_tokens.weight"):
        check_saved(model, finished.model_folder)


@pytest.mark.parametrize("damage", [drop, rename])
def test_a_checkpoint_whose_keys_do_not_match_is_not_resumed_from(finished, damage):
    path = finished.folder / "checkpoint-2" / ADAPTER
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FastexpertsError, match="tensors that are not the model's"):
        finished.trainer._load_from_checkpoint(str(path.parent))


def half_dead(model):
    """Zero the gradient of every other expert in the last layer's B, in place of a bug."""

    def hook(gradient):
        gradient = gradient.clone()
        gradient.view(len(gradient), 4, 16)[..., ::2] = 0
        return gradient

    name = next(name for name, _ in model.named_modules() if name.endswith("layers.1.mlp.experts"))
    model.get_submodule(name).lora_B["default"].weight.register_hook(hook)


@pytest.mark.parametrize("checked", [True, False])
def test_a_run_with_half_of_the_gradients_zero_stops_unless_told_not_to(tmp_path, monkeypatch, checked):
    from fastexperts.train import sft

    def sabotaged(*arguments):
        trainer = original(*arguments)
        half_dead(trainer.model)
        return trainer

    original = sft.make_trainer
    monkeypatch.setattr(sft, "make_trainer", sabotaged)
    if checked:
        with pytest.raises(
            FastexpertsError, match=r"layers.1.mlp.experts.lora_B.*a gradient of zero in 8 of"
        ):
            run(tmp_path, steps=2)
        assert not (tmp_path / "run" / "model").exists()
    else:
        result, printed = run(tmp_path, lora={"check_gradients": False}, steps=2)
        assert "Gradients:" not in printed
        assert not any(isinstance(c, ExpertGradients) for c in result.trainer.callback_handler.callbacks)


def test_the_example_runs(request, tmp_path):
    path = request.config.rootpath / "examples" / "recipe-lora.yaml"
    recipe = load_recipe(path, **{"training.steps": 2, "output_dir": str(tmp_path / "run")})
    result = train(recipe, console=Console(quiet=True))
    assert len(result.losses) >= 1
    assert check_saved(result.trainer.model, result.model_folder) == 4 * 2 * (4 + 2)
