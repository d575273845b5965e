"""The same model in TRL's SFTTrainer: its own defaults, with PerformanceCallback's log and a clock beside it.

    python benchmarks/model.py --trainer --output benchmarks/results

TRL's defaults are fp32 weights under bf16 autocast, gradient checkpointing, clipped gradients, a loss whose
logits are made in chunks, and a log every 10 steps, of which the first is for warming up. Its AdamW is left
out: the fp32 state of a cut would not fit the card.
With optimize, what experts and attention gave is kept and the rest recomputed: `auto` would count AdamW's
state.

A machine with torch, transformers and PEFT alone, and without a network, takes these wheels along, by
`pip install --no-deps --target FOLDER` and PYTHONPATH=FOLDER:src: trl==1.16.0 datasets==5.2.0 dill==0.4.1
multiprocess==0.70.19 (their other needs are those of transformers, pandas, pyarrow and xxhash), and
liger_kernel==0.8.5 for optimize.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from budget import NO_TIME, Budget
from cuts import Cut
from results import Case, TrainerRow
from step import WARMUP, card_peak, describe, use_optimize, values_of, with_lora
from transformers import TrainerCallback

import fastexperts
from fastexperts.metrics.flops import count_flops
from fastexperts.metrics.mfu import PerformanceCallback

LOGGING_STEPS = 10  # TRL's own
NO_PEAK = 1e12  # a CPU's is not known: the two MFUs are compared with each other alone


class NoUpdate(torch.optim.Optimizer):
    """Leaves the weights as they are, and keeps no state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


class Clock(TrainerCallback):
    """When each step ended, by events on a card."""

    def __init__(self, device: str, warmup: int) -> None:
        self.on_card, self.warmup = device == "cuda", warmup
        self.ends: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.on_card:
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())

    def step_ms(self) -> float:
        """The median, from end to end, without the first `warmup` steps."""
        pairs = itertools.pairwise(self.ends[self.warmup - 1 :])
        if not self.on_card:
            return 1e3 * statistics.median(end - start for start, end in pairs)
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


def trainings(
    cut: Cut, cases: Iterable[Case], budget: Budget, steps: int, device: str
) -> Iterator[dict[str, Any]]:
    """The record so far, after every training."""
    import trl

    peak = card_peak(device)
    record = describe(cut, peak) | {"steps": steps, "trl": trl.__version__}
    wanted = dict.fromkeys(
        Case(case.mode, "fp32", case.backend, checkpoint="keep-attention") for case in cases
    )
    rows: list[TrainerRow] = []
    for case, fits in budget.spend(wanted):
        values = values_of(partial(train, cut, case, steps, device, peak)) if fits else NO_TIME
        rows.append(TrainerRow(case.mode, case.backend, **values))
        print(rows[-1], flush=True)
        yield record | {"rows": [asdict(row) for row in rows]}


def train(cut: Cut, case: Case, steps: int, device: str, peak: float | None) -> dict[str, Any]:
    """The numbers of a row: medians of `steps` steps, after some to warm up."""
    from trl import SFTTrainer

    from fastexperts.train.tokenizer import byte_tokenizer

    model = cut.build(device, case.weights)
    if case.mode == "lora":  # here, and not by SFTTrainer, which does the same: optimize has to see it
        model = with_lora(model)
    note, options = SWITCHES[case.backend](model, case, cut.tokens)
    every = min(steps, LOGGING_STEPS)
    warmup = every * math.ceil(WARMUP / every)
    clock = Clock(device, warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=arguments(cut, folder, warmup + steps, device, options | {"logging_steps": every}),
            processing_class=byte_tokenizer(),
            train_dataset=random_dataset(cut, warmup + steps),
            callbacks=[clock],
            optimizer_cls_and_kwargs=(NoUpdate, {}),
        )
        PerformanceCallback(peak_flops=peak or NO_PEAK).attach(trainer)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "perf/mfu" in log][warmup // every :]

    def logged(name: str) -> float | None:
        return statistics.median(log[name] for log in logs) if name in logs[0] else None

    step_ms = clock.step_ms()
    flops = cut.tokens * count_flops(trainer.model).per_token(cut.length).by("causal").total
    return {
        "step_ms": step_ms,
        "tokens_per_s": logged("perf/tokens_per_s"),
        "mfu_logged": logged("perf/mfu"),
        "mfu_clocked": flops / (step_ms / 1e3) / (peak or NO_PEAK),
        "peak_gib": logged("perf/peak_memory"),
        "loss": logs[-1]["loss"],
        "note": note,
    }


def arguments(cut: Cut, folder: str, steps: int, device: str, options: dict[str, Any]) -> Any:
    """TRL's, but for the batch, what it saves and `options`."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=cut.batch,
        max_length=cut.length,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **options,
    )


def random_dataset(cut: Cut, steps: int) -> Any:
    """Tokenized: as many sequences of the full length as `steps` train on."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    shape = cut.batch * steps, cut.length
    ids = torch.randint(cut.settings["vocab_size"], shape, generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def _default(model: Any, case: Case, tokens: int) -> tuple[str, dict[str, Any]]:
    return "", {}


def _experts(model: Any, case: Case, tokens: int) -> tuple[str, dict[str, Any]]:
    fastexperts.enable(model, verbose=False)
    return "", {}


def _optimize(model: Any, case: Case, tokens: int) -> tuple[str, dict[str, Any]]:
    # TRL has a fused loss of its own; and Trainer would set its checkpointing over what optimize chose.
    options = {"gradient_checkpointing": False}
    return use_optimize(model, case, tokens, parts={"loss": False}), options


SWITCHES = {"grouped_mm": _default, "fastexperts": _experts, "fastexperts + optimize": _optimize}
"""backend -> (model, case, tokens of a step) -> (what there is to say, arguments of SFTConfig)."""
