"""The experts layer against the limit and the peers that import here, in one run on one card.

    PYTHONPATH=src python benchmarks/layer.py --shapes qwen3-30b --tokens 16384 --output results/layer

Per implementation: forward, forward + backward (all gradients), TF/s, the share of dense, kept and peak
memory, and relative Frobenius errors against an fp64 loop. "dense" is the six GEMMs of the same FLOPs over
all rows (plain cuBLAS, no routing): the limit. "-fp32" is fp32 weights under bf16 autocast. Writes
OUTPUT.json, OUTPUT.md and OUTPUT.png; the breakdown is that of the first shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import triton
from passes import layer_passes
from peers import PEERS
from shapes import SHAPES, Shape, routing
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fastexperts

MIB = 1 << 20
GRADIENTS = ("x", "weight", "w1", "w2")


@dataclass(frozen=True)
class Problem:
    """One layer: tokens, routing, weights and the gradient of the output. fp32 routing weights."""

    shape: Shape
    x_TD: Tensor
    ids_TK: Tensor
    weight_TK: Tensor
    w1_EGD: Tensor
    w2_EDF: Tensor
    dout_TD: Tensor

    @staticmethod
    def make(shape: Shape, tokens: int, kind: str, dtype: torch.dtype) -> Problem:
        ids_TK, weight_TK = routing(shape, tokens, kind, "cuda")
        generator = torch.Generator(device="cuda").manual_seed(1)

        def normal(*dims: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*dims, device="cuda", dtype=dtype, generator=generator) * scale

        d, f, e = shape.dim_d, shape.dim_f, shape.experts
        w1, w2 = normal(e, 2 * f, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)
        x, weight, w1, w2 = (torch.nn.Parameter(t) for t in (normal(tokens, d), weight_TK, w1, w2))
        return Problem(shape, x, ids_TK, weight, w1, w2, normal(tokens, d))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_TD, self.weight_TK, self.w1_EGD, self.w2_EDF

    def backward(self, out_TD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out_TD, self.leaves, self.dout_TD)


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms (medians), memory in MiB, errors relative."""

    shape: str
    tokens: int
    routing: str
    implementation: str
    forward_ms: float
    step_ms: float
    forward_tflops: float
    step_tflops: float
    share_of_dense: float | None = None
    kept_mib: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float] | None = None


def transformers_layer(problem: Problem, implementation: str) -> Callable[[], Tensor]:
    """The call of transformers' Qwen3-MoE experts under `implementation`, on the problem's own tensors."""
    shape = problem.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.dim_d,
        moe_intermediate_size=shape.dim_f,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj, experts.down_proj = problem.w1_EGD, problem.w2_EDF
    return lambda: experts(problem.x_TD, problem.ids_TK, problem.weight_TK)


def reference(problem: Problem) -> list[Tensor]:
    """Output and gradients of the plain loop in fp64, on the CPU so that the card's memory stays free."""
    leaves = [t.detach().double().requires_grad_() for t in problem.leaves]
    x, weight, w1, w2 = leaves
    out = fastexperts.moe_mlp_reference(x, problem.ids_TK, weight, w1, w2)
    grads = torch.autograd.grad(out, leaves, problem.dout_TD.double())
    return [t.cpu() for t in (out.detach(), *grads)]


def errors(problem: Problem, call: Callable[[], Tensor], expected: list[Tensor]) -> dict[str, float]:
    out = call()
    results = zip(("out", *GRADIENTS), (out, *problem.backward(out)), expected, strict=True)
    return {name: _relative(value, truth.cuda()) for name, value, truth in results}


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def measure(problem: Problem, call: Callable[[], Tensor]) -> dict[str, float]:
    """Times and memory. Kept: allocated after forward, output included; peak: over forward and backward."""

    def step() -> None:
        problem.backward(call())

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    kept = torch.cuda.memory_allocated() - before
    grads = problem.backward(out)
    peak = torch.cuda.max_memory_allocated() - before
    del out, grads
    forward_ms, step_ms = bench(call), bench(step)
    return {
        "forward_ms": forward_ms,
        "step_ms": step_ms,
        "kept_mib": kept / MIB,
        "peak_mib": peak / MIB,
    }


def bench(call: Callable[[], object]) -> float:
    """Median ms, L2 flushed between calls."""
    return triton.testing.do_bench(call, warmup=100, rep=300, return_mode="median")


