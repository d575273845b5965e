"""What the meter logs of a training run: rates of what was trained, against the card's peak."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes import settings
from rich.console import Console
from support_hf import tiny_model, tokens
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastexperts.errors import FastexpertsError
from fastexperts.metrics import mfu
from fastexperts.metrics.flops import count_flops
from fastexperts.metrics.mfu import PEAK_FLOPS, PerformanceCallback, peak_flops, recomputed_share
from fastexperts.metrics.tokens import TokenMeter
from fastexperts.train.recipe import parse_recipe
from fastexperts.train.report import describe_run
from fastexperts.train.sft import train

PAD = 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 60.5e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA A100-40C", None),
        ("NVIDIA A40-48Q", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peaks_are_the_card_s(name, peak):
    assert peak_flops(name) == peak


def test_no_peak_hides_another():
    assert all(peak_flops(name) == peak for name, peak in PEAK_FLOPS)


class Clock(TrainerCallback):
    """Time that passes where a test says so: 2 s for a micro-batch, 100 s for an evaluation or a save."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(mfu.time, "perf_counter", lambda: self.now)

    def on_step_begin(self, *_, **__):
        self.now += 2

    on_substep_end = on_step_begin

    def on_evaluate(self, *_, **__):
        self.now += 100

    on_save = on_evaluate


