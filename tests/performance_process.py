"""One of two ranks of a Trainer with the meter: `torchrun --nproc-per-node=2 performance_process.py FOLDER`.

Prints whether tokens and model FLOPs of both ranks' documents are in each rank's logs.
"""

import sys

import pytest
from support_hf import tiny_model
from test_mfu import LENGTHS, PEAK, Clock, flops_of, logged, trainer_of

from fastexperts.metrics.mfu import PerformanceCallback
from fastexperts.train.leave import leave

if __name__ == "__main__":
    model = tiny_model("qwen3_moe", "eager")
    patch = pytest.MonkeyPatch()
    trainer = trainer_of(
        sys.argv[1], model, [Clock(patch)], gradient_accumulation_steps=1, ddp_find_unused_parameters=True
    )
    PerformanceCallback(peak_flops=PEAK).attach(trainer)
    trainer.train()
    entries, seconds = logged(trainer), 2
    total, _ = flops_of(model, LENGTHS, "causal")
    tokens = sum(entry["perf/tokens_per_s"] * seconds for entry in entries)
    flops = sum(entry["perf/mfu"] * 2 * PEAK * seconds for entry in entries)
    right = tokens == sum(LENGTHS), flops == pytest.approx(total)
    # One write for the line and its end, or lines of two ranks mix.
    print(f"rank {trainer.args.process_index}: {right[0]} {right[1]}\n", end="", flush=True)
    leave(trainer)
