"""One of two ranks whose routers are watched and balanced: `torchrun ... routing_process.py FOLDER`.

Writes whether the load in each rank's logs, and the bias on each rank, are those of both ranks' tokens.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from support_hf import tiny_model
from test_balancing import RATE, bias_of, load_of
from test_mfu import examples, logged, trainer_of

from fastexperts.metrics.routing_health import RoutingHealth
from fastexperts.train.balancing import LossFreeBalancing
from fastexperts.train.leave import leave

if __name__ == "__main__":
    model, alone = (tiny_model("deepseek_v3", "eager") for _ in range(2))
    loads = []
    for step in range(2):
        rows = examples()[4 * step : 4 * step + 4]
        loads.append(load_of(alone, rows))
        bias_of(alone).add_(RATE * torch.sign(loads[-1].double().mean() - loads[-1]).float())
    trainer = trainer_of(
        sys.argv[1],
        model,
        [LossFreeBalancing(RATE)],
        gradient_accumulation_steps=1,
        learning_rate=0.0,
        ddp_find_unused_parameters=True,
    )
    health = RoutingHealth().attach(trainer)
    trainer.train()
    want = [float(load.max() / load.double().mean() - 1) for load in loads]
    healthy = [entry["routing/max_violation"] for entry in logged(trainer)] == pytest.approx(want)
    healthy &= bool(torch.equal(health.table.load_LE, sum(loads)[None]))
    balanced = bool(torch.allclose(bias_of(model), bias_of(alone), rtol=0, atol=1e-7))
    found = {"health": healthy, "balancing": balanced}
    Path(sys.argv[1], f"rank-{trainer.args.process_index}.json").write_text(json.dumps(found))
    leave(trainer)