def dense(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """x W1^T, h W2^T, then dy W1, do W2, dy^T x, do^T h over all P rows: cuBLAS, no routing."""
    rows, d, f = tokens * shape.top_k, shape.dim_d, shape.dim_f

    def normal(*dims: int) -> Tensor:
        return torch.randn(*dims, device="cuda", dtype=dtype)

    x, h, dy, do = normal(rows, d), normal(rows, f), normal(rows, 2 * f), normal(rows, d)
    w1, w2 = normal(2 * f, d), normal(d, f)
    forward_ms = bench(lambda: (x @ w1.T, h @ w2.T))
    backward_ms = bench(lambda: (dy @ w1, do @ w2, dy.T @ x, do.T @ h))
    return {"forward_ms": forward_ms, "step_ms": forward_ms + backward_ms}


def table(shape: Shape, tokens: int, kind: str, names: list[str]) -> Iterator[Row]:
    """Rows of one (shape, tokens, routing), dense first."""
    flops = shape.forward_flops(tokens)

    def row(name: str, values: dict[str, float], dense_ms: float | None, **rest: object) -> Row:
        tflops = {
            "forward_tflops": flops / values["forward_ms"] / 1e9,
            "step_tflops": 3 * flops / values["step_ms"] / 1e9,
        }
        share = dense_ms / values["step_ms"] if dense_ms else None
        return Row(shape.name, tokens, kind, name, **values, **tflops, share_of_dense=share, **rest)

    limit = dense(shape, tokens, torch.bfloat16)
    yield row("dense", limit, None)
    expected: list[Tensor] = []
    for name in names:
        weights_dtype = torch.float32 if name.endswith("-fp32") else torch.bfloat16
        problem = Problem.make(shape, tokens, kind, weights_dtype)
        base = name.removesuffix("-fp32")
        call = PEERS[base](problem) if base in PEERS else transformers_layer(problem, base)
        if weights_dtype == torch.float32:
            call = _autocast(call)
        else:
            expected = expected or reference(problem)
        found = errors(problem, call, expected) if weights_dtype == torch.bfloat16 else None
        yield row(name, measure(problem, call), limit["step_ms"], errors=found)
        del problem, call
        torch.cuda.empty_cache()


def _autocast(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def wrapped() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return call()

    return wrapped


def breakdown(shape: Shape, tokens: int, kind: str) -> list[dict[str, object]]:
    """Time of each step of our layer alone, with TF/s or TB/s."""
    rows = []
    for name, step in layer_passes(shape, tokens, kind).items():
        ms = bench(step.call)
        rows.append(
            {"pass": name, "ms": ms, "tflops": step.flops / ms / 1e9, "tbytes_per_s": step.bytes / ms / 1e9}
        )
    return rows


def markdown(rows: list[Row], steps: list[dict[str, object]], environment: dict[str, str]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in environment.items()), ""]
    heads = ["shape", "T", "routing", "implementation", "fwd ms", "fwd TF/s", "fwd+bwd ms", "fwd+bwd TF/s"]
    heads += ["of dense", "kept MiB", "peak MiB", "largest error"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        share = f"{r.share_of_dense:.2f}" if r.share_of_dense else "-"
        memory = [f"{m:.0f}" if m is not None else "-" for m in (r.kept_mib, r.peak_mib)]
        worst = f"{max(r.errors.values()):.1e}" if r.errors else "-"
        cells = [r.shape, r.tokens, r.routing, r.implementation]
        cells += [
            f"{r.forward_ms:.2f}",
            f"{r.forward_tflops:.0f}",
            f"{r.step_ms:.2f}",
            f"{r.step_tflops:.0f}",
        ]
        cells += [share, *memory, worst]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| step of our layer | ms | TF/s | TB/s |", "|---|---|---|---|"]
    lines += [f"| {s['pass']} | {s['ms']:.3f} | {s['tflops']:.0f} | {s['tbytes_per_s']:.2f} |" for s in steps]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    first = [
        r for r in rows if (r.shape, r.tokens, r.routing) == (rows[0].shape, rows[0].tokens, rows[0].routing)
    ]
    names = [r.implementation for r in first]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(first) + 1.5), layout="constrained")
    bars = axis.barh(names, [r.step_tflops for r in first], color=["0.7", *["tab:blue"] * (len(first) - 1)])
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("TF/s, forward + backward (higher is faster)")
    axis.set_title(f"{first[0].shape}, {first[0].tokens:,} tokens, {first[0].routing} routing, bf16")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--routing", default="balanced", help="balanced,skewed")
    parser.add_argument("--implementations", default="eager,grouped_mm,fastexperts,fastexperts-fp32")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    fastexperts.register()
    names = args.implementations.split(",") + [name for name in PEERS if name not in args.implementations]
    environment = {
        "card": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "fastexperts": fastexperts.__version__,
        "command": "python " + " ".join(sys.argv),
    }
    shapes = [SHAPES[name] for name in args.shapes.split(",")]
    tokens, kinds = [int(t) for t in args.tokens.split(",")], args.routing.split(",")
    steps = breakdown(shapes[0], tokens[0], kinds[0])
    rows: list[Row] = []
    for shape, count, kind in itertools.product(shapes, tokens, kinds):
        for row in table(shape, count, kind, names):
            print(row, flush=True)
            rows.append(row)
        if args.output:  # after each table, so that a run that is cut short leaves what it has
            write(args.output, rows, steps, environment)
    print(markdown(rows, steps, environment))


def write(output: Path, rows: list[Row], steps: list[dict[str, object]], environment: dict[str, str]) -> None:
    """The three files of a run."""
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment, "rows": [asdict(r) for r in rows], "breakdown": steps}
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(rows, steps, environment))
    plot(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
