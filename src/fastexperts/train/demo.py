"""The demo: a real, if small, training run on what is at hand, and the proof that its result is right."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from fastexperts.errors import refuse
from fastexperts.train.page import check_plotting, write_report
from fastexperts.train.proof import Check, prove
from fastexperts.train.recipe import load_recipe
from fastexperts.train.report import describe_run
from fastexperts.train.sft import TrainResult, train

STEPS = 600
PROMPTS = ("The ", "An expression ", "Return ")
LEARNT = 0.5
"""Of the first loss, at most, after all STEPS (0.26 as measured); fewer have to learn something."""

RECIPE = """\
# What `fastexperts demo` trains; `fastexperts train {name} --output NEW` trains it again.
model:
  config: tiny-qwen3-moe # 4 layers, 16 experts, 4 of them for each token; a token is a byte
data:
  files: topics.jsonl # Python's language reference, from the standard library
  max_length: 256
  packing: true # documents are isolated from each other
  eval_fraction: 0.05
training:
  steps: {steps}
  batch_size: 4
  learning_rate: 4e-3
  scheduler: cosine
  warmup: 0.05
  checkpoint: off # a small model has the memory
  logging_steps: {logging_steps}
  eval_steps: {eval_steps}
  save_steps: {steps}
output_dir: run
"""


class DemoResult(NamedTuple):
    """What the demo left: its folder, and what was verified."""

    folder: Path
    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check was met."""
        return all(check.passed for check in self.checks)


def run_demo(
    output: str | Path | None = None, *, steps: int = STEPS, console: Console | None = None
) -> DemoResult:
    """Train the demo's recipe, prove the checkpoint, sample, and write `report.html` and `report.json`.

    Raises FastexpertsError if the output folder is not new or something needed is missing.
    """
    console = console or Console()
    check_plotting()
    started = time.perf_counter()
    folder = _new_folder(output)
    recipe = load_recipe(_write_recipe(folder, steps))
    result = train(recipe, console=console)
    trained = time.perf_counter() - started

    # The trainer's model runs under its autocast; the proof is about fp32.
    model = result.trainer.accelerator.unwrap_model(result.trainer.model, keep_fp32_wrapper=False)
    tokenizer = result.trainer.processing_class
    checks = [
        _learned(result, steps),
        *prove(model, result.model_folder, _batch(folder, tokenizer, model.device)),
    ]
    samples = [_sample(model, tokenizer, prompt) for prompt in PROMPTS]

    report = describe_run(recipe, result) | {
        "checks": [check.as_json() for check in checks],
        "samples": samples,
        "seconds": {"training": trained, "all": time.perf_counter() - started},
    }
    write_report(folder, report, "fastexperts demo")
    _show(console, folder, report, checks)
    return DemoResult(folder, checks)


def _new_folder(output: str | Path | None) -> Path:
    # Local time: the user looks for the folder by the clock on the wall.
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    folder = Path(output or Path("runs") / f"demo-{stamp}").resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise refuse(
            "demo",
            "--output",
            got=f"{folder}, which is not empty",
            needs="a new or empty folder",
            way_out="Choose another one, or leave it out for runs/demo-<time>.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_recipe(folder: Path, steps: int) -> Path:
    topics = _topics()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics)
    (folder / "topics.jsonl").write_text(lines, encoding="utf-8")
    path = folder / "demo.yaml"
    path.write_text(
        RECIPE.format(
            name=path.name,
            steps=steps,
            logging_steps=max(1, steps // 60),
            eval_steps=max(1, steps // 4),
        ),
        encoding="utf-8",
    )
    return path


def _topics() -> list[str]:
    from pydoc_data import topics

    return [text for _, text in sorted(topics.topics.items())]


def _learned(result: TrainResult, steps: int) -> Check:
    first, last = result.losses[0][1], result.losses[-1][1]
    limit = LEARNT if steps >= STEPS else 0.99
    return Check("loss, end over start", last / first, limit, f"{first:.3f} -> {last:.3f}")


def _batch(folder: Path, tokenizer: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """Four stretches of the demo's text: what the proof runs on."""
    texts = [json.loads(line)["text"] for line in (folder / "topics.jsonl").read_text().splitlines()]
    ids = [tokens for text in texts if len(tokens := tokenizer(text)["input_ids"][:256]) == 256][:4]
    tokens_BS = torch.tensor(ids, device=device)
    return {"input_ids": tokens_BS, "labels": tokens_BS}


def _sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """A line of text from the trained model."""
    model.eval()
    model.config.use_cache = True
    torch.manual_seed(0)
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(**tokens, max_new_tokens=100, do_sample=True, temperature=0.6, top_p=0.9)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def _show(console: Console, folder: Path, report: dict[str, Any], checks: list[Check]) -> None:
    console.print("\nSampled from the trained model:", style="bold")
    for sample in report["samples"]:
        console.print(f"  {sample}", markup=False, highlight=False)
    table = Table(title="Verified", title_justify="left")
    for column in ("what", "measured", "at most", "", "detail"):
        table.add_column(column)
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[bold red]FAILED[/]"
        table.add_row(check.name, f"{check.measured:.3g}", f"{check.limit:.3g}", verdict, check.detail)
    console.print(table)
    seconds = report["seconds"]
    console.print(
        f"{report['parameters']:,} parameters, {report['steps']} steps on {report['device']}: "
        f"{report['performance']['perf/tokens_per_s']:,.0f} tokens/s, "
        f"{seconds['training']:.0f} s, {seconds['all']:.0f} s with the proof. In {folder}:\n"
        "  report.html (open it in a browser), report.json, run/model (the checkpoint)",
        highlight=False,
        soft_wrap=True,
    )
