"""Tables, plots and docs/benchmarks.md from benchmarks/results/*.json. Needs no GPU.

    python benchmarks/report.py

Every number it writes comes out of those files. RESULT.md and RESULT.png go beside each RESULT.json of
layer.py, RESULT.md beside those of model.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lora_report import lora_section, model_section
from model_report import curves_section, step_page, step_section, trainer_section
from plots import plot_layer, plot_shapes
from results import (
    DEFAULT,
    OURS,
    Breakdown,
    FamilyRow,
    Record,
    Row,
    breakdown_of,
    dense_of,
    rows_of,
    shares,
)
from tables import environment_line, table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
# A record has one of these keys.
KINDS = {"rows", "compile", "families", "lora", "lora_model", "model", "trainer", "curves"}

DEFINITIONS = """\
- **FLOPs**: 6 T K D F forward, 18 T K D F forward + backward: T tokens, K experts of each, D model dim, F
  expert dim. Nothing else counts: no routing, no activation, nothing recomputed.
- **dense**, the limit: the six matrix products of those FLOPs over T K rows, x W1^T, h W2^T, dy W1, do W2,
  dy^T x, do^T h, in plain cuBLAS (forward: the first two). One weight, no routing, no activation.
  *of dense* is dense's time over the implementation's, from the same minute of the same run.
- **kept**: memory allocated after forward minus before, the output included. **peak**: likewise, the most
  over forward and backward, gradients included.
- **balanced**: the top-k of seeded iid normal logits. **skewed**: Gumbel top-k with p_e proportional to
  1 / rank of the expert.
- **error**: relative Frobenius, the largest of the output's and the four gradients' (x, routing weights, w1,
  w2): against a loop over experts in fp64 it is what bf16 costs, against grouped_mm the difference of two
  bf16 results.
- **Times** are medians of at least 5 calls between CUDA events, L2 flushed before each call; all
  implementations of a problem take turns in five rounds. Nothing is captured in a graph there: what Python
  needs to launch counts. † marks a step whose launching takes as long as running it.
- **NAME-fp32**: fp32 weights and tokens under bf16 autocast. **NAME-pointers**: the path without tensor
  descriptors (FASTEXPERTS_TMA=0), as on GPUs before Hopper.
"""


def layer_table(rows: list[Row]) -> str:
    """Every row in full."""
    heads = ["shape", "T", "routing", "implementation", "fwd ms", "TF/s", "of dense", "fwd+bwd ms", "TF/s"]
    heads += ["of dense", "kept MiB", "peak MiB", "largest error", "against"]
    dense = dense_of(rows)
    lines = []
    for row in rows:
        start = [row.shape, row.tokens, row.routing, row.implementation]
        if row.skipped:
            lines.append([*start, *["-"] * 8, f"skipped: {row.skipped}", "-"])
            continue
        share = shares(row, dense.get(row.where)) if row.implementation != "dense" else None
        of_forward, of_step = (f"{value:.2f}" for value in share) if share else ("-", "-")
        forward, step = row.tflops
        times = [f"{row.forward_ms:.3f}", f"{forward:.0f}", of_forward]
        times += [f"{row.step_ms:.3f}" + ("†" if row.waits_for_host else ""), f"{step:.0f}", of_step]
        memory = ["-" if mib is None else f"{mib:.0f}" for mib in (row.kept_mib, row.peak_mib)]
        error = "-" if row.largest_error is None else f"{row.largest_error:.1e}"
        lines.append([*start, *times, *memory, error, row.errors_against or "-"])
    return table(heads, lines)


def shapes_table(rows: list[Row]) -> str:
    """A line a problem: ours beside dense and transformers' default, forward / forward + backward."""
    at = by_implementation(rows)
    heads = ["shape", "T", "routing", "dense TF/s", f"{DEFAULT} TF/s", f"{OURS} TF/s", "of dense"]
    heads += [f"faster than {DEFAULT}", f"kept MiB ({DEFAULT})", f"peak MiB ({DEFAULT})", "deviation"]
    lines = []
    for where, named in at.items():
        dense, default, ours = (named.get(name) for name in ("dense", DEFAULT, OURS))
        if ours is None or ours.skipped:
            lines.append([*where, *["-"] * 7, ours.skipped if ours else "not run"])
            continue
        has_default = default is not None and not default.skipped
        share = shares(ours, dense)
        lines.append(
            [
                *where,
                "{:.0f} / {:.0f}".format(*dense.tflops) if share else "-",
                "{:.0f} / {:.0f}".format(*default.tflops) if has_default else "-",
                "{:.0f} / {:.0f}".format(*ours.tflops) + ("†" if ours.waits_for_host else ""),
                "{:.2f} / {:.2f}".format(*share) if share else "-",
                "{:.2f} / {:.2f}".format(*shares(ours, default)) if has_default else "-",
                f"{ours.kept_mib:.0f} ({default.kept_mib:.0f})" if has_default else f"{ours.kept_mib:.0f}",
                f"{ours.peak_mib:.0f} ({default.peak_mib:.0f})" if has_default else f"{ours.peak_mib:.0f}",
                "-" if ours.largest_error is None else f"{ours.largest_error:.1e}",
            ]
        )
    return table(heads, lines)


