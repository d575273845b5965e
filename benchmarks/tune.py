"""Developer's tool: times the passes of the layer over candidates, each checked against the table's tile.

    python benchmarks/tune.py --shapes qwen3-30b,olmoe --tokens 16384 --passes up,dh

Prints the fastest of each pass and problem, the table's choice among them: on Hopper in bf16 that is the ring
(kernels/ring.py), and the candidates are for what it does not serve. What wins goes into
src/fastexperts/kernels/tiles.py by hand. Candidates take turns, L2 flushed before each call.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from passes import Pass, layer_passes, tensors
from problems import Problem, make_experts
from shapes import SHAPES
from timing import take_turns

from fastexperts.kernels import ring, tiles
from fastexperts.kernels.launch import forgotten
from fastexperts.kernels.tiles import Tile

GRIDS = ((0, False), (1, False), (1, True))


def _grid_tiles(*blocks: tuple[int, int, int, int, int, int]) -> list[Tile]:
    return [
        Tile(m, n, k, warps=w, stages=s, subtiles=sub, programs_per_sm=p, flatten=f)
        for (m, n, k, w, s, sub), (p, f) in itertools.product(blocks, GRIDS)
    ]


CANDIDATES: dict[str, list[Tile]] = {
    "up": _grid_tiles((128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (128, 128, 64, 8, 4, 4)),
    "dh": [
        *_grid_tiles((128, 128, 64, 8, 3, 2), (128, 128, 64, 8, 4, 4), (128, 256, 64, 8, 3, 8)),
        Tile(128, 128, 64, 4, 3, programs_per_sm=0, subtiles=4),
    ],
    "down": _grid_tiles((128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (128, 256, 64, 8, 4, 2)),
    "dw": [
        Tile(128, n, 64, 8, s, programs_per_sm=p) for n, s, p in itertools.product((128, 256), (3, 4), (0, 1))
    ],
}
CANDIDATES["dx"] = CANDIDATES["down"]


@contextlib.contextmanager
def with_tile(name: str, tile: Tile | None) -> Iterator[None]:
    """Pass `name` runs with `tile` inside; None is the table's own."""
    table: Callable[..., Tile] = tiles.tile

    def lookup(*args: Any, **kwargs: Any) -> Tile:
        return tile if tile and name in (*args, *kwargs.values()) else table(*args, **kwargs)

    # with a tile of its own the pass leaves the ring, which has none of these
    ringless = mock.patch.object(ring, "_is_hopper", return_value=False) if tile else contextlib.nullcontext()
    with forgotten(), mock.patch.object(tiles, "tile", lookup), ringless:
        yield


@dataclass(frozen=True)
class Candidate:
    """A tile of a pass; None is the table's."""

    step: Pass
    tile: Tile | None

    def run(self) -> object:
        with with_tile(self.step.tile or "", self.tile):
            return self.step.call()


def deviation(results: object, expected: object) -> float:
    """The largest relative Frobenius difference of the results."""
    pairs = zip(tensors(results), tensors(expected), strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs if b.numel())


def sort_out(step: Pass) -> tuple[dict[Candidate, float], list[str]]:
    """(the candidates that run -> deviation, what the others said)"""
    ours = Candidate(step, None)
    expected = ours.run()
    running, failed = {ours: 0.0}, []
    rows = tiles.block_m(torch.device("cuda"), torch.bfloat16)
    for tile in CANDIDATES[step.tile or ""]:
        candidate = Candidate(step, tile)
        if step.tile != "dw" and tile.m != rows:
            failed.append(f"`m` is not {rows}: the schedule is the whole layer's  {tile}")
            continue
        try:
            running[candidate] = deviation(candidate.run(), expected)
            torch.cuda.synchronize()
        except (RuntimeError, triton.runtime.errors.OutOfResources, triton.CompilationError) as e:
            failed.append(f"{str(e)[:100]!r}  {tile}")
    return running, failed


def summary(step: Pass, top: int) -> str:
    """The `top` fastest tiles and the table's, fastest first."""
    running, failed = sort_out(step)
    times = take_turns({c: c.run for c in running}, warmup_ms=20, measure_ms=60)
    order = sorted(running, key=lambda candidate: times[candidate].ms)
    lines = []
    for i, candidate in enumerate(order):
        if i < top or candidate.tile is None:
            ms, wrong = times[candidate].ms, " WRONG" if running[candidate] > 0.01 else ""
            speed = f"{ms:8.3f} ms {step.flops / ms / 1e9:5.0f} TF/s"
            lines.append(
                f"{i + 1:3} {speed}  err {running[candidate]:.0e}{wrong}  {candidate.tile or 'table'}"
            )
    return "\n".join([*lines, *(f"    failed: {text}" for text in failed)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="qwen3-30b", help=f"all, or some of {','.join(SHAPES)}")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--routing", default="balanced")
    parser.add_argument("--passes", default=",".join(tiles.PASSES))
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args()
    wanted = args.passes.split(",")
    if unknown := set(wanted) - set(tiles.PASSES):
        parser.error(f"no pass {unknown}: some of {','.join(tiles.PASSES)}")
    for name in SHAPES if args.shapes == "all" else args.shapes.split(","):
        experts = make_experts(SHAPES[name], torch.bfloat16)
        for tokens, kind in itertools.product(args.tokens.split(","), args.routing.split(",")):
            problem = Problem.make(SHAPES[name], int(tokens), kind, experts)
            for step in layer_passes(problem).values():
                if step.tile in wanted:
                    print(f"{name} T {tokens} {kind}: {step.name}", flush=True)
                    print(summary(step, args.top), flush=True)


if __name__ == "__main__":
    main()
