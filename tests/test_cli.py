"""The console script: thin, quick to ask for help, and quiet but for one bar and its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import settings, write_recipe

import fastexperts
from fastexperts import cli


def run_cli(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of the console script, in this process."""
    monkeypatch.setattr(sys, "argv", ["fastexperts", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capsys.readouterr()
    return stopped.value.code or 0, output.out, output.err


def test_version(monkeypatch, capsys):
    assert run_cli(monkeypatch, capsys, "--version") == (0, f"fastexperts {fastexperts.__version__}\n", "")


def test_help_needs_no_library_of_training(tmp_path):
    check = "import sys; from fastexperts import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    check += "print([m for m in ('transformers', 'trl', 'pydantic') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", check, "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "[]"
    assert "train" in done.stdout
    assert "demo" in done.stdout


@pytest.mark.parametrize("arguments", ["train", "trian", "train x.yaml --steps 0", "demo --stepz"])
def test_wrong_use_exits_2(monkeypatch, capsys, arguments):
    code, _, message = run_cli(monkeypatch, capsys, *arguments.split())
    assert code == 2
    assert "Traceback" not in message


def test_train_then_resume(tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path, settings(tmp_path, steps=4, save_steps=2))
    code, out, err = run_cli(monkeypatch, capsys, "train", path)
    assert (code, err) == (0, ""), err
    assert "step 4/4" in out
    assert "(step 4) after 4 steps" in out
    assert "examples/s" not in out + err

    code, _, err = run_cli(monkeypatch, capsys, "train", path)
    assert (code, "not empty" in err) == (2, True)

    (tmp_path / "run/checkpoint-4/trainer_state.json").unlink()
    code, out, err = run_cli(monkeypatch, capsys, "train", path, "--resume")
    assert (code, err) == (0, ""), err
    assert "step 3/4" in out
    assert "step 2/4" not in out
    assert "moved to incomplete-checkpoint-4-1" in out

    reports = {name: (tmp_path / "run" / name).read_bytes() for name in ("report.json", "report.html")}
    code, out, err = run_cli(monkeypatch, capsys, "train", path, "--resume")
    assert (code, err) == (0, ""), err
    assert "the report of the run that was finished already" in out
    assert {name: (tmp_path / "run" / name).read_bytes() for name in reports} == reports


def test_output_and_steps_replace_the_recipe_s(tmp_path, monkeypatch, capsys):
    path = write_recipe(tmp_path, settings(tmp_path, steps=None, epochs=3.0, logging_steps=2))
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(monkeypatch, capsys, "train", path, "--steps", 3, "--output", "elsewhere")
    assert code == 0, err
    assert "step 2/3" in out
    assert "(step 2) after 3 steps" in out, "the last step is not always one that is logged"
    assert (tmp_path / "elsewhere" / "model" / "config.json").is_file()
    assert not (tmp_path / "run").exists()


# Accelerate starts several processes on CPUs through MPI alone; torchrun needs nothing.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        ("accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no", 1),
        ("torch.distributed.run --standalone --nproc-per-node 2", 2),
    ],
)
def test_under_a_launcher(tmp_path, launcher, processes):
    path = write_recipe(tmp_path, settings(tmp_path, steps=2))
    script = str(Path(sys.executable).parent / "fastexperts")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *launcher.split(), script, "train", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after 2 steps") == 1
    state = json.loads((tmp_path / "run/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert len(list((tmp_path / "run/checkpoint-2").glob("rng_state*.pth"))) == processes