def by_implementation(rows: Iterable[Row]) -> dict[tuple[str, int, str], dict[str, Row]]:
    """Problem -> implementation -> row, in the order of the run."""
    at: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        at.setdefault(row.where, {})[row.implementation] = row
    return at


def worst_cases(rows: list[Row]) -> str:
    """The lowest shares of dense of long batches, and the lowest speed-ups of short ones."""
    lines = []
    for kind in ("balanced", "skewed"):
        long = [row.where for row in rows if row.tokens >= 16384 and row.routing == kind]
        lines += [f"- T ≥ 16,384, {kind}, {text}." for text in _lowest(rows, long, "dense")]
    short = [row.where for row in rows if row.tokens == 1024]
    lines += [f"- T = 1,024, {text}." for text in _lowest(rows, short, DEFAULT)]
    return "".join(f"{line}\n" for line in lines)


def _lowest(rows: list[Row], problems: Iterable[tuple[str, int, str]], base: str) -> list[str]:
    """Our lowest speeds over those of `base`, forward and forward + backward, each with its problem."""
    at = by_implementation(rows)
    pairs = {where: (at[where].get(OURS), at[where].get(base)) for where in problems}
    found = {where: shares(*pair) for where, pair in pairs.items() if all(pair)}
    found = {where: share for where, share in found.items() if share}
    texts = []
    for part, name in enumerate(("forward", "forward + backward") if found else ()):
        shape, tokens, kind = min(found, key=lambda where: found[where][part])
        value = found[shape, tokens, kind][part]
        texts.append(f"{name}: at least **{value:.2f} x {base}** ({shape}, T = {tokens:,}, {kind})")
    return texts


