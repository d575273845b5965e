"""What Triton's compiler costs: the first step after import, cold and warm, and what later steps compile.

    python benchmarks/compile_time.py --output benchmarks/results/compile-time

Every line of the first table is a process of its own, on an empty or a filled TRITON_CACHE_DIR, with Python's
bytecode cached as an installation has it (the lent H100's host has none, and without it compiles 100 modules
of Triton anew in each process). A step is forward and backward of a scalar loss with all gradients of one
layer in bf16, as a training step has it: `torch.autograd.grad` with a given gradient of the output would
import sympy first, in PyTorch itself. Compilations are counted in the caches that our kernels hold in memory:
one that was found on disk counts as well.

The floor is what Triton itself takes for the first launch of an empty kernel that it finds on disk: its
import and, for its cache's keys, a hash of its own library (460 MB). `--profile` prints where the time of a
warm first step goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

CHANGES = ((1, "balanced"), (7, "balanced"), (12345, "balanced"), (16384, "balanced"), (16384, "skewed"))
MARK = "compile_time: "


def compilations() -> int:
    """Specialisations of our kernels that this process holds."""
    from triton.runtime.jit import JITFunction

    functions = {
        value
        for name, module in sys.modules.items()
        if name.startswith("fastexperts.kernels")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    # device -> (compiled kernels by specialisation, ...)
    caches = [cache for function in functions for cache, *_ in function.device_caches.values()]
    return sum(map(len, caches))


def child(shape_name: str, tokens: int, profile: bool = False) -> dict[str, object]:
    """One process: import, CUDA context, two steps, and then the changes."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    start = time.perf_counter()
    import torch

    import fastexperts

    imported = time.perf_counter() - start
    context = seconds(lambda: torch.zeros(1, device="cuda"))

    from problems import Problem, make_experts
    from shapes import SHAPES

    shape = SHAPES[shape_name]
    experts = make_experts(shape, torch.bfloat16)

    def step_of(tokens: int, kind: str) -> Callable[[], object]:
        problem = Problem.make(shape, tokens, kind, experts)
        x, weight, w1, w2 = problem.leaves

        def step() -> object:
            out_TD = fastexperts.moe_mlp(x, problem.ids_TK, weight, w1, w2)
            return torch.autograd.grad(torch.sum(out_TD * problem.dout_TD), problem.leaves)

        return step

    step = step_of(tokens, "balanced")
    torch.cuda.synchronize()
    if profile:
        profiled(lambda: seconds(step))
        return {}
    first, second = seconds(step), seconds(step)
    built = compilations()
    if not built:
        raise RuntimeError("no compiled kernel was found: this Triton keeps them elsewhere")
    changes = []
    for count, kind in CHANGES:
        before = compilations()
        seconds(step_of(count, kind))
        changes.append({"what": f"T = {count:,}, {kind}", "new": compilations() - before})
    times = {"import_s": imported, "context_s": context, "first_step_s": first, "second_step_s": second}
    return {**times, "built": built, "changes": changes}


def floor() -> dict[str, object]:
    """One process: the first launch of an empty kernel, Triton's import included."""
    import torch

    torch.zeros(1, device="cuda")
    start = time.perf_counter()
    import triton

    @triton.jit
    def empty(p_x):  # type: ignore[no-untyped-def]
        pass

    empty[(1,)](torch.zeros(1, device="cuda"))
    torch.cuda.synchronize()
    return {"first_launch_s": time.perf_counter() - start}


def profiled(call: Callable[[], object]) -> None:
    """Print what `call` spends its time in, to stderr."""
    profile = cProfile.Profile()
    profile.runcall(call)
    pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(45)


def with_bytecode(cache: str) -> dict[str, str]:
    """The environment of a process that finds bytecode in `cache`, and leaves it there."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": f"{cache}/bytecode"}


def run_child(shape: str, tokens: int, cache: str, *flags: str) -> dict[str, object]:
    """`child`, or what `flags` name, in a process of its own, with Triton's cache in `cache`."""
    command = [sys.executable, __file__, "--child", "--shape", shape, "--tokens", str(tokens), *flags]
    environment = with_bytecode(cache) | {"TRITON_CACHE_DIR": f"{cache}/triton"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode or not lines:
        raise SystemExit(f"the run on {cache} failed:\n{result.stdout}\n{result.stderr}")
    if "--profile" in flags:
        print(result.stderr, file=sys.stderr)
    return json.loads(lines[-1].removeprefix(MARK))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b")
    parser.add_argument("--tokens", type=int, default=256, help="of the first step")
    parser.add_argument("--output", help="without a suffix")
    parser.add_argument("--profile", action="store_true", help="of a warm first step, to stderr")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--floor", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = floor() if args.floor else child(args.shape, args.tokens, args.profile)
        print(MARK + json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as cache:
        imports = "import torch, triton.compiler, fastexperts.kernels"
        subprocess.run([sys.executable, "-c", imports], env=with_bytecode(cache), check=True)
        runs = [
            {"cache": name, **run_child(args.shape, args.tokens, cache)}
            for name in ("cold", "warm", "warm", "warm")
        ]
        _, floor_run = (run_child(args.shape, args.tokens, cache, "--floor") for _ in range(2))
        if args.profile:
            run_child(args.shape, args.tokens, cache, "--profile")
    # all see the same changes; what the cold one compiled, the others find on disk and count too
    changes = runs[0]["changes"]
    for run in runs:
        if run.pop("changes") != changes:
            raise SystemExit(f"{run['cache']}: other compilations than in the cold run")

    from report import compile_section
    from results import environment, write

    found = {"shape": args.shape, "tokens": args.tokens, "runs": runs, "changes": changes, "floor": floor_run}
    record = {"environment": environment(), "compile": found}
    print(compile_section(record))
    if args.output:
        write(args.output, record)


if __name__ == "__main__":
    main()
