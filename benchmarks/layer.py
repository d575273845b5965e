"""The experts layer against the limit and the peers that import here, in one run on one card.

    python benchmarks/layer.py --output benchmarks/results/layer-qwen3-30b
    python benchmarks/layer.py --shapes all --tokens 1024,4096,16384,32768 --routing balanced,skewed \\
        --implementations grouped_mm,fastexperts --truth grouped_mm --no-breakdown \\
        --output benchmarks/results/layer-shapes

Per problem and implementation: forward, forward + backward (all gradients), kept and peak memory, and
relative Frobenius errors, against a loop over experts in fp64 (on the GPU: one Qwen3-30B layer takes 30 GB)
or against grouped_mm of the same inputs. "dense", the limit, is the six GEMMs of the same FLOPs over all rows
(plain cuBLAS, no routing), taking turns with the others. NAME-fp32: fp32 weights and tokens under bf16
autocast; NAME-pointers: FASTEXPERTS_TMA=0. With the first problem comes a breakdown of our step.

OUTPUT.json is written after every problem; benchmarks/report.py makes tables and plots of it, without a GPU.
Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or the large shapes fragment the memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Iterable

import torch
from passes import is_product, layer_passes
from peers import PEERS
from problems import (
    Bound,
    Implementation,
    Problem,
    dense_products,
    deviations,
    loop_fp64,
    make_experts,
)
from results import Breakdown, PassRow, Row, environment, write_layer
from shapes import SHAPES
from timing import Call, Times, graphed, kernels, take_turns
from torch import Tensor

import fastexperts

MIB = 1 << 20
COPY = 1 << 30  # bytes of the copy that tells the memory's speed
EXTRAS = ("eager", "grouped_mm", "fastexperts", "fastexperts-fp32", "fastexperts-pointers")


class Combination:
    """All implementations on one problem."""

    def __init__(self, problem: Problem, names: Iterable[str], truth: str) -> None:
        self.problem, self.truth, self.names = problem, truth, tuple(names)
        self.bound: dict[str, Bound] = {}
        self.found: dict[str, dict[str, object]] = {}
        self.skipped: dict[str, str] = {}

    def rows(self) -> list[Row]:
        """Dense first."""
        self._prepare()
        calls = {}
        for name, bound in self.bound.items():
            calls[name, "forward"], calls[name, "step"] = bound.forward, bound.step
        try:
            calls |= self._dense()
            times = self._times(calls)
        except torch.OutOfMemoryError as e:
            return [self._row(name, skipped=reason(e)) for name in ("dense", *self.names)]
        forward, backward = times["dense", "forward"].ms, times["dense", "backward"].ms
        rows = [self._row("dense", forward_ms=forward, step_ms=forward + backward)]
        for name in self.bound:
            step = times[name, "step"]
            values = {"forward_ms": times[name, "forward"].ms, "step_ms": step.ms, "host_ms": step.host_ms}
            rows.append(self._row(name, **values, **self.found[name]))
        return rows + [self._row(name, skipped=why) for name, why in self.skipped.items()]

    def _dense(self) -> dict[tuple[str, str], Call]:
        products = dense_products(self.problem.shape, self.problem.tokens)
        return {
            ("dense", "forward"): lambda: [products[name]() for name in ("up", "down")],
            ("dense", "backward"): lambda: [products[name]() for name in ("dh", "dw2", "dx", "dw1")],
        }

    def _times(self, calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], Times]:
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        times = take_turns(calls)
        if torch.cuda.memory_stats()["num_alloc_retries"] > retries:
            print("WARNING: the allocator gave memory back while the clocks ran", flush=True)
        return times

    def _row(self, name: str, **values: object) -> Row:
        return Row(self.problem.shape.name, self.problem.tokens, self.problem.routing, name, **values)

    def _prepare(self) -> None:
        """Compile, memory and errors of each; what does not fit the card is left out, with the reason."""
        truth = self._truth()
        wide: Problem | None = None
        for name in self.names:
            implementation = Implementation.parse(name)
            problem = self.problem
            if implementation.fp32:
                problem = wide = wide or problem.to(torch.float32)
            try:
                bound = implementation.bind(problem)
                self.found[name] = self._errors(bound, truth) | memory(bound)
                self.bound[name] = bound
            except torch.OutOfMemoryError as e:
                self.skipped[name] = reason(e)
            gc.collect()
            torch.cuda.empty_cache()

    def _truth(self) -> tuple[Tensor, ...] | None:
        if self.truth == "fp64":
            return loop_fp64(self.problem)
        try:
            return Implementation(self.truth).bind(self.problem).step()
        except torch.OutOfMemoryError:
            print(f"no errors: {self.truth} does not fit the card", flush=True)
            return None

    def _errors(self, bound: Bound, truth: tuple[Tensor, ...] | None) -> dict[str, object]:
        if truth is None or bound.implementation == Implementation(self.truth):
            return {}
        return {"errors": deviations(bound.step(), truth), "errors_against": self.truth}


def reason(error: torch.OutOfMemoryError) -> str:
    return str(error).split(". ", maxsplit=1)[0]


def memory(bound: Bound) -> dict[str, float]:
    """Kept: allocated after forward, output included; peak: over forward and backward."""
    bound.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = bound.forward()
    kept = torch.cuda.memory_allocated() - before
    del out
    step = bound.step()
    peak = torch.cuda.max_memory_allocated() - before
    del step
    return {"kept_mib": kept / MIB, "peak_mib": peak / MIB}


def breakdown(problem: Problem) -> Breakdown:
    """Each pass of our step alone and its dense product, replayed from CUDA graphs, L2 flushed before each;
    and the kernels of whole steps.
    """
    passes, products = layer_passes(problem), dense_products(problem.shape, problem.tokens)
    source, target = (torch.zeros(COPY, dtype=torch.int8, device="cuda") for _ in range(2))
    tiny = torch.zeros(1, device="cuda")
    calls = {("pass", name): graphed(step.call) for name, step in passes.items()}
    calls |= {("dense", name): graphed(call) for name, call in products.items()}
    calls["copy"], calls["timer"] = graphed(lambda: target.copy_(source)), graphed(tiny.zero_)
    times = {name: found.ms for name, found in take_turns(calls, measure_ms=60.0).items()}
    rows = [
        PassRow(name, times["pass", name], step.flops, step.bytes, times.get(("dense", name)))
        for name, step in passes.items()
    ]
    seen = kernels(Implementation("fastexperts").bind(problem).step)
    return Breakdown(
        problem.shape.name,
        problem.tokens,
        problem.routing,
        copy_ms=times["copy"],
        copy_bytes=2 * COPY,
        timer_ms=times["timer"],
        passes=rows,
        kernels=[(name, ms, launches, is_product(name)) for name, (ms, launches) in seen.items()],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b", help=f"all, or some of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--routing", default="balanced", help="balanced,skewed")
    parser.add_argument("--implementations", default=",".join((*EXTRAS, *PEERS)))
    parser.add_argument("--truth", default="fp64", choices=("fp64", "grouped_mm"))
    parser.add_argument("--no-breakdown", dest="breakdown", action="store_false")
    parser.add_argument("--output", help="without a suffix")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    names = args.implementations.split(",")
    for name in names:
        Implementation.parse(name)  # a typo ends the run here
    shapes = [SHAPES[name] for name in (SHAPES if args.shapes == "all" else args.shapes.split(","))]
    problems = list(itertools.product([int(t) for t in args.tokens.split(",")], args.routing.split(",")))
    fastexperts.register()
    where, rows, steps = environment(), [], None
    print(where, flush=True)
    for shape in shapes:
        experts = make_experts(shape, torch.bfloat16)
        for tokens, kind in problems:
            problem = Problem.make(shape, tokens, kind, experts)
            if args.breakdown and steps is None:
                steps = breakdown(problem)
                print(steps, flush=True)
            for row in Combination(problem, names, args.truth).rows():
                print(row, flush=True)
                rows.append(row)
            if args.output:
                write_layer(args.output, rows, steps, where)
            del problem
            torch.cuda.empty_cache()
        del experts


if __name__ == "__main__":
    main()
