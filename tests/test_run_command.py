"""`fastexperts run` around a process: how the command is started, reached and ended, and what is reported."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from recipes import WORDS
from support_hf import tiny_model
from test_cli import run_cli

from fastexperts.errors import FastexpertsError
from fastexperts.run.launcher import run
from fastexperts.run.report import SENTENCES, Finding, draw, read, write
from fastexperts.train.tokenizer import byte_tokenizer

PYTHON = sys.executable
NOTHING_REACHED = "no Python process that keeps PYTHONPATH"


def launched(*command):
    """(exit code, report) of a command under the launcher."""
    said = []
    return run([str(word) for word in command], say=said.append), *said


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package on the path that is named transformers and takes no time to import."""
    package = tmp_path / "fake" / "transformers"
    package.mkdir(parents=True)
    for name in ("__init__", "modeling_utils", "trainer_callback"):
        (package / f"{name}.py").write_text("ready = True\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package.parent


def test_the_exit_code_is_the_command_s():
    code, report = launched(PYTHON, "-c", "raise SystemExit(3)")
    assert code == 3
    assert report.startswith(f"fastexperts run: `{PYTHON} -c` ended with exit code 3.\n")


def test_a_command_ended_by_a_signal_ends_as_in_a_shell():
    code, report = launched(PYTHON, "-c", "import os; os.kill(os.getpid(), 9)")
    assert code == 128 + 9
    assert "was ended by SIGKILL" in report


def test_signals_reach_the_command():
    child = """
    import os, signal
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    signal.alarm(30)
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
    """
    before = signal.getsignal(signal.SIGTERM)
    code, _ = launched(PYTHON, "-c", textwrap.dedent(child))
    assert code == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, _ = launched(PYTHON, "-c", "import os; os.kill(os.getpid(), 1); os.kill(os.getppid(), 1)")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0


@pytest.mark.parametrize("command", [[], ["no-such-trainer", "train"]])
def test_no_such_command(command):
    with pytest.raises(
        FastexpertsError, match=r"run: `command` got .+ as in a shell: fastexperts run -- trl"
    ):
        run(command)


def test_a_script_without_its_interpreter(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    with pytest.raises(FastexpertsError, match=r"-- python .+train\.py"):
        run([str(script)])


@pytest.mark.parametrize("separator", [["--"], []])
def test_the_command_line_passes_everything_on(monkeypatch, capfd, separator):
    show = "import sys; print(sys.argv[1:]); sys.exit(5)"
    code, out, err = run_cli(monkeypatch, capfd, "run", *separator, PYTHON, "-c", show, "--help", "--", "-x")
    assert code == 5
    assert out == "['--help', '--', '-x']\n", "and nothing else: the report goes to stderr"
    assert "ended with exit code 5" in err


def test_the_command_line_of_no_command(monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, "run", "--", "no-such-trainer", "--x")
    assert code == 2
    assert "`command` got 'no-such-trainer'" in err


def test_a_process_that_never_imports_transformers():
    code, report = launched(PYTHON, "-c", "pass")
    assert code == 0
    assert NOTHING_REACHED in report


def test_modules_that_are_not_hooked_cost_nothing(fake):
    heavy = (
        "import sys, transformers; assert not {'torch', 'fastexperts', 'json'} & {*sys.modules} - {'json'}"
    )
    code, report = launched(PYTHON, "-c", heavy)
    assert code == 0
    assert NOTHING_REACHED in report


def test_a_python_without_fastexperts(fake):
    without = "import sys; sys.modules['fastexperts'] = None; import transformers.modeling_utils as m; "
    code, report = launched(PYTHON, "-c", without + "assert m.ready and m.__spec__.origin")
    assert code == 0
    assert f"not switched in {PYTHON}: No module named 'fastexperts" in report


@pytest.mark.parametrize("kept", [True, False])
def test_the_sitecustomize_that_was_there_still_runs(tmp_path, monkeypatch, fake, kept):
    (fake / "sitecustomize.py").write_text("import builtins\nbuiltins.was_there = __file__\n")
    check = "import sitecustomize; print(was_there, sitecustomize.__file__); assert 'fake' in was_there"
    if not kept:
        (fake / "sitecustomize.py").unlink()
        check = "assert not hasattr(__builtins__, 'was_there')"
    assert launched(PYTHON, "-c", check)[0] == 0


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    launched(PYTHON, "-c", "pass")
    assert list(tmp_path.iterdir()) == []


SWITCHED = Finding("switched", "Foo", "FooExperts", 4, "swiglu")


def test_a_report_counts_models_and_processes(tmp_path):
    trained = Finding("trained", "Foo", layers=4)
    found = {"1": [SWITCHED, SWITCHED, trained], "2": [SWITCHED, SWITCHED, trained]}
    assert draw("title", found).splitlines() == [
        "title",
        "  Foo: 4 layers of FooExperts on fastexperts (swiglu) [4 times in 2 processes]",
        "  Foo: training began with 4 experts layers on fastexperts [2 times in 2 processes]",
    ]
    assert "No transformers Trainer" not in draw("title", found)
    assert "No transformers Trainer trained it: perf/* is not logged" in draw("title", {"1": [SWITCHED]})
    assert "loaded no mixture-of-experts model" in draw("title", {"1": []})
    assert NOTHING_REACHED in draw("title", {})


def test_findings_are_read_as_they_were_written(tmp_path):
    findings = [Finding(state, "Foo", "FooExperts", 2, "because\nof this") for state in SENTENCES]
    write(tmp_path, None)
    for finding in findings:
        write(tmp_path, finding)
    (path,) = tmp_path.iterdir()
    with path.open("a") as file:
        file.write('{"state": "swi')  # its process was killed
    assert read(tmp_path) == {str(os.getpid()): findings}
    write(tmp_path / "gone", SWITCHED)  # a process that outlives the launcher


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and a dataset for each trainer."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = byte_tokenizer()
    special = {key: getattr(tokenizer, key) for key in ("eos_token_id", "pad_token_id", "bos_token_id")}
    model = tiny_model(
        "qwen3_moe", "eager", vocab_size=len(tokenizer), max_position_embeddings=256, **special
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw_words = random.Random(0)

    def words(count):
        return " ".join(draw_words.choices(WORDS, k=count))

    rows = {
        "sft": lambda: {"text": words(8)},
        "dpo": lambda: {"prompt": words(3), "chosen": words(5), "rejected": words(4)},
        "grpo": lambda: {"prompt": [{"role": "user", "content": words(3)}]},
    }
    for name, row in rows.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(json.dumps(row()) for _ in range(8)))
    return folder


def completed(command, **environment):
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **environment}
    done = subprocess.run(
        command, env=os.environ | quiet, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


FASTEXPERTS = [PYTHON, "-c", "from fastexperts.cli import main; main()"]
ADAPTERS = "--use_peft --lora_r 2 --lora_dropout 0 --lora_target_parameters"
ADAPTERS += " mlp.experts.gate_up_proj mlp.experts.down_proj"
COMPLETIONS = "--num_generations 2 --max_completion_length 8 --reward_funcs think_format_reward"
TRAINERS = {
    # name: (command, dataset, arguments, models that it loads, whether its losses are compared)
    "sft": ([str(Path(PYTHON).with_name("trl")), "sft"], "sft", "--max_length 64", 1, True),
    "lora": ([PYTHON, "-m", "trl.scripts.sft"], "sft", f"--max_length 64 {ADAPTERS}", 1, True),
    "dpo": ([PYTHON, "-m", "trl.scripts.dpo"], "dpo", "--max_length 64", 2, True),
    "grpo": ([PYTHON, "-m", "trl.scripts.grpo"], "grpo", COMPLETIONS, 1, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_trl(material, tmp_path, name):
    command, dataset, options, models, compared = TRAINERS[name]

    def train(prefix, output):
        arguments = (
            f"--model_name_or_path {material}/model --dataset_name {material}/{dataset} --output_dir {output}"
        )
        arguments += " --max_steps 2 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2"
        arguments += f" --report_to none --use_cpu --bf16 false {options}"
        said = completed([*prefix, *command, *arguments.split()], HF_DATASETS_CACHE=str(tmp_path / "cache"))
        state = json.loads((output / "checkpoint-2/trainer_state.json").read_text())
        return said, [entry for entry in state["log_history"] if "loss" in entry]

    said, logs = train([*FASTEXPERTS, "run", "--"], tmp_path / "ours")
    report = said[said.index("fastexperts run: `") :]
    times = f" [{models} times]" if models > 1 else ""
    assert f"Qwen3MoeForCausalLM: 2 layers of Qwen3MoeExperts on fastexperts (swiglu){times}\n" in report
    assert "Qwen3MoeForCausalLM: training began with 2 experts layers on fastexperts\n" in report
    assert f"perf/tokens_per_s {logs[-1]['perf/tokens_per_s']:.4g} in the Trainer's last log" in report
    assert "conflict" not in report
    assert len(logs) == 2
    assert all(entry["perf/tokens_per_s"] > 0 for entry in logs)
    if compared:
        _, wanted = train([], tmp_path / "theirs")
        assert [e["loss"] for e in logs] == pytest.approx([e["loss"] for e in wanted], rel=1e-5)
        assert [e["grad_norm"] for e in logs] == pytest.approx([e["grad_norm"] for e in wanted], rel=1e-4)
        assert not any("perf/tokens_per_s" in entry for entry in wanted)


SCRIPT = """#!{python}
# What axolotl, llamafactory-cli and scripts with Unsloth have in common: a console script whose child process
# loads by an auto class and trains by transformers' Trainer, or a class made of it.
import subprocess, sys
from types import MethodType

if sys.argv[1] == "train":
    sys.exit(subprocess.run([sys.executable, __file__, "child", *sys.argv[2:]]).returncode)

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations.moe import batched_mm_experts_forward

model = AutoModelForCausalLM.from_pretrained(sys.argv[2])

def their_own_kernel(self, *args):
    return batched_mm_experts_forward(self, *args)

if "patched" in sys.argv:
    for layer in model.model.layers:
        layer.mlp.experts.forward = MethodType(their_own_kernel, layer.mlp.experts)

class TheirTrainer(Trainer):
    pass

ids = torch.arange(8)
arguments = TrainingArguments(sys.argv[3], max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
TheirTrainer(model, arguments, train_dataset=[dict(input_ids=ids, labels=ids)] * 4).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_any_console_script(material, tmp_path, patched):
    script = tmp_path / "their-trainer"
    script.write_text(SCRIPT.format(python=PYTHON))
    script.chmod(0o755)
    command = [str(script), "train", f"{material}/model", str(tmp_path), *(["patched"] if patched else [])]
    said = completed([*FASTEXPERTS, "run", *command])
    report = said[said.index("fastexperts run: `") :]
    assert "Qwen3MoeForCausalLM: 2 layers of Qwen3MoeExperts on fastexperts (swiglu)\n" in report
    conflict = "Qwen3MoeForCausalLM: conflict, 2 layers of Qwen3MoeExperts were switched, then bypassed: "
    assert (conflict in report) == (conflict in said[: said.index(report)]) == patched, (
        "at once and at the end"
    )
    assert f"training began with {0 if patched else 2} experts layers" in report
    assert ("their_own_kernel, which does not ask transformers" in report) == patched
