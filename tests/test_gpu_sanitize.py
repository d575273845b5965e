"""compute-sanitizer on the cases of sanitize.py; the cases themselves without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize
import torch

SCRIPT = Path(sanitize.__file__)


@pytest.fixture
def settings(monkeypatch):
    """Put back what `check` sets."""
    monkeypatch.setenv("FASTEXPERTS_TMA", "1")


@pytest.mark.parametrize("case", sanitize.CASES, ids=str)
def test_cases(case, settings):
    if torch.cuda.is_available():
        pytest.skip("runs on the GPU below")
    sanitize.check(case, "cpu")


def test_twenty_small_and_varied():
    assert len(set(sanitize.CASES)) == 20
    assert all(case.tokens <= 256 and max(case.dims) <= 256 for case in sanitize.CASES)
    assert {case.dtype for case in sanitize.CASES} == {torch.bfloat16, torch.float16, torch.float32}
    assert {case.act.parts for case in sanitize.CASES} == {1, 2}
    assert {case.tma for case in sanitize.CASES} == {case.bias for case in sanitize.CASES} == {True, False}
    needed = {"zipf", "one expert", "one empty", "sentinels", "all sentinels"}
    assert needed <= {case.routing for case in sanitize.CASES}
    assert min(case.tokens for case in sanitize.CASES) == 1


def test_a_wrong_result_ends_in_status_1(monkeypatch, settings):
    right = sanitize.run_moe_mlp
    monkeypatch.setattr(sanitize, "CASES", sanitize.CASES[:2])
    assert sanitize.main("cpu") == 0
    monkeypatch.setattr(
        sanitize, "run_moe_mlp", lambda *args: {name: 1.02 * t for name, t in right(*args).items()}
    )
    assert sanitize.main("cpu") == 1


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("tool", "options"), [("memcheck", []), ("racecheck", ["--pointers"])])
def test_compute_sanitizer(tool, options):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, and it is not on the path")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SCRIPT), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert "20 of 20 right" in result.stdout
