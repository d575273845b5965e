"""What routers do is in any Trainer's logs: of all layers, of trained tokens, and with a warning in time."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support_hf import tiny_model
from test_mfu import LENGTHS, Tracker, collate, examples, logged, trainer_of

from fastexperts.errors import FastexpertsError
from fastexperts.metrics.routing_health import (
    FILE,
    WORST,
    RoutingHealth,
    RoutingTable,
    load_values,
    router_values,
    summarize,
)

E, K = 8, 2


def routed(model, rows):
    """(counts [layers, experts], logits of trained tokens by layer), by transformers' own recording."""
    batch = collate(rows)
    keep = batch["attention_mask"].flatten().bool()
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    logits = [each[keep].double() for each in logits]
    chosen = [each.topk(K).indices.flatten() for each in logits]
    return torch.stack([torch.bincount(each, minlength=E) for each in chosen]), logits


def by_hand(model, batches):
    """What is to be logged about `batches`, each a list of examples."""
    parts = [routed(model, rows) for rows in batches]
    counts = torch.stack([count for count, _ in parts]).sum(0).double()
    logits = [torch.cat(each) for each in zip(*(logit for _, logit in parts), strict=True)]
    entropies = [float(-(each.log_softmax(-1) * each.softmax(-1)).sum(-1).mean()) for each in logits]
    return {
        "load_cv": [float(row.std(correction=0) / row.mean()) for row in counts],
        "max_violation": [float(row.max() / row.mean() - 1) for row in counts],
        "dead_experts": [float((row == 0).sum() / E) for row in counts],
        "entropy": entropies,
        "entropy_normalized": [value / math.log(E) for value in entropies],
        "logit_norm": [float(each.square().mean().sqrt()) for each in logits],
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_s_logs_have_them(tmp_path, checkpointing):
    model, tracker, said = tiny_model("qwen3_moe", "eager"), Tracker(), []
    # At a learning rate of zero the model stays as it is, and every log can be computed again.
    trainer = trainer_of(
        tmp_path,
        model,
        [tracker],
        gradient_checkpointing=checkpointing,
        learning_rate=0.0,
        eval_strategy="epoch",
    )
    health = RoutingHealth(say=said.append)
    assert health.attach(trainer) is health
    trainer.train()
    rows = examples()
    assert len(logged(trainer)) == 2
    for number, entry in enumerate(logged(trainer)):
        mine = rows[4 * number : 4 * number + 4]
        want = by_hand(model, [mine[:2], mine[2:]])
        for name, worst in WORST.items():
            assert entry[f"routing/{name}"] == pytest.approx(sum(want[name]) / 2, rel=1e-5), name
            assert entry[f"routing/{name}_worst"] == pytest.approx(worst(want[name]), rel=1e-5), name
            assert health.table.logs[number][name] == pytest.approx(want[name], rel=1e-5), "each layer's"
        violations = want["max_violation"]
        assert entry["routing/worst_layer"] == violations.index(max(violations))
    assert [seen["routing/entropy"] for seen in tracker.seen if "loss" in seen] == [
        entry["routing/entropy"] for entry in logged(trainer)
    ]
    assert health.table.load_LE.sum(1).tolist() == [sum(LENGTHS) * K] * 2
    assert said == []
    assert json.loads((tmp_path / FILE).read_text()) == health.table.as_json()


def test_what_comes_after_the_last_log_is_in_the_table(tmp_path):
    trainer = trainer_of(tmp_path, tiny_model("qwen3_moe", "eager"), logging_steps=50)
    health = RoutingHealth().attach(trainer)
    trainer.train()
    assert health.table.load_LE.sum(1).tolist() == [sum(LENGTHS) * K] * 2
    assert len(json.loads((tmp_path / FILE).read_text())["load_LE"]) == 2


def test_a_continued_run_keeps_the_logs_before(tmp_path):
    first = trainer_of(tmp_path, tiny_model("qwen3_moe", "eager"), save_strategy="steps", save_steps=1)
    RoutingHealth().attach(first)
    first.train()
    second = trainer_of(tmp_path, tiny_model("qwen3_moe", "eager"), max_steps=3)
    health = RoutingHealth().attach(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["step"] for entry in health.table.logs] == [1, 2, 3]
    before = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())["log_history"][-1]
    kept = summarize(health.table.layers, health.table.logs[0])
    assert kept == {name: value for name, value in before.items() if name.startswith("routing/")}


def test_a_table_of_another_model_is_not_taken_up(tmp_path):
    table = RoutingTable(["a"], [2], torch.zeros(1, 2), [{"step": 1}])
    table.save(tmp_path / FILE)
    other = RoutingTable(["b"], [2], torch.zeros(1, 2))
    other.take_up(tmp_path / FILE, 5)
    assert other.logs == []
    other.take_up(tmp_path / "missing", 5)
    same = RoutingTable(["a"], [2], torch.zeros(1, 2))
    same.take_up(tmp_path / FILE, 0)
    assert same.logs == [], "later than what is continued"


def collapsed(how):
    """A model whose second router sends all tokens to the same experts, or is sure of one for each token."""
    model = tiny_model("qwen3_moe", "eager")
    with torch.no_grad():
        if how == "load":
            # All logits are alike, and of those top-k takes the same ones for every token.
            model.model.layers[1].mlp.gate.weight.zero_()
        else:
            model.model.layers[1].mlp.gate.weight *= 1e3
    return model


