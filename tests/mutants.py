"""Seeds one-line faults, one at a time, in a copy of src; the named fast tests must fail on each of them.

    python tests/mutants.py [WORD]      only the mutants whose name holds WORD

Exit status 1 if a mutant survives, 2 if the unchanged code fails or a fault's text is not there exactly once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUBSET = "tests/test_mutant_killers.py"
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    # routing: count, scan, place, and each index map
    Mutant(
        "route: the last pair is not counted",
        "kernels/routing.py",
        "mask=o_p < num_pairs, other=-1)",
        "mask=o_p < num_pairs - 1, other=-1)",
    ),
    Mutant(
        "route: the scan includes its own block",
        "kernels/routing.py",
        "total + tl.cumsum(count, 0) - count",
        "total + tl.cumsum(count, 0)",
    ),
    Mutant(
        "route: ties in reverse",
        "kernels/routing.py",
        "(o_p[None, :] < o_p[:, None])",
        "(o_p[None, :] > o_p[:, None]) & (o_p[None, :] < num_pairs)",
    ),
    Mutant(
        "row_of_pair: a sentinel gets a row",
        "kernels/routing.py",
        "o_p, tl.where(valid, row, -1), mask",
        "o_p, row, mask",
    ),
    Mutant(
        "pair_of_row: counted from the block",
        "kernels/routing.py",
        "row, tl.where(valid, o_p, -1), mask",
        "row, tl.where(valid, o_p - i_b * BLOCK, -1), mask",
    ),
    Mutant(
        "offsets: one expert late", "kernels/routing.py", "o_e + 1, end, mask", "o_e + 1, end - total, mask"
    ),
    Mutant(
        "schedule: tiles one row short apart",
        "kernels/routing.py",
        "(i_t - first_tile) * BLOCK_M",
        "(i_t - first_tile) * (BLOCK_M - 1)",
    ),
    # the row-tiled GEMM
    Mutant(
        "mm: an expert's last row is left out",
        "kernels/grouped_mm.py",
        "m_m = o_m < tl.load(p_tile + 2)",
        "m_m = o_m < tl.load(p_tile + 2) - 1",
    ),
    Mutant(
        "mm: the last, partial K step is dropped",
        "kernels/grouped_mm.py",
        "for k0 in range(0, K, BK):",
        "for k0 in range(0, K // BK * BK, BK):",
    ),
    Mutant(
        "mm: wrong expert for the last tile",
        "kernels/grouped_mm.py",
        "p_tile = p_schedule + 3 + 3 * i_m",
        "p_tile = p_schedule + 3 + 3 * tl.minimum(i_m, num_m - 2)",
    ),
    Mutant(
        "mm: W is not masked behind K",
        "kernels/grouped_mm.py",
        "(o_n < N)[None, :] & (o_k < K)[:, None]",
        "(o_n < N)[None, :] & (o_k >= 0)[:, None]",
    ),
    Mutant(
        "up: the token of another pair",
        "kernels/grouped_mm.py",
        "other=0) // TOP_K",
        "other=0) // TOP_K // 2 * 2",
    ),
    Mutant("up: gate and up swapped", "kernels/grouped_mm.py", "g, u = halves(acc)", "u, g = halves(acc)"),
    Mutant(
        "mm: the bias of the first expert",
        "kernels/grouped_mm.py",
        "p_bias + i_e * (PARTS * SPREAD * N)",
        "p_bias + i_e * 0",
    ),
    Mutant(
        "up: up's bias is gate's",
        "kernels/grouped_mm.py",
        "o_c // (SPREAD * BN) * N + o_n",
        "o_n",
    ),
    Mutant(
        "up: gate and up in turn swapped",
        "kernels/grouped_mm.py",
        "g, u = acc.reshape(BM, BN, 2).split()",
        "u, g = acc.reshape(BM, BN, 2).split()",
    ),
    Mutant(
        "dh: the weight of another pair",
        "kernels/grouped_mm.py",
        "p_weight + pair, mask",
        "p_weight + o_m, mask",
    ),
    Mutant(
        "dweight: column blocks overwrite each other",
        "kernels/grouped_mm.py",
        "p_dweight + i_n.to(tl.int64) * num_rows + o_m",
        "p_dweight + o_m",
    ),
    # epilogues
    Mutant(
        "y: one percent too large",
        "kernels/epilogues.py",
        "acc.to(p_out.dtype.element_ty)",
        "(acc * 1.01).to(p_out.dtype.element_ty)",
    ),
    Mutant(
        "y: the right slice lies on the left",
        "kernels/epilogues.py",
        "store_plain(right, p_out, n0 + BN // 2, N",
        "store_plain(right, p_out, n0, N",
    ),
    Mutant(
        "dh: no routing weight",
        "kernels/epilogues.py",
        "act_vjp(g, u, v * weight[:, None], ACT",
        "act_vjp(g, u, v, ACT",
    ),
    Mutant(
        "dw2: no routing weight", "kernels/epilogues.py", "(act * weight[:, None]).to(dtype)", "act.to(dtype)"
    ),
    Mutant(
        "dweight: the gate for the activation",
        "kernels/epilogues.py",
        "tl.where(m_out, v * act, 0.0)",
        "tl.where(m_out, v * g, 0.0)",
    ),
    # the activation
    Mutant(
        "silu: a wrong sign in the derivative",
        "kernels/activation.py",
        "s + ACT.alpha * f * (1 - s)",
        "s - ACT.alpha * f * (1 - s)",
    ),
    Mutant(
        "clamp: the gradient passes beyond it",
        "kernels/activation.py",
        "pass_g = tl.where(g <= ACT.limit, da, 0.0)",
        "pass_g = da",
    ),
    Mutant(
        "dh: gradients of gate and up swapped",
        "kernels/activation.py",
        "pass_g * u * df, pass_u * f",
        "pass_u * f, pass_g * u * df",
    ),
    # the ragged contraction
    Mutant(
        "dw: rows of the next expert",
        "kernels/grouped_dw.py",
        "x = tl.where(o_r[:, None] < end, x, tl.zeros_like(x))",
        "x = x",
    ),
    Mutant(
        "dw: an expert's first row is left out",
        "kernels/grouped_dw.py",
        "start = tl.load(p_offsets + i_e)\n",
        "start = tl.load(p_offsets + i_e) + 1\n",
    ),
    Mutant(
        "dw: the last rows come from the first columns (descriptor)",
        "kernels/grouped_dw.py",
        "_load_rows(A, full_end, end, m0,",
        "_load_rows(A, full_end, end, m0 * 0,",
    ),
    Mutant(
        "dw: the first columns' rows for all",
        "kernels/grouped_dw.py",
        "A, row0, end, m0, c_m",
        "A, row0, end, m0 * 0, c_m",
    ),
    # the further step of an update
    Mutant(
        "update: gate's rows of b for up too",
        "kernels/grouped_mm.py",
        "(o_c // BN * N if PARTS > 1 else 0)",
        "(o_c * 0 if PARTS > 1 else 0)",
    ),
    Mutant(
        "update: always the first expert's",
        "kernels/grouped_mm.py",
        "p_v = V + i_e.to(tl.int64) * (PARTS * SPREAD * N * R)",
        "p_v = V + i_e.to(tl.int64) * 0",
    ),
    Mutant("update: the scale is lost", "updates.py", "pack(a, b, scale,", "pack(a, b, 1.0,"),
    Mutant(
        "update: what the padding held before",
        "kernels/copy_scaled.py",
        "(o_x < in_dim_x) & (o_y < in_dim_y)",
        "(o_x < out_dim_x) & (o_y < out_dim_y)",
    ),
    # launches
    Mutant(
        "plan: the strides are not part of it",
        "kernels/launch.py",
        "return dims, tensor.stride(), tensor.dtype",
        "return dims, tensor.dtype",
    ),
    # rows and tokens
    Mutant(
        "combine: the last choice is skipped",
        "kernels/combine.py",
        "        out += y\n",
        "        out += y * (k < TOP_K - 1)\n",
    ),
    Mutant(
        "combine: the first choice's weight for all",
        "kernels/combine.py",
        "p_weight + i_t * TOP_K + k",
        "p_weight + i_t * TOP_K",
    ),
    Mutant(
        "gather: a token's first row alone",
        "kernels/combine.py",
        "x, mask=m_d & (row >= 0)",
        "x, mask=m_d & (row == 0)",
    ),
    Mutant(
        "cap: up is not bounded",
        "kernels/activation.py",
        "u, slope = _capped(u, ACT.up_cap, FAST)",
        "_, slope = _capped(u, ACT.up_cap, FAST)",
    ),
    Mutant(
        "weigh: the weight of another pair",
        "kernels/combine.py",
        "tl.load(p_weight + pair, mask=pair >= 0, other=0.0)",
        "tl.load(p_weight + o_p, mask=pair >= 0, other=0.0)",
    ),
    Mutant(
        "dfactor: the token of another row",
        "kernels/low_rank.py",
        "source = tl.load(p_pair_of_row + row, mask=m_k, other=0) // TOP_K",
        "source = row // TOP_K",
    ),
    Mutant(
        "dfactor: a row of the next expert",
        "kernels/low_rank.py",
        "m_k = row < end",
        "m_k = row < end + 1",
    ),
    Mutant(
        "dfactor: the first block of columns is not added",
        "kernels/low_rank.py",
        "tl.range(0, BLOCKS, loop",
        "tl.range(1, BLOCKS, loop",
    ),
    Mutant(
        "dfactor: a column less than the rank",
        "kernels/low_rank.py",
        "(o_r < RANK)[None, :]",
        "(o_r < RANK - 1)[None, :]",
    ),
    Mutant(
        "dfactor: without the scale",
        "kernels/low_rank.py",
        "(acc * SCALE)",
        "(acc * 1.0)",
    ),
    Mutant(
        "db: the last rows are left out",
        "kernels/sum_rows.py",
        "end = tl.load(p_offsets + i_e + 1)",
        "end = tl.load(p_offsets + i_e + 1) - 1",
    ),
    Mutant(
        "db: no routing weight",
        "kernels/sum_rows.py",
        "value *= tl.load(p_weight + pair, mask=m_r, other=0.0).to(ACC)[:, None]",
        "value *= 1.0",
    ),
    Mutant(
        "dweight: without the down bias",
        "kernels/combine.py",
        "total += tl.load(p_plus + o_p, mask=m_p, other=0.0)",
        "total += 0.0",
    ),
    Mutant(
        "dweight: the bias of the next expert",
        "moe.py",
        "expert_TK.clamp(max=len(bias_ED) - 1)",
        "(expert_TK + 1).clamp(max=len(bias_ED) - 1)",
    ),
    Mutant(
        "dweight: the last column block is left out",
        "kernels/combine.py",
        "range(num_blocks)",
        "range(num_blocks - 1)",
    ),
    # the other backend and the host
    Mutant("cpu: sentinels add a row", "cpu.py", "y_TD.where(row_T[:, None] >= 0, 0)", "y_TD"),
    Mutant(
        "cpu: no routing weight in dh",
        "cpu.py",
        "activation.vjp(h_PG.to(wide), weight_P1 * v_PF)",
        "activation.vjp(h_PG.to(wide), v_PF)",
    ),
    Mutant(
        "activation: alternating columns are ignored",
        "activations.py",
        "return h_PG[..., ::2], h_PG[..., 1::2]",
        "return h_PG.chunk(2, dim=-1)",
    ),
)


def run_subset(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",  # pytest cuts its reasons to the terminal's width
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", SUBSET]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def copy_source(to: Path) -> Path:
    return Path(shutil.copytree(ROOT / "src", to, ignore=shutil.ignore_patterns("__pycache__")))


def attempt(mutant: Mutant) -> tuple[str, str]:
    """("killed" | "SURVIVED" | "ERROR", what pytest said)."""
    with tempfile.TemporaryDirectory() as folder:
        path = copy_source(Path(folder) / "src") / "fastexperts" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return "ERROR", f"the text is there {text.count(mutant.old)} times"
        path.write_text(text.replace(mutant.old, mutant.new))
        result = run_subset(path.parents[len(Path(mutant.file).parts)])
    # 1 is a failed test; a collection error (2), a crash or an empty selection is no kill
    verdict = {0: "SURVIVED", 1: "killed"}.get(result.returncode, "ERROR")
    failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    reason = failures[0].partition(" - ")[2] if failures else f"exit status {result.returncode}"
    return verdict, reason


def main() -> int:
    word = "".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        unchanged = run_subset(copy_source(Path(folder) / "src"))
    if unchanged.returncode:
        print(
            unchanged.stdout[-3000:],
            unchanged.stderr[-2000:],
            f"The unchanged code fails {SUBSET}.",
            sep="\n",
        )
        return 2
    print(f"unchanged: passes in {time.monotonic() - start:.0f} s")
    with ThreadPoolExecutor(WORKERS) as pool:
        verdicts = []
        for mutant, (verdict, reason) in zip(chosen, pool.map(attempt, chosen), strict=True):
            print(f"{verdict:<8}  {mutant.file:<22}  {mutant.name:<46}  {reason[:70]}", flush=True)
            verdicts.append(verdict)
    killed = verdicts.count("killed")
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s")
    if "ERROR" in verdicts:
        return 2
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
