"""LoRA of frozen experts through PEFT, against the frozen layer, PEFT's fold and split LoRA, in one run.

    python benchmarks/lora.py --output benchmarks/results/lora
    python benchmarks/lora.py --shapes qwen3-30b,glm4.5-air --ranks 16,8,64,128 \\
        --output benchmarks/results/lora

One layer of transformers' Qwen3-MoE experts, to which `peft.get_peft_model` with `target_parameters` of both
projections was applied; forward + backward to x, the routing weights and the factors, which PEFT keeps in
fp32. Taking turns:

    frozen       our layer without its adapter: gradients of x and of the routing weights alone
    fastexperts  our layer under PEFT's wrapper
    peft         PEFT's fold, W' = W + s B A, and transformers' grouped_mm
    split        two more grouped GEMMs a projection, on torch._grouped_mm; factors in the experts' dtype
    PEER         one of peers.py on folded weights, if --implementations names it: none of them knows LoRA,
                 and Liger's tunes itself for minutes

Errors are relative Frobenius against a loop over experts in fp64, of the output and every gradient.
baddbmm: calls of that operator, the fold, in one step as the profiler saw them.

OUTPUT.json is written after every problem; benchmarks/report.py makes the tables of it.
"""

from __future__ import annotations

import argparse
import gc

import torch
from adapters import FACTORS, FROZEN, NAMES, Adapted, Contestant, loop_fp64
from layer import memory, reason
from peers import PEERS
from problems import Problem, make_experts, relative
from results import LoraRow, environment, write_lora
from shapes import SHAPES
from timing import take_turns
from torch import Tensor

import fastexperts


def rows(adapted: Adapted, names: list[str]) -> list[LoraRow]:
    """One for each of `names`."""
    contestants, found, skipped, truths = {}, {}, {}, {}
    for name in names:
        contestant, adds = Contestant(name, adapted), name != FROZEN
        if adds not in truths:
            truths[adds] = loop_fp64(adapted, with_adapter=adds)
        try:
            found[name] = check(contestant, truths[adds]) | memory(contestant)
            contestants[name] = contestant
        except torch.OutOfMemoryError as e:
            skipped[name] = reason(e)
        gc.collect()
        torch.cuda.empty_cache()
    calls = {}
    for name, contestant in contestants.items():
        calls[name, "forward"], calls[name, "step"] = contestant.forward, contestant.step
    times = take_turns(calls)
    made = []
    for name in names:
        if name in skipped:
            made.append(row(adapted, name, skipped=skipped[name]))
            continue
        forward, step = times[name, "forward"], times[name, "step"]
        made.append(
            row(adapted, name, forward_ms=forward.ms, step_ms=step.ms, host_ms=step.host_ms, **found[name])
        )
    return made


def row(adapted: Adapted, name: str, **values: object) -> LoraRow:
    problem = adapted.problem
    return LoraRow(problem.shape.name, problem.tokens, problem.routing, name, rank=adapted.rank, **values)


def check(contestant: Contestant, truth: tuple[Tensor, ...]) -> dict[str, object]:
    """Errors, and how often a step folds."""
    names = ("out", "x", "weight", *FACTORS)  # without an adapter, the first three
    errors = {name: relative(*pair) for name, *pair in zip(names, contestant.results(), truth, strict=False)}
    return {"errors": errors, "errors_against": "fp64", "baddbmm": folds(contestant)}


def folds(contestant: Contestant) -> int:
    """Calls of baddbmm in a step, those of backward and inside other operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        contestant.step()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::baddbmm"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--ranks", default="16")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--routing", default="balanced", choices=("balanced", "skewed"))
    parser.add_argument("--implementations", default=",".join(NAMES))
    parser.add_argument("--output", help="without a suffix")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    names = args.implementations.split(",")
    for name in names:
        if name not in (*NAMES, *PEERS):
            raise SystemExit(f"no implementation {name!r}: one of {', '.join((*NAMES, *PEERS))}")
    import peft

    fastexperts.register()
    where, made = environment() | {"peft": peft.__version__}, []
    print(where, flush=True)
    for shape in args.shapes.split(","):
        experts = make_experts(SHAPES[shape], torch.bfloat16)
        for tokens in args.tokens.split(","):
            problem = Problem.make(SHAPES[shape], int(tokens), args.routing, experts)
            for rank in args.ranks.split(","):
                adapted = Adapted.make(problem, int(rank))
                for found in rows(adapted, names):
                    print(found, flush=True)
                    made.append(found)
                if args.output:
                    write_lora(args.output, made, where)
                del adapted
                gc.collect()
                torch.cuda.empty_cache()
        del experts, problem


if __name__ == "__main__":
    main()