@pytest.mark.parametrize(
    ("how", "words"), [("load", "2 of its 8 experts get 100% of the load"), ("entropy", "its entropy is 0.0")]
)
def test_a_collapse_is_said_once_with_the_layer_s_name(tmp_path, how, words):
    said = []
    trainer = trainer_of(
        tmp_path,
        collapsed(how),
        gradient_accumulation_steps=1,
        max_steps=4,
        learning_rate=0.0,
        logging_steps=1,
    )
    RoutingHealth(say=said.append, patience=3).attach(trainer)
    trainer.train()
    assert len(said) == 1
    assert said[0].startswith("Router collapse: model.layers.1.mlp.experts: ")
    assert words in said[0]
    assert said[0].endswith("after 3 logs in a row.")


def test_a_collapse_that_does_not_last_is_not_said(tmp_path):
    said = []
    trainer = trainer_of(
        tmp_path, collapsed("load"), gradient_accumulation_steps=1, max_steps=4, learning_rate=0.0
    )
    RoutingHealth(say=said.append, patience=5).attach(trainer)
    trainer.train()
    assert said == []


def test_a_model_whose_tokens_take_every_expert_has_not_collapsed(tmp_path):
    said = []
    trainer = trainer_of(tmp_path, tiny_model("qwen3_moe", "eager", num_experts_per_tok=E))
    RoutingHealth(say=said.append, patience=1).attach(trainer)
    trainer.train()
    assert said == []


def test_what_has_no_routers_is_said(tmp_path):
    said = []
    model = tiny_model("qwen3_moe", "eager")
    for module in (model, model.model):
        module._can_record_outputs = {}
    trainer = trainer_of(tmp_path, model)
    RoutingHealth(say=said.append).attach(trainer)
    trainer.train()
    assert said == [
        "Router logits are not logged for 2 of 2 layers: transformers does not tell where they are."
    ]
    for entry in logged(trainer):
        assert "routing/max_violation" in entry
        assert not {name for name in entry if "entropy" in name or "logit" in name}


def test_adapters_of_experts_and_routers_hide_neither(tmp_path):
    model = tiny_model("qwen3_moe", "eager")
    want = by_hand(model, [examples()[:2]])
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    said = []
    trainer = trainer_of(tmp_path, adapted, max_steps=1, gradient_accumulation_steps=1)
    RoutingHealth(say=said.append).attach(trainer)
    trainer.train()
    assert said == []
    (entry,) = logged(trainer)
    for name in WORST:
        assert entry[f"routing/{name}"] == pytest.approx(sum(want[name]) / 2, rel=1e-5), name


def test_a_dense_model_is_said(tmp_path):
    said = []
    model = tiny_model("qwen3_moe", "eager", mlp_only_layers=[0, 1])
    trainer = trainer_of(tmp_path, model, save_strategy="steps", save_steps=1)
    RoutingHealth(say=said.append).attach(trainer)
    trainer.train()
    assert said == ["Routing health is not logged: the model has no experts in transformers' interface."]
    assert not [name for entry in logged(trainer) for name in entry if name.startswith("routing/")]
    assert not (tmp_path / FILE).exists()


def test_values_of_layers():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [6, 2, 0, 0]])
    found = load_values(counts, [4, 4, 4, 2], [2, 1, 1, 1])
    assert found["load_cv"] == [0, pytest.approx(3**0.5), None, 0.5]
    assert found["max_violation"] == [0, 3, None, 0.5]
    assert found["dead_experts"] == [0, 0.75, None, 0]
    assert found["busiest_share"] == [0.5, 1, None, 0.75]
    assert load_values(torch.tensor([[6, 1, 2, 1]]), [4], [2])["busiest_share"] == [0.8]
    sums = torch.tensor([[2.0, 2 * math.log(4), 18.0], [0, 0, 0], [1, 0, math.nan]])
    assert router_values(sums, [4, 4, 1]) == {
        "entropy": [pytest.approx(math.log(4)), None, 0],
        "entropy_normalized": [pytest.approx(1), None, None],
        "logit_norm": [3, None, None],
    }


def test_the_summary_leaves_out_what_is_not_known():
    by_layer = {name: [None, None] for name in WORST} | {"max_violation": [None, 2.0]}
    assert summarize(["x.layers.3.mlp.experts", "x.layers.7.mlp.experts"], by_layer) == {
        "routing/max_violation": 2.0,
        "routing/max_violation_worst": 2.0,
        "routing/worst_layer": 7.0,
    }


def test_the_worst_is_the_largest_and_of_entropy_the_smallest():
    by_layer = {name: [1.0, 3.0, 2.0] for name in WORST}
    logged_ = summarize([f"x.layers.{number}.mlp.experts" for number in range(3)], by_layer)
    worst = {name: value for name, value in logged_.items() if name.endswith("_worst")}
    assert worst == {f"routing/{name}_worst": 1.0 if "entropy" in name else 3.0 for name in WORST}
    assert logged_["routing/worst_layer"] == 1


@pytest.mark.parametrize("wrong", [{"max_share": 2}, {"min_entropy": -0.1}, {"patience": 0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(FastexpertsError, match=next(iter(wrong))):
        RoutingHealth(**wrong)


@pytest.mark.slow  # two processes that import transformers
def test_two_ranks_add_their_tokens(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = Path(__file__).parent / "routing_process.py"
    run = subprocess.run(
        [*command, str(script), str(tmp_path)], check=False, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [{"health": True, "balancing": True}] * 2
    assert run.stdout.count("Loss-free balancing: ") == 1, "the first rank alone speaks"
