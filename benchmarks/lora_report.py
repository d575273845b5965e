"""The report's sections of lora.py and lora_model.py."""

from __future__ import annotations

from results import OURS, LoraRow, Record, lora_rows_of
from tables import environment_line, table


def lora_table(rows: list[LoraRow]) -> str:
    """Every row in full."""
    heads = ["shape", "T", "r", "implementation", "fwd ms", "fwd+bwd ms", "TF/s", "host ms"]
    heads += ["kept MiB", "peak MiB", "largest error", "baddbmm"]
    lines = []
    for row in rows:
        start = [row.shape, row.tokens, row.rank, row.implementation]
        if row.skipped:
            lines.append([*start, *["-"] * 7, f"skipped: {row.skipped}"])
            continue
        late = "†" if row.waits_for_host else ""
        times = [f"{row.forward_ms:.3f}", f"{row.step_ms:.3f}{late}", f"{row.tflops[1]:.0f}"]
        memory = [f"{row.host_ms:.2f}", f"{row.kept_mib:.0f}", f"{row.peak_mib:.0f}"]
        lines.append([*start, *times, *memory, f"{row.largest_error:.1e}", row.baddbmm])
    return table(heads, lines)


def lora_ratios(rows: list[LoraRow]) -> str:
    """A line a problem: what our adapter costs, and what others' would."""
    at: dict[tuple[str, int, int], dict[str, LoraRow]] = {}
    for row in rows:
        at.setdefault((row.shape, row.tokens, row.rank), {})[row.implementation] = row
    heads = ["shape", "T", "r", "of frozen", "faster than split", "faster than peft", "kept, of split's"]
    lines = []
    for where, named in at.items():
        ours = named.get(OURS)
        if ours is None or ours.skipped:
            continue
        others = [named.get(name) for name in ("frozen", "split", "peft")]
        frozen, split, peft = (None if row is None or row.skipped else row for row in others)
        lines.append(
            [
                *where,
                f"**{ours.step_ms / frozen.step_ms:.3f} x**" if frozen else "-",
                f"{split.step_ms / ours.step_ms:.2f} x" if split else "-",
                f"{peft.step_ms / ours.step_ms:.2f} x" if peft else "-",
                f"{ours.kept_mib / split.kept_mib:.3f}" if split else "-",
            ]
        )
    return table(heads, lines)


def lora_section(record: Record) -> str:
    rows = lora_rows_of(record)
    return f"""\
{environment_line(record)}.

One layer of frozen experts, LoRA of both projections through `peft.get_peft_model`, routing
{rows[0].routing}: forward + backward to x, the routing weights and the factors (PEFT keeps these in fp32;
those of *split* are in bf16). *frozen*: our layer without its adapter. *peft*: its fold W' = W + s B A under
transformers' grouped_mm. *split*: two more grouped GEMMs a projection, by torch._grouped_mm. TF/s count the
frozen layer, 12 T K D F, the update nothing. Errors against a loop over experts in fp64, the output and every
gradient. baddbmm: folds of a weight in one step.

{lora_ratios(rows)}
{lora_table(rows)}"""


def model_section(record: Record) -> str:
    found = record["lora_model"]
    rows = [
        [
            row["implementation"],
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['peak_gib']:.1f}",
        ]
        for row in found["rows"]
    ]
    what = (
        "forward, backward and fused AdamW on the factors" if found["optimizer"] else "forward and backward"
    )
    loss = (
        f"in chunks of {found['loss_chunk']:,} tokens" if found["loss_chunk"] else "by the model's `labels`"
    )
    text = f"""\
{environment_line(record)}.

Qwen3-30B-A3B's geometry with {found["layers"]} of 48 layers, random bf16 weights, LoRA r = {found["rank"]} on
attention and experts: {what}, batch {found["batch"]} x {found["length"]:,},
gradient checkpointing, sdpa, {loss}. Trainable: {found["trainable"]:,} of {found["parameters"]:,} parameters.

MFU: of 989 TF/s, counting {found["flops_per_token"] / 1e9:.3f} GFLOP a token: 4 FLOPs a parameter that it
passes (embedding left out; frozen weights have no gradients), causal attention twice its forward; neither the
update nor what checkpointing recomputes.

"""
    return text + table(["experts", "step ms", "tokens/s", "MFU", "peak GiB"], rows)
