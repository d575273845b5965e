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
from shapes import SHAPES, routing

from fastexperts import ops
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
    calls = passes(args.shape, args.tokens, args.routing)
    device = torch.device("cuda")
    key = tiles._key(device, torch.bfloat16)
    for name in args.passes.split(","):
        base = tiles.TABLE[key][name]
        for op_name, (flops, call) in calls.items():
            if not op_name.startswith(name):
                continue
            expected = call()
            for tile in [base, *CANDIDATES[name]]:
                tiles.TABLE[key][name] = tile
                try:
                    out = call()
                    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
                    ms = triton.testing.do_bench(call, warmup=50, rep=100, return_mode="median")
                    print(
                        f"{op_name:5} {ms:7.3f} ms {flops / ms / 1e9:6.0f} TF/s  err {error:.1e}  {tile}",
                        flush=True,
                    )
                except (RuntimeError, triton.runtime.errors.OutOfResources) as e:
                    print(f"{op_name:5} failed: {str(e)[:150]!r}  {tile}", flush=True)
            tiles.TABLE[key][name] = base


def passes(shape_name: str, tokens: int, kind: str):
    """name -> (FLOPs, call) of each GEMM pass on random operands of the right scale."""
    shape, dev = SHAPES[shape_name], "cuda"
    d, f, e, k = shape.dim_d, shape.dim_f, shape.experts, shape.top_k
    ids_TK, weight_TK = routing(shape, tokens, kind, dev)
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, d, device=dev, dtype=torch.bfloat16)
    w1 = torch.randn(e, 2, f, d, device=dev, dtype=torch.bfloat16) / d**0.5
    w2 = torch.randn(e, d, f, device=dev, dtype=torch.bfloat16) / f**0.5
    row, pair, offsets, schedule = ops.route(ids_TK, e, tiles.block_m(torch.device(dev), torch.bfloat16))
    act = ("silu", [1.0, float("inf"), 0.0])
    h, a = ops.up(x_TD, w1, pair, offsets, schedule, k, *act, True)
    x_PD = ops.gather(x_TD, pair, k)
    dh, wa, _ = ops.dh(x_PD, w2, h, weight_TK, row, pair, offsets, schedule, *act, True, True, True)
    base = 2 * tokens * k * d * f
    return {
        "up": (2 * base, lambda: ops.up(x_TD, w1, pair, offsets, schedule, k, *act, True)[0]),
        "down": (base, lambda: ops.down(a, w2, offsets, schedule)),
        "dh": (
            base,
            lambda: ops.dh(x_PD, w2, h, weight_TK, row, pair, offsets, schedule, *act, True, True, True)[0],
        ),
        "dx": (2 * base, lambda: ops.dx(dh, w1, offsets, schedule)),
        "dw1": (2 * base, lambda: ops.dw1(dh, x_PD, offsets, w1)),
        "dw2": (base, lambda: ops.dw2(x_PD, wa, offsets, w2)),
    }


if __name__ == "__main__":
    main()
