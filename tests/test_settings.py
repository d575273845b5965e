"""Environment variables are read at the time of the call, and a wrong value is an error there."""

import pytest
import torch

from fastexperts import FastexpertsError, backend, moe_mlp, settings
from fastexperts.kernels import operands

CPU = torch.device("cpu")
FLAGS = {"FASTEXPERTS_CHECK": (settings.check_ids, False), "FASTEXPERTS_TMA": (settings.allow_tma, True)}


def test_defaults(monkeypatch):
    for name in ("FASTEXPERTS_BACKEND", *FLAGS):
        monkeypatch.delenv(name, raising=False)
    assert settings.backend() == "auto"
    assert {read() for read, default in FLAGS.values() if default} == {True}
    assert {read() for read, default in FLAGS.values() if not default} == {False}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, monkeypatch):
    read, _ = FLAGS[name]
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(name, value)
        assert read() is expected
    for wrong in ("true", "", "2"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(FastexpertsError, match=f"`{name}` got '{wrong}'; it needs 0 or 1. Unset it"):
            read()


@pytest.mark.parametrize(
    ("value", "cpu", "cuda"),
    [("auto", "torch", "triton"), ("triton", "triton", "triton"), ("torch", "torch", "torch")],
)
def test_backend(value, cpu, cuda, monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.name(CPU) == cpu
    assert backend.name(torch.device("cuda")) == cuda


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "cutlass")
    with pytest.raises(FastexpertsError, match="got 'cutlass'; it needs one of auto, triton, torch"):
        settings.backend()


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(FastexpertsError, match=r"needs CUDA tensors, or TRITON_INTERPRET=1\. Unset FAST"):
        backend.name(CPU)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("builtins.__import__", _without_kernels(__import__))
    with pytest.raises(FastexpertsError, match=r"`triton` could not be imported .*Install triton"):
        backend.load(CPU)


def _without_kernels(original):
    def imports(name, globals_=None, locals_=None, fromlist=(), level=0):
        if name == "fastexperts" and "kernels" in (fromlist or ()):
            raise ImportError("No module named 'triton'")
        return original(name, globals_, locals_, fromlist, level)

    return imports


def test_descriptors_need_16_bytes(monkeypatch):
    monkeypatch.setenv("FASTEXPERTS_TMA", "1")

    def path(tensor):
        return "descriptor" if operands.operand(tensor, [16, 16]) else "pointer"

    base = torch.zeros(32, 40)
    assert path(base) == "descriptor"
    assert path(base[:, :39]) == "descriptor"
    assert path(base[:, 1:]) == "pointer"
    assert path(base[:, 4:]) == "descriptor"
    assert path(base.t()) == "pointer"
    assert path(torch.zeros(32, 39)) == "pointer"
    assert path(base[:0]) == "pointer"
    assert path(base[:1].expand(32, 40)) == "pointer"
    monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    assert path(base) == "pointer"


def test_the_call_reads_them_anew(monkeypatch):
    x, w = torch.ones(1, 2), torch.ones(1, 2, 2)
    arguments = x, torch.tensor([[7]]), torch.ones(1, 1), torch.ones(1, 4, 2), w
    assert torch.equal(moe_mlp(*arguments), torch.zeros(1, 2))
    monkeypatch.setenv("FASTEXPERTS_CHECK", "1")
    with pytest.raises(FastexpertsError, match="the id 7"):
        moe_mlp(*arguments)


ROWS_CONTRACTED = ("dw", "dfactor")


def test_the_ring_and_the_tables_of_its_cards_share_blocks():
    from fastexperts.kernels import ring, tiles

    for arch in ("sm90", "sm90 pointers"):
        table = tiles.TABLE[arch, 2]
        assert {tile.m for name, tile in table.items() if name not in ROWS_CONTRACTED} == {ring.BLOCK_M}
        assert table["dh"].n == ring.BLOCK_N
    for table in tiles.TABLE.values():
        assert len({tile.m for name, tile in table.items() if name not in ROWS_CONTRACTED}) == 1
    with pytest.raises(ValueError, match="buffers"):
        tiles.Ring(buffers=4)


def test_row_tiles_walk_alone_where_l2_holds_an_experts_matrix():
    from fastexperts.kernels.tiles import Ring

    ring = Ring(group=4, alone_mb=(10, 32))
    assert [ring.group_of(int(mb * 1e6)) for mb in (6, 9.9, 10, 31.9, 32, 235)] == [4, 4, 1, 1, 4, 4]


def test_what_the_ring_cannot_copy_goes_elsewhere(monkeypatch):
    """Fp64 gradients, rows of 8 but not 16 values, parts of h that start off 16 bytes, mixed dtypes."""
    from fastexperts.kernels import hopper_dw, ring

    monkeypatch.setattr(ring, "_is_hopper", lambda device: True)
    rows = torch.zeros(32, 64, dtype=torch.bfloat16)
    out = torch.zeros(4, 64, 64)
    assert hopper_dw.serves(rows, rows, out, gather_m=True)
    assert not hopper_dw.serves(rows, rows, out.double(), gather_m=True)
    assert not hopper_dw.serves(rows, rows.half(), out, gather_m=True)
    assert not hopper_dw.serves(torch.zeros(32, 40, dtype=torch.bfloat16), rows, out, gather_m=True)
    assert not hopper_dw.serves(torch.zeros(32, 72, dtype=torch.bfloat16)[:, :64], rows, out, gather_m=True)
    assert not hopper_dw.serves(rows.float(), rows.float(), out, gather_m=True)
    assert not ring.available(torch.zeros(8, 24, dtype=torch.bfloat16).unflatten(1, (2, 12)))
    monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    assert not hopper_dw.serves(rows, rows, out, gather_m=True)


def test_blocks_are_fitted_to_what_they_cover():
    from fastexperts.kernels import tiles

    assert tiles.fitted(512, 2048) == 512
    assert tiles.fitted(512, 768) == 256, "a third of the second block would be behind the end"
    assert tiles.fitted(512, 2816) == 512, "an eleventh"
    assert tiles.fitted(256, 48) == 64
    assert tiles.fitted(256, 5) == 16
    assert tiles.fitted(16, 4096) == 16
