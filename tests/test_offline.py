"""The compiler's verdict without a GPU: every tile compiles for its architecture, uses it, spills nothing."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason=f"needs Triton's ptxas, and {PTXAS} is absent")

# shared memory of one block: A100 163 KB, H100 227 KB
SHARED = {80: 163 * 1024, 90: 227 * 1024}
GEMMS = {"_grouped_mm": 4, "_grouped_dw": 2}
RING = {"_hopper_mm": 4, "_hopper_dw": 2}
# of four products with few columns, two come with the gradient of a factor
ONE_READING = {"_grouped_mm": 2, "_dfactor": 4, "_sum_partial": 2}
TWO_READINGS = {"_grouped_mm": 4, "_dfactor": 4}
OF_UPDATES = {"_weigh": 1, "_pack": 1, "_copy_scaled": 2}
OTHERS = {"_count": 1, "_scan": 1, "_place": 1, "_combine": 2, "_sum_dweight": 1}


def compiled(
    arch: int,
    dtype="bfloat16",
    weights=None,
    path="descriptors",
    activation="swiglu",
    spills: float = 64,
    rank: int = 0,
    stored: bool = False,
) -> list[dict]:
    """One entry per GEMM of a forward and backward, from a process without the interpreter. rank: of updates
    of frozen experts; stored: as gpt_oss stores them.
    """
    script = Path(__file__).parent / "compile_offline.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), str(arch), dtype, weights or dtype, path, activation, str(rank)]
    command += ["stored"] * stored
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    names = [kernel["kernel"] for kernel in kernels]
    if rank:
        once = rank <= {"float64": 0, "float32": 16}.get(dtype, 32 if arch == 90 else 16)
        narrow = ONE_READING if once else TWO_READINGS
        wide = {"_hopper_mm": 4} if path == "ring" else {"_grouped_mm": 4 + narrow["_grouped_mm"]}
        products = narrow | wide | OF_UPDATES
    else:
        products = RING if path == "ring" else GEMMS | {"_gather": 2}  # the ring gathers by itself
    if stored:
        products |= {"_sum_rows": 2}
    assert {name: names.count(name) for name in names} == OTHERS | products
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["spilled"] < spills, kernel
    return [kernel for kernel in kernels if kernel["kernel"] in GEMMS | RING | TWO_READINGS]


@pytest.mark.parametrize("path", ["ring", "descriptors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hopper_uses_its_units(dtype, path):
    for kernel in compiled(90, dtype, path=path):
        assert kernel["wgmma.mma_async"] > 0, kernel
        assert kernel["mma.sync"] == 0, kernel
        assert kernel["cp.async.bulk.tensor"] > 0, kernel


def test_hopper_without_tensor_descriptors():
    for kernel in compiled(90, path="pointers"):
        assert kernel["wgmma.mma_async"] > 0, kernel
        assert kernel["cp.async.bulk.tensor"] == 0, kernel


def test_hopper_with_fp32_gradients_of_bf16_products():
    """What autocast over fp32 weights asks of dw: blocks of twice the bytes to store."""
    assert len(compiled(90, weights="float32")) == 6
    assert len(compiled(90, weights="float32", path="ring")) == 6


@pytest.mark.parametrize(("path", "rank"), [("ring", 16), ("pointers", 128)])
def test_hopper_with_updates_of_frozen_experts(path, rank):
    """One more step of each product's contraction; the ring takes all four."""
    # Triton 3.6, of the oldest PyTorch that we serve, spills 76 bytes of a thread in `dh` with pointers
    spills = 80 if path == "pointers" and triton.__version__.startswith("3.6.") else 64
    kernels = compiled(90, path=path, rank=rank, spills=spills)
    assert len(kernels) == (10 if rank == 16 else 12)
    assert all(kernel["wgmma.mma_async"] > 0 for kernel in kernels if kernel["kernel"] != "_grouped_mm")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("path", ["ring", "descriptors", "pointers"])
@pytest.mark.parametrize("rank", [16, 32, 48, 128])
def test_hopper_with_updates_of_any_rank(rank, path, dtype):
    assert len(compiled(90, dtype, path=path, rank=rank)) == (10 if rank <= 32 else 12)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 32, 128])
def test_ampere_with_updates_of_any_rank(rank):
    assert len(compiled(80, path="pointers", rank=rank)) == (10 if rank == 16 else 12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [16, 32, 128])
def test_updates_of_wide_dtypes(rank, dtype):
    assert compiled(90, dtype, path="pointers", rank=rank, spills=math.inf)


def test_ampere():
    for kernel in compiled(80):
        assert kernel["mma.sync"] > 0, kernel
        assert kernel["wgmma.mma_async"] == kernel["cp.async.bulk.tensor"] == 0, kernel


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("activation", ["gpt_oss", "geglu", "geglu_tanh", "relu2"])
def test_every_kind_of_gate(arch, activation):
    # erf and its derivative take the registers that SwiGLU leaves free
    assert len(compiled(arch, activation=activation, spills=128)) == 6
    if arch == 90:
        # dh holds v, h and three results at once: 80 bytes for geglu_tanh, 192 for gpt_oss with its clamps
        assert len(compiled(arch, activation=activation, spills=200, path="ring")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_experts_as_gpt_oss_stores_them(arch):
    """Transposed, gate and up in turn, biases: no pass of theirs leaves the tensor cores."""
    # dh splits h, which it reads two bytes at a time: 336 bytes on sm_90
    kernels = compiled(arch, activation="gpt_oss", spills=400, stored=True)
    assert all(kernel["wgmma.mma_async" if arch == 90 else "mma.sync"] > 0 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_fp32_is_never_tf32(arch):
    for kernel in compiled(arch, "float32", spills=math.inf):
        assert kernel["wgmma.mma_async"] == kernel["mma.sync"] == 0, kernel
