"""Run by test_offline.py without the interpreter: compile every pass for one architecture, print what came.

    python compile_offline.py ARCH DTYPE WEIGHT_DTYPE PATH ACTIVATION RANK [stored]

PATH: pointers, descriptors, or ring (the kernels for Hopper). RANK: of updates of both projections, whose
gradients then replace those of the weights; 0 for none. stored: experts as gpt_oss stores them.

One JSON object a line: kernel, spilled bytes, registers, shared memory, counts of instructions in the PTX.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from offline import offline

from fastexperts import ACTIVATIONS, kernels
from fastexperts.weights import Step

TOKENS, TOP_K, EXPERTS, DIM_D, DIM_F = 64, 8, 8, 2048, 768
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "cp.async.bulk.tensor", "cp.async.cg")


def launch_every_pass(
    dtype: torch.dtype, weights: torch.dtype, name: str, block_m: int, stored: bool
) -> None:
    """One forward and backward with all gradients; zeros, since nothing runs. stored: as gpt_oss stores its
    experts, gate and up in turn, transposed, with biases.
    """
    act = ACTIVATIONS[name]
    if stored:
        act = replace(act, interleaved=name == "gpt_oss")
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int64)
    routing = kernels.route(ids, EXPERTS, block_m)
    x = torch.zeros(TOKENS, DIM_D, dtype=dtype)
    weight = torch.zeros(TOKENS, TOP_K)
    w1 = torch.zeros(EXPERTS, act.parts * DIM_F, DIM_D, dtype=dtype)
    w2 = torch.zeros(EXPERTS, DIM_D, DIM_F, dtype=dtype)
    bias1 = bias2 = None
    if stored:
        w1, w2 = (torch.empty_like(w.mT, memory_format=torch.contiguous_format).mT for w in (w1, w2))
        bias1, bias2 = w1[:, :, 0].contiguous(), w2[:, :, 0].contiguous()
    h, a = kernels.up(x, w1, bias1, routing, act, True)
    y = kernels.down(a, w2, bias2, routing)
    kernels.combine(y, weight, routing, dtype)
    plus = None if bias2 is None else weight
    dh, wa, _ = kernels.dh(x, w2, h, weight, routing, act, (True, True, True), plus_TK=plus)
    kernels.combine(kernels.dx(dh, w1, routing), None, routing, dtype)
    kernels.dw(dh, x, routing, w1.to(weights), tokens="right")
    kernels.dw(x, wa, routing, w2.to(weights), tokens="left")
    if stored:
        kernels.db(dh, None, routing, bias1)
        kernels.db(x, weight, routing, bias2)


def launch_every_pass_with_updates(dtype: torch.dtype, name: str, block_m: int, rank: int) -> None:
    """As moe.forward and moe.backward with frozen experts and updates of both projections."""
    act = ACTIVATIONS[name]
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int64)
    routing = kernels.route(ids, EXPERTS, block_m)

    def zeros(*dims: int) -> torch.Tensor:
        return torch.zeros(*dims, dtype=dtype)

    x, weight, rows = zeros(TOKENS, DIM_D), torch.zeros(TOKENS, TOP_K), zeros(TOKENS * TOP_K, rank)
    w1, w2 = zeros(EXPERTS, act.parts * DIM_F, DIM_D), zeros(EXPERTS, DIM_D, DIM_F)
    a1, b1 = zeros(EXPERTS, rank, DIM_D), zeros(EXPERTS, act.parts * DIM_F, rank)
    a2, b2 = zeros(EXPERTS, rank, DIM_F), zeros(EXPERTS, DIM_D, rank)
    xa = kernels.shrink(x, a1, routing, tokens=True)
    h, a = kernels.up(x, w1, None, routing, act, True, Step(xa, b1))
    y = kernels.down(a, w2, None, routing, Step(kernels.shrink(a, a2, routing, tokens=False), b2))
    kernels.combine(y, weight, routing, dtype)
    stored1, stored2 = (b.float().permute(1, 2, 0).contiguous().permute(2, 0, 1) for b in (b1, b2))
    like2 = stored2.mT  # as PEFT stores it
    rows = kernels.weigh(rows, weight, routing)
    db, _ = kernels.shrink_dfactor(x, b2.mT, rows, routing, like2, tokens=True)
    dh, wa, _ = kernels.dh(x, w2, h, weight, routing, act, (True, True, True), Step(db, a2))
    kernels.dfactor(wa, db, routing, a2.float(), False, 2.0)
    dxa, _ = kernels.shrink_dfactor(dh, b1.mT, xa, routing, stored1.mT, tokens=False)
    kernels.combine(kernels.dx(dh, w1, routing, Step(dxa, a1)), None, routing, dtype)
    kernels.dfactor(x, dxa, routing, a1.float(), True, 2.0)
    kernels.pack(a1.float(), stored1, 2.0, rank, dtype)


def verdict(kernel: object, arch: int, ptxas: str) -> dict[str, int]:
    """Of `ptxas -v`, with no optimisation left out."""
    ptx = kernel.asm["ptx"]
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    text = result.stdout + result.stderr
    found = {
        "spilled": max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)),
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "shared": kernel.metadata.shared,
    }
    return found | {instruction: ptx.count(instruction) for instruction in INSTRUCTIONS}


def main() -> None:
    arch, dtype, weights, path, activation, rank, *stored = sys.argv[1:]
    os.environ["FASTEXPERTS_TMA"] = "0" if path == "pointers" else "1"
    ptxas = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    with offline(int(arch), path == "ring") as compiled:
        from fastexperts.kernels import tiles

        dtype = getattr(torch, dtype)
        block_m = tiles.block_m(torch.device("cpu"), dtype)
        if int(rank):
            launch_every_pass_with_updates(dtype, activation, block_m, int(rank))
        else:
            launch_every_pass(dtype, getattr(torch, weights), activation, block_m, bool(stored))
    for name, kernel in compiled:
        print(json.dumps({"kernel": name, **verdict(kernel, int(arch), ptxas)}))


if __name__ == "__main__":
    main()
