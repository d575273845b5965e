"""Loss curves in bf16 against fp32: is the default's own deviation kept, with everything of ours on?

    python benchmarks/model.py --curves --output benchmarks/results

A small Qwen3-MoE learns Python's language reference (it comes with Python), a byte a token. For each seed:
in fp32 under the default, then with bf16 weights, and with fp32 weights under bf16 autocast, under each
backend; the same first weights and batches. torch's grouped_mm does not follow autocast: there the default's
experts run in fp32, and deviate less for that.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from budget import NO_TIME, Budget
from cuts import DTYPES, Cut, meta_model
from results import DEFAULT, Case, CurveRow
from shapes import Shape
from step import BACKENDS, values_of
from torch import Tensor

MODEL = Cut(
    "text",
    "qwen3_moe",
    Shape("text", 256, 128, 16, 4),
    full_layers=4,
    batch=16,
    length=256,
    settings={
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "intermediate_size": 512,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 256,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    tiny_settings={"num_experts": 8},
)


@dataclass(frozen=True)
class Plan:
    """What is trained, for how long, and how often."""

    cut: Cut
    steps: int
    seeds: int


PLAN = Plan(MODEL, steps=200, seeds=3)
TINY = Plan(MODEL.tiny(), steps=4, seeds=2)
EXACT = "exact"
"""fp32 weights without autocast, in the place of a dtype of weights."""

Run = tuple[int, str, str]
"""(seed, weights, backend)"""


def curves(
    plan: Plan,
    budget: Budget,
    device: str,
    weights: Iterable[str] = tuple(DTYPES),
    backends: Iterable[str] = tuple(BACKENDS),
) -> Iterator[dict[str, Any]]:
    """The record so far, after every curve."""
    parameters = sum(parameter.numel() for parameter in meta_model(plan.cut).parameters())
    record = {"parameters": parameters, "steps": plan.steps, "seeds": plan.seeds}
    kinds = [(EXACT, DEFAULT), *itertools.product(weights, backends)]
    drawn: dict[Run, list[float]] = {}
    skipped: dict[str, str] = {}
    runs = [(seed, *kind) for seed in range(plan.seeds) for kind in kinds]
    for run, fits in budget.spend(runs):
        values = values_of(partial(curve, plan, *run, device)) if fits else NO_TIME
        print(*run, values.get("skipped") or _ends(values["losses"]), flush=True)
        if "losses" in values:
            drawn[run] = values["losses"]
        else:
            skipped[" ".join(map(str, run))] = values["skipped"]
        yield record | {"rows": [asdict(row) for row in rows_of(drawn)], "skipped": skipped}


def rows_of(drawn: dict[Run, list[float]]) -> list[CurveRow]:
    """Of each dtype and backend, over the seeds that were drawn, in the order in which they were."""
    rows = []
    for weights, backend in dict.fromkeys(run[1:] for run in drawn if run[1] != EXACT):
        seeds = [
            seed for seed, *kind in drawn if kind == [weights, backend] and (seed, EXACT, DEFAULT) in drawn
        ]
        pairs = [(drawn[seed, weights, backend], drawn[seed, EXACT, DEFAULT]) for seed in seeds]
        if pairs:
            deviations = [abs(loss - exact) for pair in pairs for loss, exact in zip(*pair, strict=True)]
            last, exact = (statistics.mean(_ends(pair[i])[1] for pair in pairs) for i in (0, 1))
            rows.append(CurveRow(weights, backend, len(seeds), statistics.median(deviations), last, exact))
    return rows


def _ends(losses: list[float]) -> tuple[float, float]:
    """(the first loss, the mean of the last tenth)."""
    return losses[0], statistics.mean(losses[-max(1, len(losses) // 10) :])


def curve(plan: Plan, seed: int, weights: str, backend: str, device: str) -> dict[str, Any]:
    """The loss of each step."""
    model = plan.cut.build(device, "fp32", seed)
    if weights == "bf16":
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    BACKENDS[backend](model, Case(weights=weights), plan.cut.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for ids in batches(plan, seed, device):
        with torch.autocast(device, torch.bfloat16, enabled=weights == "fp32"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses).tolist()}


def batches(plan: Plan, seed: int, device: str) -> Iterator[Tensor]:
    """[batch, length] of bytes for each step, windows of the text drawn with `seed`."""
    from pydoc_data import topics

    text = "\n".join(body for _, body in sorted(topics.topics.items())).encode()
    bytes_N = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device, torch.int64)
    generator = torch.Generator().manual_seed(seed)
    offset_L = torch.arange(plan.cut.length)
    for _ in range(plan.steps):
        start_B = torch.randint(len(text) - plan.cut.length, (plan.cut.batch, 1), generator=generator)
        yield bytes_N[(start_B + offset_L).to(device)]
