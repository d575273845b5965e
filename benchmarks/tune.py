"""Developer's tool: times every pass of the layer over tile candidates, checks each against the reference
tile.

    python benchmarks/tune.py --shape qwen3-30b --tokens 16384 --passes up,dh

Prints one line per candidate (ms, TF/s, largest deviation from the table's tile); what wins goes into
src/fastexperts/kernels/tiles.py by hand.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import triton
from passes import layer_passes
from shapes import SHAPES

from fastexperts.kernels import tiles
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--routing", default="balanced")
    parser.add_argument("--passes", default=",".join(tiles.PASSES))
    args = parser.parse_args()
    passes = layer_passes(SHAPES[args.shape], args.tokens, args.routing)
    device = torch.device("cuda")
    key = tiles._key(device, torch.bfloat16)
    for name in args.passes.split(","):
        base = tiles.TABLE[key][name]
        for op_name, step in passes.items():
            if op_name.removesuffix("1").removesuffix("2") != name:
                continue
            expected = step.call()
            for tile in [base, *CANDIDATES[name]]:
                tiles.TABLE[key][name] = tile
                try:
                    out = step.call()
                    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
                    ms = triton.testing.do_bench(step.call, warmup=50, rep=100, return_mode="median")
                    speed = f"{ms:7.3f} ms {step.flops / ms / 1e9:6.0f} TF/s"
                    print(f"{op_name:5} {speed}  err {error:.1e}  {tile}", flush=True)
                except (RuntimeError, triton.runtime.errors.OutOfResources) as e:
                    print(f"{op_name:5} failed: {str(e)[:150]!r}  {tile}", flush=True)
            tiles.TABLE[key][name] = base


if __name__ == "__main__":
    main()
