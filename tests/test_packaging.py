"""The wheel that users get: built and installed once; importing it needs torch and nothing else."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a distribution and its module differ in name.
MODULE_OF = {"pyyaml": "yaml", "liger-kernel": "liger_kernel"}


def optional_modules():
    """The modules of every optional dependency that the library itself uses."""
    requirements = [r for extra in ("train", "peft", "plot") for r in PROJECT["optional-dependencies"][extra]]
    names = [re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements]
    return sorted({MODULE_OF.get(name, name) for name in names} | {"triton"})


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd="/",  # not the checkout, whose files would be found first
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the build backend is in the dev extra, so that no network is needed.
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel installed in it and nothing else."""
    target = tmp_path_factory.mktemp("site")
    installed = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return target


def test_wheel_is_pure_python_and_complete(wheel):
    assert re.fullmatch(r"fastexperts-[\w.]+-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    assert modules
    assert modules | {"fastexperts/py.typed"} <= shipped
    assert {name for name in shipped if not name.startswith("fastexperts/")} == set()
    assert {name for name in shipped if name.endswith((".so", ".pyd", ".pyc"))} == set()


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(archive.read(name).decode())
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "peft", "plot", "dev"} <= set(metadata.get_all("Provides-Extra"))
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert [re.match(r"\w+", requirement)[0] for requirement in core] == ["torch"]


def test_command_is_installed(site):
    run = python(str(site / "bin" / "fastexperts"), "--help", PYTHONPATH=str(site))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "demo" in run.stdout
    assert "train" in run.stdout


IMPORT = """
import sys, time

blocked = set(sys.argv[2:])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{name} is blocked for this test")

if sys.argv[1] == "absent":
    sys.meta_path.insert(0, Blocker())
import torch
before = set(sys.modules)
start = time.perf_counter()
import fastexperts
print(fastexperts.__file__)
print(time.perf_counter() - start)
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & blocked))
"""


@pytest.mark.parametrize("optional", ["absent", "present"])
def test_import_needs_torch_alone_and_is_quick(site, optional):
    run = python("-c", IMPORT, optional, *optional_modules(), PYTHONPATH=str(site), CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr
    file, seconds, loaded = run.stdout.splitlines()
    assert file.startswith(str(site))
    assert float(seconds) < 2
    assert loaded == "[]", "importing fastexperts loads an optional dependency"