def breakdown_tables(steps: Breakdown) -> str:
    """Passes alone, then the kernels of whole steps."""
    copy = steps.copy_bytes / steps.copy_ms / 1e9
    lines = []
    for row in steps.passes:
        floor = steps.floor_ms(row)
        speed = (
            f"{row.flops / row.ms / 1e9:.0f} TF/s" if row.flops else f"{row.bytes / row.ms / 1e9:.2f} TB/s"
        )
        bound = "dense" if row.dense_ms and floor == row.dense_ms else "bytes"
        share = f"{row.ms / steps.passes_ms:.1%}"
        lines.append(
            [row.name, f"{row.ms:.3f}", speed, f"{floor:.3f} ({bound})", f"{floor / row.ms:.2f}", share]
        )
    text = f"""\
Each pass alone at {steps.shape}, T = {steps.tokens:,}, {steps.routing}: replayed from a CUDA graph (Python's
launches do not count), L2 flushed before each replay. The floor is the time of the dense product of the same
FLOPs, or the least bytes (each operand read once, each result written once) at the {copy:.2f} TB/s of a large
copy, whichever is longer; all in one run, taking turns. It is a yardstick and no bound: reads alone are
faster than a copy. Every time includes the {1e3 * steps.timer_ms:.0f} us of a graph of one tiny kernel.

"""
    text += table(["pass", "ms", "speed", "floor, ms", "floor / time", "of the step"], lines)
    text += (
        f"\nSum {steps.passes_ms:.3f} ms; passes without a matrix product: "
        f"**{steps.share_without_products:.1%}** of it.\n"
    )
    if steps.kernels:
        text += (
            f"\nThe GPU's kernels in whole steps as the profiler saw them, caches as they come: together "
            f"{steps.kernels_ms:.3f} ms a step, those that are no grouped GEMM "
            f"**{steps.share_of_other_kernels:.1%}** of it.\n\n"
        )
        text += table(
            ["kernel", "grouped GEMM", "launches", "ms", "of all"],
            [
                [
                    f"`{short(name)}`",
                    "yes" if product else "no",
                    f"{count:g}",
                    f"{ms:.3f}",
                    f"{ms / steps.kernels_ms:.1%}",
                ]
                for name, ms, count, product in steps.kernels
            ],
        )
    return text


def short(kernel: str) -> str:
    """C++ names of templates are lines long, and a bar ends a cell."""
    return kernel.replace("|", "/").split("<", maxsplit=1)[0][:60]


def layer_page(record: Record) -> str:
    """RESULT.md"""
    steps = breakdown_of(record)
    parts = [
        environment_line(record),
        f"    {record['environment']['command']}",
        layer_table(rows_of(record)),
    ]
    return "\n\n".join(parts + ([breakdown_tables(steps)] if steps else []))


def compile_section(record: Record) -> str:
    found = record["compile"]
    seconds = table(
        [
            "Triton's cache",
            "import, s",
            "CUDA context, s",
            "first step, s",
            "second step, ms",
            "kernels built",
        ],
        [
            [
                run["cache"],
                f"{run['import_s']:.2f}",
                f"{run['context_s']:.2f}",
                f"**{run['first_step_s']:.2f}**",
                f"{1e3 * run['second_step_s']:.1f}",
                run["built"],
            ]
            for run in found["runs"]
        ],
    )
    later = table(
        ["then", "new compilations"], [[change["what"], change["new"]] for change in found["changes"]]
    )
    # results of before it was measured have none
    floor = found.get("floor")
    least = (
        f"Of a warm first step, Triton itself takes {floor['first_launch_s']:.2f} s: its import and the\n"
        "first launch of an empty kernel that is in its cache.\n\n"
        if floor
        else ""
    )
    return f"""\
{environment_line(record)}.

{found["shape"]}, forward + backward, the first step at T = {found["tokens"]:,}; each line is a process of its
own (cold: an empty TRITON_CACHE_DIR).

{seconds}
{least}After that first step, in the same process:

{later}"""


def families_section(record: Record) -> str:
    rows = [FamilyRow(**row) for row in record["families"]["rows"]]
    lines = [
        [
            row.family,
            row.tokens,
            f"{row.forward_tflops:.0f} / {row.step_tflops:.0f}",
            f"{row.plain_forward_tflops:.0f} / {row.plain_step_tflops:.0f}",
            "**{:.2f} / {:.2f}**".format(*row.shares),
        ]
        for row in rows
    ]
    heads = ["shape", "T", "as the family stores and gates, TF/s", "plain SwiGLU, TF/s", "of plain"]
    return f"""\
{environment_line(record)}.

Our layer with each family's gate, biases and layout beside our layer as SwiGLU in the canonical layout, the
same run; bf16, balanced routing, forward / forward + backward with all gradients. TF/s count each layer's own
matrix products.

{table(heads, lines)}"""


def on_card(record: Record) -> str:
    """For a title: ", NVIDIA H200", or nothing for the card of most results."""
    card = record["environment"]["card"]
    return "" if "H100" in card else f", {card}"


