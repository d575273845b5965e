"""A run that was killed and resumed is the run that was not, bit by bit; and nothing is lost in silence."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import SMALL, settings, write_recipe
from safetensors.torch import load_file, save_file

from fastexperts.errors import FastexpertsError
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import ModelSettings, load_recipe, parse_recipe, with_absolute_paths
from fastexperts.train.resume import fix_resume, last_checkpoint, load_weights, missing_parts
from fastexperts.train.rundir import claim, find_start
from fastexperts.train.sft import train

PROCESS = Path(__file__).parent / "train_process.py"


def small_model(config="tiny-qwen3-moe", seed=0):
    chosen = ModelSettings(config=config, overrides=SMALL[config])
    return load_model(chosen, load_tokenizer(chosen), torch.float32, seed)


def run_process(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(PROCESS), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(SMALL))
def test_killed_and_resumed_equals_straight_bitwise(tmp_path, config):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        write_recipe(folder, settings(folder, config, save_steps=5, gradient_accumulation=2))

    done = run_process(straight / "recipe.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    first = run_process(killed / "recipe.yaml", "--kill-at", 7)
    assert first.returncode == -signal.SIGKILL, first.stderr[-3000:]
    assert sorted(path.name for path in (killed / "run").glob("checkpoint-*")) == ["checkpoint-5"]
    second = run_process(killed / "recipe.yaml", "--resume")
    assert second.returncode == 0, second.stderr[-3000:]

    for name in ("checkpoint-10", "model"):
        want = load_file(straight / "run" / name / "model.safetensors")
        got = load_file(killed / "run" / name / "model.safetensors")
        assert got.keys() == want.keys()
        assert any(".experts.0." in key for key in want), (
            "the checkpoint is per expert, or this proves little"
        )
        assert [key for key in want if not torch.equal(want[key], got[key])] == []
    optimizers = [
        torch.load(folder / "run/checkpoint-10/optimizer.pt")["state"] for folder in (straight, killed)
    ]
    for index, state in optimizers[0].items():
        for key, value in state.items():
            assert torch.equal(value, optimizers[1][index][key]), (index, key)
    moved = load_file(straight / "run/checkpoint-5/model.safetensors")
    assert any(not torch.equal(moved[key], want[key]) for key in want), "steps 6 to 10 changed something"


@pytest.mark.parametrize("config", sorted(SMALL))
@pytest.mark.parametrize("sharded", [False, True])
def test_load_weights_restores_every_tensor_in_place(tmp_path, config, sharded):
    saved, model = small_model(config, seed=1), small_model(config, seed=2)
    saved.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    before = dict(model.named_parameters())
    load_weights(model, tmp_path)
    want = saved.state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, want[key])] == []
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_load_weights_keeps_mixed_dtypes_exactly(tmp_path):
    saved, model = small_model(seed=1), small_model(seed=2)
    for each in (saved, model):
        each.to(torch.bfloat16)
        each.lm_head.to(torch.float32)
    torch.nn.init.normal_(saved.lm_head.weight)  # values that bf16 cannot hold
    saved.save_pretrained(tmp_path)
    load_weights(model, tmp_path)
    want = saved.state_dict()
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, want[key])] == []


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"), "missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 3)}), "does not load"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "does not load"),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if ".experts.3." in key],
            "does not load",
        ),
    ],
)
def test_lost_keys_are_fatal(tmp_path, damage, complaint):
    small_model(seed=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = small_model(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FastexpertsError, match=complaint):
        load_weights(model, tmp_path)
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


@pytest.fixture
def finished_run(tmp_path):
    """A run of 4 steps with checkpoints at 2 and 4."""
    recipe = parse_recipe(settings(tmp_path, steps=4, save_steps=2))
    train(recipe)
    return recipe


def test_people_s_own_trainer(finished_run, tmp_path):
    from transformers import Trainer, TrainingArguments

    checkpoint = Path(finished_run.output_dir) / "checkpoint-4"
    model = small_model(seed=3)
    arguments = TrainingArguments(str(tmp_path / "own"), report_to=[], use_cpu=not torch.cuda.is_available())
    trainer = Trainer(model, arguments)
    assert fix_resume(trainer) is trainer
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.model.save_pretrained(tmp_path / "again")
    want, got = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert [key for key in want if not torch.equal(want[key], got[key])] == []

    torch.nn.init.zeros_(model.lm_head.weight)
    trainer.state.best_model_checkpoint = str(checkpoint)
    trainer._load_best_model()
    assert torch.equal(model.lm_head.weight.cpu(), want["lm_head.weight"])


@pytest.mark.parametrize(
    ("damage", "lacks"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json"),
        (
            lambda folder: (folder / "trainer_state.json").write_text('{"global_step":'),
            "the end of trainer_state",
        ),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors"),
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "the weights"),
    ],
)
def test_half_written_checkpoint_is_passed_over(finished_run, damage, lacks):
    run = Path(finished_run.output_dir)
    assert last_checkpoint(run) == (run / "checkpoint-4", {})
    damage(run / "checkpoint-4")
    found, incomplete = last_checkpoint(run)
    assert found == run / "checkpoint-2"
    assert lacks in ", ".join(incomplete[run / "checkpoint-4"])
    start = find_start(finished_run, resume=True)
    assert start.checkpoint == run / "checkpoint-2"
    assert (run / "checkpoint-4").is_dir(), "looking changes nothing"
    notes = claim(finished_run, start)
    assert "checkpoint-4 is incomplete" in notes[0]
    assert not (run / "checkpoint-4").exists(), "moved aside, so that two saves never mix"
    assert (run / "incomplete-checkpoint-4-1").is_dir()


def test_sharded_checkpoint_without_a_shard_is_incomplete(finished_run):
    folder = Path(finished_run.output_dir) / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    small_model().save_pretrained(folder, max_shard_size="20KB")
    assert missing_parts(folder) == []
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert missing_parts(folder) == [shards[1].name]


def test_checkpoint_of_two_processes_is_not_one_of_one(finished_run):
    folder = Path(finished_run.output_dir) / "checkpoint-4"
    assert missing_parts(folder, world_size=2) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_resume_refuses_what_it_cannot_continue(finished_run, tmp_path):
    with pytest.raises(FastexpertsError, match="holds no run"):
        find_start(parse_recipe(settings(tmp_path) | {"output_dir": str(tmp_path / "none")}), resume=True)
    with pytest.raises(FastexpertsError, match=r"training.learning_rate: 0.003 -> 0.1"):
        find_start(parse_recipe(settings(tmp_path, steps=4, save_steps=2, learning_rate=0.1)), resume=True)
    for path in Path(finished_run.output_dir).glob("checkpoint-*"):
        (path / "trainer_state.json").unlink()
    with pytest.raises(
        FastexpertsError, match=r"no complete checkpoint .*checkpoint-2 lacks trainer_state.json"
    ):
        find_start(finished_run, resume=True)


@pytest.mark.parametrize("saved", [True, False])
def test_a_finished_run_is_not_trained_on(finished_run, saved):
    """Neither when it is resumed again, nor when it was killed between its last checkpoint and its model."""
    folder = Path(finished_run.output_dir)
    want = load_file(folder / "model/model.safetensors")
    if not saved:
        shutil.rmtree(folder / "model")
    for _ in range(2):
        result = train(finished_run, resume=True)
        assert result.trainer.state.global_step == 4
        assert [step for step, _ in result.losses] == [1, 2, 3, 4]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    got = load_file(folder / "model/model.safetensors")
    assert [key for key in want if not torch.equal(want[key], got[key])] == []


def test_resume_may_change_how_often_it_logs_and_saves(finished_run, tmp_path):
    changed = parse_recipe(settings(tmp_path, steps=4, save_steps=1, logging_steps=3))
    assert find_start(changed, resume=True).checkpoint == Path(finished_run.output_dir) / "checkpoint-4"


@pytest.mark.parametrize("content", ["file.txt", "recipe.yaml", "checkpoint-5/model.safetensors"])
def test_a_new_run_writes_over_nothing(tmp_path, content):
    recipe = parse_recipe(settings(tmp_path))
    victim = Path(recipe.output_dir) / content
    victim.parent.mkdir(parents=True)
    victim.write_text("mine")
    with pytest.raises(FastexpertsError, match=r"not empty.*--resume"):
        find_start(recipe, resume=False)
    assert victim.read_text() == "mine"
    assert sorted(path for path in Path(recipe.output_dir).rglob("*") if path.is_file()) == [victim]


def test_the_saved_recipe_is_the_recipe(finished_run):
    saved = Path(finished_run.output_dir) / "recipe.yaml"
    assert load_recipe(saved) == with_absolute_paths(finished_run, saved.parent)
