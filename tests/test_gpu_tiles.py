"""Every tile of the table that this GPU can run, at the shape of a real model, by the rule of test_gpu.py."""

from dataclasses import replace

import pytest
import test_gpu_lora
import torch
from support_gpu import build, check, equal, ours, shapes
from test_gpu import expected_path

tiles = pytest.importorskip("fastexperts.kernels.tiles")
launch, ring = (pytest.importorskip(f"fastexperts.kernels.{name}") for name in ("launch", "ring"))
pytestmark = pytest.mark.gpu

OF_UPDATES = ("shrink", "dfactor")
DTYPES = {2: torch.bfloat16, 4: torch.float32}
# (architecture, bytes): what one card runs in one step; the interpreter's and fp64's are proven on the CPU
KEYS = [key for key in tiles.TABLE if key[0] != "interpreter" and key[1] in DTYPES]


def test_the_table_serves_this_gpu():
    assert {tiles._key(torch.device("cuda", 0), dtype) for dtype in DTYPES.values()} <= set(KEYS)


@pytest.fixture(params=KEYS, ids=str)
def entries(request, monkeypatch):
    """(dtype, names of the passes that ran). Older architectures' tiles run here too, on pointers."""
    arch, size = request.param
    name, *_ = arch.split()
    major = int(name[2:]) // 10 if name.startswith("sm") else 0
    if major > torch.cuda.get_device_capability()[0]:
        pytest.skip(f"needs {arch}")
    if 0 < major < 9 or arch.endswith("pointers"):
        monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    monkeypatch.setattr(ring, "_is_hopper", lambda device: False)  # the ring has test_gpu.py
    used = set()

    def lookup(device, dtype, name):
        used.add(name)
        return tiles.TABLE[arch, size][name]

    monkeypatch.setattr(tiles, "tile", lookup)
    with launch.forgotten():
        yield DTYPES[size], used


@pytest.mark.parametrize(("tokens", "kind"), [(4096, "balanced"), (1000, "skewed")])
def test_entries(tokens, kind, entries):
    dtype, used = entries
    inputs = build(shapes.SHAPES["qwen3-30b"], tokens, kind, dtype)
    check(inputs, ours(inputs), dtype)
    assert used == set(tiles.PASSES) - {*OF_UPDATES}


def test_entries_of_updates(entries):
    dtype, used = entries
    adapted = test_gpu_lora.adapt(build(shapes.SHAPES["qwen3-30b"], 1000, "skewed", dtype), 16, 16)
    test_gpu_lora.check(adapted, test_gpu_lora.ours(adapted), dtype)
    assert used == set(tiles.PASSES) - {"dw"}


def test_the_group_of_the_ring_changes_no_bit(monkeypatch):
    if expected_path(torch.bfloat16) != "ring":
        pytest.skip("the ring needs a Hopper GPU")
    inputs = build(shapes.SHAPES["qwen3-30b"], 1000, "skewed", torch.bfloat16)
    matrix_bytes, results = inputs.w2[0].nbytes, []
    for alone_mb in ((0, 1), (0, 1000)):
        for name, entry in tiles.RINGS.items():
            monkeypatch.setitem(tiles.RINGS, name, replace(entry, alone_mb=alone_mb))
        assert (tiles.RINGS["dx"].group_of(matrix_bytes) == 1) == (alone_mb[1] > 1)
        with launch.forgotten():
            results.append(ours(inputs))
    check(inputs, results[1], torch.bfloat16)
    assert equal(*results)