class Tracker(TrainerCallback):
    """A tracker, such as TensorBoard: it takes what is in the logs when it is called."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


LENGTHS = (3, 12, 7, 9, 1, 12, 4, 8)
PEAK = 1e6


def examples():
    return [{"input_ids": tokens(n, 1, length)[0].tolist()} for n, length in enumerate(LENGTHS)]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in rows])
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def trainer_of(folder, model, callbacks=(), **arguments):
    """Two steps of two micro-batches of two rows, in order: LENGTHS is what is trained on."""
    chosen = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **arguments,
    }
    args = TrainingArguments(str(folder), **chosen)
    return InOrder(model, args, collate, examples(), examples(), callbacks=list(callbacks))


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def flops_of(model, documents, convention):
    """(model FLOPs, those of the layers' forward), document by document."""
    works = [count_flops(model).per_token(length).by(convention) * length for length in documents]
    return sum(work.total for work in works), sum(work.repeated for work in works)


@pytest.mark.parametrize("convention", ["causal", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_s_logs_have_them(tmp_path, monkeypatch, convention, checkpointing):
    said, tracker = [], Tracker()
    model = tiny_model("qwen3_moe", "eager")
    trainer = trainer_of(tmp_path, model, [Clock(monkeypatch), tracker], gradient_checkpointing=checkpointing)
    performance = PerformanceCallback(convention=convention, peak_flops=PEAK, say=said.append)
    assert performance.attach(trainer) is performance
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 2
    for entry, documents in zip(entries, (LENGTHS[:4], LENGTHS[4:]), strict=True):
        seconds = 4  # two micro-batches
        total, repeated = flops_of(model, documents, convention)
        assert entry["perf/tokens_per_s"] == sum(documents) / seconds
        assert entry["perf/mfu"] == pytest.approx(total / (PEAK * seconds), rel=1e-9)
        hardware = total + repeated * checkpointing
        assert entry["perf/hfu"] == pytest.approx(hardware / (PEAK * seconds), rel=1e-9)
        assert "perf/peak_memory" not in entry, "of CUDA alone"
    assert [seen["perf/mfu"] for seen in tracker.seen if "loss" in seen] == [e["perf/mfu"] for e in entries]
    assert len(said) == 1
    assert f"{convention} attention; peak 0.0 TFLOP/s on each of 1 x cpu" in said[0]
    assert "active of" in said[0]


def test_evaluation_and_saving_take_no_time(tmp_path, monkeypatch):
    trainer = trainer_of(
        tmp_path,
        tiny_model("qwen3_moe", "eager"),
        [Clock(monkeypatch)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        gradient_accumulation_steps=1,
        logging_steps=2,
    )
    PerformanceCallback(say=lambda line: None).attach(trainer)
    # The clock stands behind it: its evaluation ends before ours is told.
    handler = trainer.callback_handler
    handler.callbacks.sort(key=lambda callback: not isinstance(callback, Clock))
    trainer.train()
    rates = [entry["perf/tokens_per_s"] for entry in logged(trainer)]
    assert rates == [sum(LENGTHS[:4]) / 4, sum(LENGTHS[4:]) / 4]


def test_without_a_peak_the_rate_is_logged_and_the_reason_said_once(tmp_path):
    said = []
    trainer = trainer_of(tmp_path, tiny_model("qwen3_moe", "eager"), [PerformanceCallback(say=said.append)])
    trainer.train()
    assert said == [
        "MFU is not logged: the peak of cpu is not known. Give PerformanceCallback(peak_flops=...)."
    ]
    for entry in logged(trainer):
        assert entry["perf/tokens_per_s"] > 0
        assert "perf/mfu" not in entry
        assert "perf/hfu" not in entry


def test_a_model_that_cannot_be_counted_is_said(tmp_path, monkeypatch):
    def refuse(_):
        raise FastexpertsError("count_flops: no")

    monkeypatch.setattr(mfu, "count_flops", refuse)
    said = []
    trainer = trainer_of(
        tmp_path,
        tiny_model("qwen3_moe", "eager"),
        [PerformanceCallback(peak_flops=PEAK, say=said.append)],
    )
    trainer.train()
    assert said == ["MFU is not logged: count_flops: no"]
    assert "perf/tokens_per_s" in logged(trainer)[0]


@pytest.mark.parametrize(
    "wrong", [{"convention": "half"}, {"peak_flops": 0}, {"peak_flops": -1.0}, {"peak_flops": float("nan")}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(FastexpertsError, match=next(iter(wrong))):
        PerformanceCallback(**wrong)


def test_the_share_of_checkpointed_layers():
    model = tiny_model("qwen3_moe", "eager")
    assert recomputed_share(model) == 0
    model.gradient_checkpointing_enable()
    assert recomputed_share(model) == 1
    model.model.layers[0].gradient_checkpointing = False
    assert recomputed_share(model) == 0.5
    assert recomputed_share(nn.Linear(2, 2)) == 0


def test_fsdp_s_checkpoint_wrapper_is_seen_and_counts_the_same():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny_model("qwen3_moe", "eager")
    whole = count_flops(model)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    assert count_flops(model) == whole
    assert recomputed_share(model) == 0.5


def test_a_recipe_s_run_has_them(tmp_path, monkeypatch):
    taken, take = [], TokenMeter.take
    monkeypatch.setattr(TokenMeter, "take", lambda self: taken.append(take(self)) or taken[-1])
    recipe = parse_recipe(settings(tmp_path, steps=3))
    assert recipe.data.packing
    result = train(recipe, console=Console(quiet=True))
    assert len(taken) == 3
    assert sum(tokens for tokens, _ in taken) == result.trainer._total_train_tokens
    performance = describe_run(recipe, result)["performance"]
    assert performance.keys() == {"perf/tokens_per_s"}, "on a CPU"
    assert performance["perf/tokens_per_s"] > 0


def test_ranks_are_summed_or_the_largest_is_taken(monkeypatch):
    others = {"SUM": [3.0, 4.0], "MAX": [9.0, 1.0]}

    def all_reduce(values, op):
        how = {torch.distributed.ReduceOp.SUM: "SUM", torch.distributed.ReduceOp.MAX: "MAX"}[op]
        other = torch.tensor(others[how], dtype=values.dtype)
        values.copy_(values + other if how == "SUM" else values.maximum(other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    assert mfu._reduce(args, [1.0, 2.0], "SUM") == [4.0, 6.0]
    assert mfu._reduce(args, [5.0, 2.0], "MAX") == [9.0, 2.0]


def test_rates_are_of_all_ranks_work_in_the_slowest_one_s_time(tmp_path, monkeypatch):
    """As if another rank had trained on as many tokens, in 4 times the time."""
    factors = {"SUM": 2, "MAX": 4}
    monkeypatch.setattr(mfu, "_reduce", lambda args, values, how: [factors[how] * each for each in values])
    model = tiny_model("qwen3_moe", "eager")
    trainer = trainer_of(tmp_path, model, [Clock(monkeypatch)], max_steps=1)
    PerformanceCallback(peak_flops=PEAK, say=lambda line: None).attach(trainer)
    trainer.train()
    (entry,), seconds = logged(trainer), 4 * 4
    total, _ = flops_of(model, LENGTHS[:4], "causal")
    assert entry["perf/tokens_per_s"] == 2 * sum(LENGTHS[:4]) / seconds
    assert entry["perf/mfu"] == pytest.approx(2 * total / (PEAK * seconds), rel=1e-9)


@pytest.mark.slow  # two processes that import transformers
def test_two_ranks_add_their_tokens(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = Path(__file__).parent / "performance_process.py"
    command += [str(script), str(tmp_path)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line.startswith("rank ")]
    assert sorted(lines) == [f"rank {rank}: True True" for rank in (0, 1)]
    assert run.stdout.count("MFU: ") == 1, "the first rank alone speaks"
