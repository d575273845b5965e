"""Every tile of the table that this GPU can run, at the shape of a real model, by the rule of test_gpu.py."""

import pytest
import torch
from test_gpu import build, check, ours, shapes

tiles = pytest.importorskip("fastexperts.kernels.tiles")
kernels = ("grouped_mm", "hopper_mm", "hopper_dw")
grouped_mm, hopper_mm, hopper_dw = (pytest.importorskip(f"fastexperts.kernels.{name}") for name in kernels)
pytestmark = pytest.mark.gpu

DTYPES = {2: torch.bfloat16, 4: torch.float32}
# (architecture, bytes): what one card runs in one step; the interpreter's and fp64's are proven on the CPU
KEYS = [key for key in tiles.TABLE if key[0] != "interpreter" and key[1] in DTYPES]


def test_the_table_serves_this_gpu():
    assert {tiles._key(torch.device("cuda", 0), dtype) for dtype in DTYPES.values()} <= set(KEYS)


@pytest.mark.parametrize(("tokens", "kind"), [(4096, "balanced"), (1000, "skewed")])
@pytest.mark.parametrize(("arch", "size"), KEYS)
def test_entries(arch, size, tokens, kind, monkeypatch):
    """Older architectures' tiles run here too, on pointers as there."""
    major = int(arch[2:]) // 10 if arch.startswith("sm") else 0
    if major > torch.cuda.get_device_capability()[0]:
        pytest.skip(f"needs {arch}")
    if 0 < major < 9:
        monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    for module in (grouped_mm, hopper_mm, hopper_dw):  # the ring has test_gpu.py
        monkeypatch.setattr(module, "available", lambda *tensors: False)
    used = set()

    def lookup(device, dtype, name):
        used.add(name)
        return tiles.TABLE[arch, size][name]

    monkeypatch.setattr(tiles, "tile", lookup)
    inputs = build(shapes.SHAPES["qwen3-30b"], tokens, kind, DTYPES[size])
    out = ours(inputs)
    assert used == tiles.TABLE[arch, size].keys()
    check(inputs, out, DTYPES[size])