def page(records: dict[str, Record]) -> str:
    """docs/benchmarks.md, of the results that are there."""
    text = (
        "# Benchmarks\n\nWritten by `python benchmarks/report.py` from the files in "
        "[benchmarks/results](../benchmarks/results), which name card, versions and command: change those.\n"
    )
    for name, record in records.items():
        if "rows" not in record:
            continue
        rows, steps = rows_of(record), breakdown_of(record)
        many = len(by_implementation(rows)) > 1
        one = f"One layer of {name.removeprefix('layer-')}"
        title = f"Shapes, lengths and skew{on_card(record)}" if many else one
        text += (
            f"\n## {title}\n\n{environment_line(record)}.\n\n![{title}](../benchmarks/results/{name}.png)\n\n"
        )
        if many:
            text += (
                f"Pairs are forward / forward + backward; every row in full: "
                f"[{name}.md](../benchmarks/results/{name}.md).\n\n{worst_cases(rows)}\n{shapes_table(rows)}"
            )
        else:
            text += layer_table(rows)
        if steps:
            text += f"\n### Where its time is\n\n{breakdown_tables(steps)}"
    for record in records.values():
        if "compile" in record:
            text += f"\n## Compilation{on_card(record)}\n\n{compile_section(record)}"
    for record in records.values():
        if "families" in record:
            text += f"\n## Experts that are not plain SwiGLU\n\n{families_section(record)}"
    for record in records.values():
        if "lora" in record:
            text += f"\n## LoRA of frozen experts{on_card(record)}\n\n{lora_section(record)}"
    for record in records.values():
        if "lora_model" in record:
            many = f"{record['lora_model']['layers']} layers"
            text += f"\n## A training step of LoRA, {many}\n\n{model_section(record)}"
    text += step_sections(records)
    commands = "\n".join(dict.fromkeys(record["environment"]["command"] for record in records.values()))
    return (
        text
        + f"""
## Definitions

{DEFINITIONS}
## Commands

On the GPU, from the repository's root, with the package installed or `PYTHONPATH=src`, and
`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` for the large shapes. As run; `--output` is yours:

```
{commands}
```

Then, anywhere, `python benchmarks/report.py`. Tiles are chosen with `python benchmarks/tune.py`.

## What was tried and lost

[The log](log.md) has every approach that was measured and not kept, with its numbers and the reason.
"""
    )


def step_sections(records: dict[str, Record]) -> str:
    """Of model.py."""
    text = ""
    for name, record in records.items():
        if "model" in record:
            text += f"\n## A training step: {name.removeprefix('model-')}\n\n{step_section(name, record)}"
    for name, record in records.items():
        if "trainer" in record:
            cut = name.removeprefix("trainer-")
            text += f"\n## A training step in TRL's SFTTrainer: {cut}\n\n{trainer_section(record)}"
    for record in records.values():
        if "curves" in record:
            text += f"\n## Loss curves in bf16\n\n{curves_section(record)}"
    return text


def documents(records: dict[str, Record]) -> dict[Path, str]:
    """Path -> text of all that the report writes, but for the plots."""
    texts = {
        RESULTS / f"{name}.md": layer_page(record) for name, record in records.items() if "rows" in record
    }
    texts |= {
        RESULTS / f"{name}.md": step_page(record) for name, record in records.items() if "model" in record
    }
    return texts | {PAGE: page(records)}


def load() -> dict[str, Record]:
    """Name -> content of each file in results/, one problem first, then many, then the rest."""
    records = {
        path.name.removesuffix(".json"): json.loads(path.read_text()) for path in RESULTS.glob("*.json")
    }
    known = {name: record for name, record in records.items() if KINDS & record.keys()}

    def order(name: str) -> tuple[bool, int, str]:
        rows = known[name].get("rows", [])
        return not rows, len(rows), name

    return {name: known[name] for name in sorted(known, key=order)}


def main() -> None:
    records = load()
    for path, text in documents(records).items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    for name, record in records.items():
        if "rows" in record:
            rows = rows_of(record)
            draw = plot_shapes if len(by_implementation(rows)) > 1 else plot_layer
            draw(rows, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
