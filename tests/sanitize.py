"""Twenty small layer calls in one process, for compute-sanitizer; exit status 1 on a wrong result.

    python tests/sanitize.py    # compiles, so that the tools below find it done
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/sanitize.py --pointers

racecheck sees what waits at bar.sync, and no mbarrier: of the ring's kernels it reports Triton's dispatch of
warps and the hand-over of claims (98 of them on an H100). So it gets the kernels without a ring.

Each tensor is an allocation of its own here, so that memcheck sees an access one element outside. References
run on the CPU: what the tools watch is ours. Cases share dims and top_k where they can, since each new pair
compiles anew.
"""

from __future__ import annotations

import os
import sys
import traceback

if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read by torch when it first allocates

import torch
from support import Case, assert_close, build, run_moe_mlp, run_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIMS = (128, 256)  # several column blocks of small tiles, whole steps of K
RAGGED = (144, 80)  # descriptors, with dims that no tile divides
ODD = (97, 47)  # nothing is aligned: pointers
CASES = (
    Case(tokens=256, experts=8, dims=DIMS, dtype=BF16),
    Case(tokens=256, experts=8, dims=DIMS, dtype=BF16, routing="zipf"),
    Case(tokens=1, experts=8, dims=DIMS, dtype=BF16),
    Case(tokens=129, experts=8, dims=DIMS, dtype=BF16, routing="one empty"),
    Case(tokens=200, experts=8, dims=DIMS, dtype=BF16, routing="one expert"),
    Case(tokens=130, experts=8, dims=DIMS, dtype=BF16, routing="last only"),
    Case(tokens=100, experts=8, dims=DIMS, dtype=BF16, routing="sentinels"),
    Case(tokens=40, experts=8, dims=DIMS, dtype=BF16, routing="all sentinels"),
    Case(tokens=77, experts=8, dims=DIMS, dtype=BF16, routing="duplicates", frozen="experts"),
    Case(tokens=64, experts=64, dims=DIMS, dtype=BF16, frozen="all but w1"),
    Case(tokens=256, experts=8, dims=DIMS, dtype=BF16, routing="zipf", tma=False),
    Case(tokens=33, experts=8, dims=DIMS, dtype=BF16, routing="sentinels", tma=False),
    Case(133, 7, 2, RAGGED, layout="transposed and interleaved", activation="gpt_oss", dtype=BF16, bias=True),
    Case(tokens=133, experts=7, dims=RAGGED, dtype=BF16, routing="zipf", tma=False),
    Case(tokens=133, experts=7, dims=RAGGED, dtype=BF16, routing="sentinels", layout="strided x"),
    Case(tokens=133, experts=7, dims=RAGGED, dtype=BF16, activation="relu2"),
    Case(tokens=65, experts=5, dims=ODD, dtype=BF16, routing="zipf"),
    Case(tokens=133, experts=7, dims=RAGGED, dtype=FP16, routing="one empty", bias=True),
    Case(tokens=65, experts=7, dims=RAGGED, dtype=FP32, routing="sentinels"),
    Case(tokens=65, experts=5, dims=ODD, dtype=FP32, activation="relu2"),
)


def check(case: Case, device: str, pointers: bool = False) -> None:
    """Our layer on `device` by the error rule against the loop on the CPU: output and gradients. pointers: in
    the place of descriptors.
    """
    os.environ["FASTEXPERTS_TMA"] = str(int(case.tma and not pointers))
    inputs = build(case)
    out = {name: tensor.cpu() for name, tensor in run_moe_mlp(case, inputs.to(device)).items()}
    eager, ref = run_reference(case, inputs), run_reference(case, inputs.double())
    assert out.keys() == ref.keys()
    for name, value in out.items():
        assert_close(value, eager[name], ref[name], case.dtype, name)


def main(device: str = "cuda", pointers: bool = False) -> int:
    """The exit status."""
    wrong = 0
    for i, case in enumerate(CASES, start=1):
        try:
            check(case, device, pointers)
        except Exception:  # noqa: BLE001 - whatever one case dies of, the others run and the status tells
            wrong += 1
            traceback.print_exc()
        print(f"{i:2} {case}", flush=True)
    print(f"{len(CASES) - wrong} of {len(CASES)} right", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(pointers="--pointers" in sys.argv))
