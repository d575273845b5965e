"""Loss-free balancing moves a router's bias as its paper says, is saved with it, and evens the load."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import cases, tiny_family
from peft import LoraConfig, get_peft_model
from recipes import settings
from rich.console import Console
from safetensors.torch import load_file
from support_hf import tiny_model, tokens
from test_mfu import collate, examples, trainer_of
from torch import nn
from transformers import Trainer, TrainingArguments

from fastexperts.errors import FastexpertsError
from fastexperts.metrics.routing_health import RoutingHealth
from fastexperts.train.balancing import NAMES, LossFreeBalancing, find_biases
from fastexperts.train.recipe import parse_recipe
from fastexperts.train.sft import train

RATE = 0.01


def bias_of(model):
    return model.model.layers[1].mlp.gate.e_score_correction_bias


def load_of(model, rows):
    """Tokens of each expert of the one layer, by what its router gives out, without padding."""
    batch, taken = collate(rows), []
    hook = model.model.layers[1].mlp.gate.register_forward_hook(lambda *call: taken.append(call[2][2]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    keep = batch["attention_mask"].flatten().bool()
    return torch.bincount(taken[0][keep].flatten(), minlength=len(bias_of(model)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_paper_s(tmp_path, checkpointing):
    """Of both micro-steps together, without padding, evaluation or recomputation."""
    model = tiny_model("deepseek_v3", "eager")
    before, rows = bias_of(model).clone(), examples()
    load = load_of(model, rows[:2]) + load_of(model, rows[2:4])
    assert load.unique().numel() > 2, "uneven, or this shows little"
    trainer = trainer_of(
        tmp_path,
        model,
        [LossFreeBalancing(RATE)],
        max_steps=1,
        learning_rate=0.0,
        gradient_checkpointing=checkpointing,
        eval_on_start=True,
        eval_strategy="steps",
    )
    trainer.train()
    moved = before + RATE * torch.sign(load.double().mean() - load).float()
    torch.testing.assert_close(bias_of(model), moved, rtol=0, atol=1e-7)


def test_each_step_counts_for_itself(tmp_path):
    model, rows = tiny_model("deepseek_v3", "eager"), examples()
    rate = 0.2  # so large that the second step goes another way
    trainer = trainer_of(tmp_path, model, [LossFreeBalancing(rate)], learning_rate=0.0)
    other = tiny_model("deepseek_v3", "eager")
    loads, directions = [], []
    for step in range(2):
        loads.append(sum(load_of(other, rows[first : first + 2]) for first in (4 * step, 4 * step + 2)))
        directions.append(torch.sign(loads[-1].double().mean() - loads[-1]).float())
        bias_of(other).add_(rate * directions[-1])
    both = sum(loads)
    assert not torch.equal(directions[1], torch.sign(both.double().mean() - both).float())
    trainer.train()
    torch.testing.assert_close(bias_of(model), bias_of(other), rtol=0, atol=1e-7)


def test_a_model_is_left_alone_without_it_and_after_training(tmp_path):
    model = tiny_model("deepseek_v3", "eager")
    before = bias_of(model).clone()
    trainer_of(tmp_path, model).train()
    assert torch.equal(bias_of(model), before)
    said = []
    trainer = trainer_of(tmp_path, model, [LossFreeBalancing(say=said.append)])
    trainer.train()
    assert said == ["Loss-free balancing: the biases of 1 of 1 layers, rate 0.001."]
    after = bias_of(model).clone()
    assert not torch.equal(after, before)
    trainer.remove_callback(LossFreeBalancing)
    trainer.train()
    assert torch.equal(bias_of(model), after)


def test_a_layer_without_tokens_keeps_its_bias():
    balancing, model = LossFreeBalancing(RATE, say=lambda line: None), tiny_model("deepseek_v3", "eager")
    args = TrainingArguments(use_cpu=True, report_to="none")
    before = bias_of(model).clone()
    balancing.on_train_begin(args, None, None, model=model)
    balancing.on_optimizer_step(args, None, None)
    balancing.on_train_end(args, None, None)
    assert torch.equal(bias_of(model), before)


def test_a_resumed_run_goes_on_bitwise(tmp_path):
    content = settings(tmp_path, "tiny-deepseek-v3", steps=4, save_steps=2, balancing={"rate": RATE})
    quiet = Console(quiet=True)
    train(parse_recipe(content), console=quiet)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copy(tmp_path / "run/recipe.yaml", resumed)
    shutil.copytree(tmp_path / "run/checkpoint-2", resumed / "checkpoint-2")
    train(parse_recipe(content | {"output_dir": str(resumed)}), console=quiet, resume=True)
    early, want, got = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run/checkpoint-2", tmp_path / "run/model", resumed / "model")
    )
    biases = [name for name in want if name.endswith(NAMES[0])]
    assert len(biases) == 1
    assert not torch.equal(early[biases[0]], want[biases[0]]), "steps 3 and 4 moved it"
    assert 0 < want[biases[0]].abs().max() <= 4 * RATE + 1e-6
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


SKEW, STEPS = 0.6, 200


def skewed():
    """DeepSeek-V3 whose router prefers some experts whatever the token: by a channel that is always on."""
    model = tiny_model("deepseek_v3", "eager")
    gate = model.model.layers[1].mlp.gate
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3
        gate.weight[:, 0] = torch.linspace(-SKEW, SKEW, len(gate.weight))
        gate.e_score_correction_bias.zero_()
    return model


def violations(folder, callbacks):
    """Max violation of the first and of the last ten of 200 training steps, and the lowest of any ten."""
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        logging_steps=10,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = [{"input_ids": tokens(number, 1, 16)[0].tolist()} for number in range(64)]
    trainer = Trainer(skewed(), arguments, collate, rows, callbacks=callbacks)
    health = RoutingHealth(say=lambda line: None).attach(trainer)
    trainer.train()
    found = [entry["max_violation"][0] for entry in health.table.logs]
    return found[0], found[-1], min(found)


@pytest.mark.slow  # 400 steps
def test_a_skewed_router_is_evened_with_it_and_not_without(tmp_path):
    start, end, _ = violations(tmp_path, [LossFreeBalancing(say=lambda line: None)])
    assert start > 1.4, "of 8 experts and 3 for a token, 1.67 is the most"
    assert end < start / 2
    start, _, lowest = violations(tmp_path, [])
    assert start > 1.4
    assert lowest > start / 2


@pytest.mark.slow  # a model of each class
def test_every_family_with_a_bias_is_found():
    package = Path(transformers.__file__).parent
    declared = re.compile(rf"self\.({'|'.join(NAMES)}) = ")
    sources = {path.parent.name: path.read_text() for path in package.glob("models/*/modeling_*.py")}
    having = {family for family, source in sources.items() if declared.search(source)}
    found = set()
    for case in cases():
        try:
            biases = find_biases(tiny_family(case))
        except FastexpertsError:
            continue
        found.add(case.family)
        for layer, bias in biases.items():
            assert bias.layer == layer
            assert bias.name.startswith(layer.rpartition(".")[0] + "."), "in the same block"
    outside = {"step3p7", "longcat_flash"}  # of transformers' experts interface
    assert found == having - outside
    assert len(found) >= 32


def without():
    return tiny_model("mixtral", "eager")


def adapted():
    return get_peft_model(tiny_model("deepseek_v3", "eager"), LoraConfig(target_modules=["o_proj"]))


def with_bias(bias):
    model = tiny_model("deepseek_v3", "eager")
    gate = model.model.layers[1].mlp.gate
    del gate.e_score_correction_bias
    gate.e_score_correction_bias = bias
    return model


class Sharded(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (without, "MixtralForCausalLM, without one.*router_aux_loss_coef"),
        (adapted, "adapters, which do not save.*Leave balancing out"),
        (
            lambda: with_bias(nn.Buffer(torch.zeros(8, dtype=torch.bfloat16))),
            "bfloat16.*Load the model in float32",
        ),
        (lambda: with_bias(nn.Parameter(torch.zeros(8))), "the optimizer trains.*requires_grad_"),
        (lambda: with_bias(nn.Buffer(torch.zeros(4))), r"shape \(4,\).*plain tensor of 8 values.*FSDP"),
        (lambda: with_bias(nn.Buffer(torch.zeros(8).as_subclass(Sharded))), "Sharded of shape.*FSDP"),
    ],
)
def test_what_cannot_be_balanced_is_refused(model, words):
    args = TrainingArguments(use_cpu=True, report_to="none")
    with pytest.raises(FastexpertsError, match=words):
        LossFreeBalancing().on_train_begin(args, None, None, model=model())


def test_zaya_is_refused_with_the_reason():
    case = next(case for case in cases() if case.family == "zaya")
    with pytest.raises(FastexpertsError, match=r"zaya.*from_pretrained writes over"):
        find_biases(tiny_family(case))


def test_zaya_s_reason_holds(tmp_path):
    """When this fails, transformers loads what it saved, and the family can be served."""
    case = next(case for case in cases() if case.family == "zaya")
    model = tiny_family(case)
    name = next(name for name, _ in model.named_buffers() if name.endswith("balancing_biases"))
    model.get_buffer(name)[-1] = 0.25
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).get_buffer(name)
    assert torch.equal(loaded[:-1], model.get_buffer(name)[:-1])
    assert loaded[-1] == -1


def test_a_bias_that_is_cast_while_it_trains_is_refused(tmp_path):
    model = tiny_model("deepseek_v3", "eager")
    balancing = LossFreeBalancing(say=lambda line: None)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    balancing.on_train_begin(args, None, None, model=model)
    model.model.layers[1].mlp.gate.to(torch.bfloat16)
    with pytest.raises(FastexpertsError, match="bfloat16"):
        balancing.on_optimizer_step(args, None, None)


@pytest.mark.parametrize("rate", [0, -1e-3, 2, float("nan")])
def test_wrong_rates_are_refused(rate):
    with pytest.raises(FastexpertsError, match="rate"):
        LossFreeBalancing(rate)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"balancing": {"rate": 0}}, r"training\.balancing\.rate.*greater than 0"),
        ({"balancing": {"speed": 1}}, r"training\.balancing\.speed.*unknown setting"),
        ({"balancing": True}, r"training\.balancing.*True"),
        ({"balancing": {}, "method": "lora"}, r"beside an adapter.*method: full"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, training, words):
    with pytest.raises(FastexpertsError, match=words):
        parse_recipe(settings(tmp_path, "tiny-deepseek-v3", **training))


def test_a_recipe_s_model_without_a_bias_is_refused_before_anything_is_written(tmp_path):
    recipe = parse_recipe(settings(tmp_path, "tiny-mixtral", balancing={}))
    assert recipe.training.balancing.rate == 1e-3
    with pytest.raises(FastexpertsError, match="MixtralForCausalLM, without one"):
        train(recipe, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
