"""The fast subset kills every seeded fault, and the tool that says so can say otherwise."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import mutants
import pytest


def test_every_fault_is_one_place_in_the_source():
    for mutant in mutants.MUTANTS:
        text = (mutants.ROOT / "src/fastexperts" / mutant.file).read_text()
        assert text.count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old
        assert "\n" not in mutant.old.rstrip("\n")
    assert len(mutants.MUTANTS) == len({mutant.name for mutant in mutants.MUTANTS}) >= 14


# Gluon has no interpreter: tests/test_gpu.py runs these on a Hopper GPU
HOPPER = {f"kernels/{name}.py" for name in ("ring", "hopper_mm", "hopper_epilogues", "hopper_dw")}


def test_every_kernel_has_one():
    files = Counter(mutant.file for mutant in mutants.MUTANTS)
    kernels = {f"kernels/{path.name}" for path in (mutants.ROOT / "src/fastexperts/kernels").glob("*.py")}
    assert kernels - {"kernels/__init__.py", "kernels/operands.py", "kernels/tiles.py", *HOPPER} <= set(files)


def test_what_is_no_fault_survives_and_what_is_not_there_is_an_error():
    comment = mutants.Mutant("a comment", "weights.py", "`Weight`: one", "`Weight`: an")
    assert mutants.attempt(comment)[0] == "SURVIVED"
    missing = mutants.Mutant("a text that is not there", "weights.py", "no such text", "")
    assert mutants.attempt(missing) == ("ERROR", "the text is there 0 times")
    broken = mutants.Mutant("a syntax error", "weights.py", "class Weight:", "class Weight(:")
    assert mutants.attempt(broken)[0] == "ERROR"


@pytest.mark.slow
def test_every_mutant_is_killed():
    script = Path(__file__).parent / "mutants.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    count = len(mutants.MUTANTS)
    assert f"{count} of {count} mutants killed" in result.stdout
