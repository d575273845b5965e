"""A whole training step of a mixture-of-experts model: transformers' default against fastexperts, in one run.

    python benchmarks/model.py --output benchmarks/results
    python benchmarks/model.py --cuts deepseek-v3,glm4.5-air,ernie4.5-21b-a3b,dots1 --weights bf16 \\
        --output benchmarks/results
    python benchmarks/model.py --trainer --output benchmarks/results
    python benchmarks/model.py --curves --output benchmarks/results
    python benchmarks/model.py --tiny --seconds 60

A cut (cuts.py) is a published model with fewer layers and random weights, drawn on the card. Every case has
a model of its own, from the same seed: full fine-tuning, or LoRA of rank 16 on attention and experts through
PEFT; weights in bf16, or in fp32 under bf16 autocast, as TRL trains. Gradient checkpointing, sdpa, the loss
by the model's `labels`, no optimizer; further cases have fused AdamW, or keep what others recompute.

Each case: 8 steps to warm up, then the median, least and most of --steps that follow each other, peak and
kept memory, MFU, and the kernels of one profiled step by part of the model (breakdown.py). "dense" is the
time of the experts' matrix products in plain cuBLAS (layer.py), from the same run.

MFU: model FLOPs of metrics/flops.py over the card's peak in dense bf16. At 379 ms, what this step took
under the default when the project began (Qwen3-30B-A3B, 6 layers, 4 x 4096), that is 19.7 % by the causal
convention, 22.4 % by the full one.

--trainer: the same model in TRL's SFTTrainer (trainer.py). --curves: loss curves against fp32 (curves.py).
--tiny: shapes for any CPU, to see that all of it runs. --seconds: no case is begun that would end later.
model-CUT.json in OUTPUT is written after every case; benchmarks/report.py makes tables of it, without a GPU.
Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from budget import NO_TIME, Budget
from cuts import CUTS, DTYPES, Cut
from model_report import curves_table, step_table, trainer_table
from results import DEFAULT, OPTIMIZED, Case, StepRow, environment, write
from step import BACKENDS, card_peak, dense_ms, describe, free, measure, values_of

MODES = ("full", "lora")
CASES = (
    *(Case(mode, weights, backend) for weights in DTYPES for mode in MODES for backend in BACKENDS),
    Case(backend=DEFAULT, optimizer=True),
    Case(backend=OPTIMIZED, optimizer=True),
    *(
        Case(mode, weights, OPTIMIZED, checkpoint=checkpoint)
        for weights in DTYPES
        for mode in MODES
        for checkpoint in ("keep-attention", "keep-experts")
    ),
    Case(backend=DEFAULT, checkpoint="off"),
    *(Case(mode, backend=OPTIMIZED, checkpoint="off") for mode in MODES),
)


def steps_of(
    cut: Cut, cases: Iterable[Case], budget: Budget, steps: int, device: str
) -> Iterator[dict[str, Any]]:
    """The record so far, after every case."""
    peak = card_peak(device)
    record = describe(cut, peak) | {"steps": steps, "dense": dense_ms(cut, device)}
    free()
    rows: list[StepRow] = []
    for case, fits in budget.spend(cases):
        values = values_of(partial(measure, cut, case, device, steps, peak)) if fits else NO_TIME
        rows.append(StepRow(**asdict(case), cut=cut.name, **values))
        print(replace(rows[-1], parts=None), flush=True)
        yield record | {"rows": [asdict(row) for row in rows]}


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; a typo ends the run here."""
    known = {"modes": MODES, "weights": tuple(DTYPES), "backends": tuple(BACKENDS)}
    asked = {}
    for option, names in known.items():
        asked[option] = getattr(args, option).split(",")
        for name in asked[option]:
            if name not in names:
                raise SystemExit(f"--{option}: no {name!r}: some of {','.join(names)}")
    return [
        case
        for case in CASES
        if case.mode in asked["modes"]
        and case.weights in asked["weights"]
        and case.backend in asked["backends"]
        and (args.extras or case == replace(case, checkpoint="full", optimizer=False))
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", default="qwen3-30b-a3b", help=f"some of {','.join(CUTS)}")
    parser.add_argument("--batch", type=int, help="sequences in a step, in the place of the cut's")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--weights", default=",".join(DTYPES))
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument(
        "--no-extras", dest="extras", action="store_false", help="no AdamW, always checkpoint"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a case")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole run")
    parser.add_argument("--trainer", action="store_true", help="in TRL's SFTTrainer")
    parser.add_argument("--curves", action="store_true", help="loss curves against fp32")
    parser.add_argument("--tiny", action="store_true", help="shapes for any CPU")
    parser.add_argument("--output", help="a folder")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("no GPU here: --tiny runs anywhere")
    for name in args.cuts.split(","):
        if name not in CUTS:
            raise SystemExit(f"no cut {name!r}: some of {','.join(CUTS)}")
    cases, budget = chosen(args), Budget(args.seconds)
    where = environment(None if device == "cuda" else "no card: the CPU") | {"peft": version("peft")}
    print(where, flush=True)

    def save(name: str, kind: str, record: Any) -> None:
        if args.output:
            write(f"{args.output}/{name}", {"environment": where, kind: record})

    if args.curves:
        import curves

        plan = curves.TINY if args.tiny else curves.PLAN
        asked = args.weights.split(","), args.backends.split(",")
        for record in curves.curves(plan, budget, device, *asked):
            save("model-curves", "curves", record)
        print(curves_table(record), flush=True)
        return
    for name in args.cuts.split(","):
        cut = CUTS[name].tiny() if args.tiny else CUTS[name]
        cut = replace(cut, batch=args.batch or cut.batch)
        if args.trainer:
            from trainer import trainings

            for record in trainings(cut, cases, budget, args.steps, device):
                save(f"trainer-{name}", "trainer", record)
            print(trainer_table(record), flush=True)
        else:
            for record in steps_of(cut, cases, budget, args.steps, device):
                save(f"model-{name}", "model", record)
            print(step_table(record), flush=True)


if __name__ == "__main__":
    main()
