"""benchmarks/: FLOPs, bytes, shares, reports; and layer.py from end to end on a card of fakes."""

import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from support import ROOT
from test_offline import GEMMS, OTHERS, RING

sys.path.insert(0, str(ROOT / "benchmarks"))

import layer
import passes
import peers
import problems
import report
import results
import shapes
import special
import timing

TINY = shapes.Shape("tiny", 64, 32, 8, 2)
WHERE = ("qwen3-30b", 16384, "balanced")
DENSE = results.Row(*WHERE, "dense", forward_ms=1.5, step_ms=5.0)
OURS = results.Row(
    *WHERE, "fastexperts", forward_ms=2.0, step_ms=6.25, host_ms=1.0, kept_mib=450, peak_mib=2500
)
DEFAULT = results.Row(*WHERE, "grouped_mm", forward_ms=8.0, step_ms=25.0, kept_mib=1860, peak_mib=5400)
STEPS = results.Breakdown(
    *WHERE,
    copy_ms=1.0,
    copy_bytes=3_000_000_000,
    timer_ms=0.002,
    passes=[
        results.PassRow("route", 0.1, 0, 3_000_000),
        results.PassRow("up", 1.4, 10**12, 3_000_000, dense_ms=1.25),
        results.PassRow("dh", 0.5, 10**11, 1_200_000_000, dense_ms=0.2),
    ],
    kernels=[("_grouped_mm", 1.9, 2.0, True), ("_combine<a|b>", 0.1, 2.0, False)],
)
ENVIRONMENT = {"card": "a card", "torch": "2.11", "command": "python benchmarks/layer.py --tokens 16384"}


def problem(dtype=torch.float32, tokens=40):
    return problems.Problem.make(TINY, tokens, "skewed", problems.make_experts(TINY, dtype, "cpu"))


def record(*rows, steps=None):
    return {
        "environment": ENVIRONMENT,
        "rows": [asdict(row) for row in rows],
        "breakdown": asdict(steps) if steps else None,
    }


def test_speeds_and_shares():
    flops = 6 * 16384 * 8 * 2048 * 768
    assert OURS.tflops == pytest.approx((flops / 2e9, 3 * flops / 6.25e9))
    assert results.shares(OURS, DENSE) == pytest.approx((0.75, 0.8))
    assert results.shares(OURS, None) is None
    assert results.shares(replace(OURS, skipped="out of memory"), DENSE) is None


def test_a_step_that_waits_for_its_launches():
    assert not OURS.waits_for_host
    assert replace(OURS, host_ms=6.0).waits_for_host


def test_floors():
    route, up, dh = STEPS.passes
    assert STEPS.floor_ms(route) == pytest.approx(0.001)
    assert STEPS.floor_ms(up) == 1.25
    assert STEPS.floor_ms(dh) == pytest.approx(0.4)
    assert STEPS.share_without_products == pytest.approx(0.05)
    assert STEPS.share_of_other_kernels == pytest.approx(0.05)


def test_passes_count_what_a_step_does():
    found = passes.layer_passes(problem())
    rows, d, f, e, size = 80, 64, 32, 8, 4
    assert sum(step.flops for step in found.values()) == 18 * rows * d * f
    assert {name for name, step in found.items() if step.flops} == problems.dense_products(
        TINY, 1, "cpu"
    ).keys()
    assert [step.tile for step in found.values() if step.flops] == ["up", "down", "dh", "dw", "dx", "dw"]
    weights, integers = size * e * d * f, 3 * 4 * rows + 4 * (e + 1) + 8 * 20
    lower = {
        "up": size * (40 * d + 3 * rows * f) + 2 * weights,
        "down": size * (rows * f + rows * d) + weights,
        "dh": size * 5 * rows * f + weights,
        "dw2": size * rows * f + weights,
        "dx": size * 2 * rows * f + 2 * weights,
        "dw1": size * 2 * rows * f + 2 * weights,
        "combine": size * (rows * d + 40 * d),
    }
    # tokens of dout and x are read as tokens or as gathered rows
    gathered = {"dh": rows * d, "dw2": rows * d, "dx": rows * d, "dw1": rows * d}
    for name, least in lower.items():
        assert least <= found[name].bytes <= least + size * gathered.get(name, 0) + integers + 4 * rows, name


def test_kernels_that_are_products_are_known_by_name():
    assert {name for name in GEMMS | RING | OTHERS if passes.is_product(name)} == set(GEMMS | RING)


def test_names_of_implementations_are_exact():
    parse = problems.Implementation.parse
    assert parse("fastexperts-fp32-pointers") == problems.Implementation(
        "fastexperts", fp32=True, pointers=True
    )
    for name in ("fast", "fastexperts-fp16", "grouped", ""):
        with pytest.raises(SystemExit, match=f"no implementation {name!r}"):
            parse(name)
    assert set(peers.versions()) == set(peers.PEERS)


def test_pointers_last_as_long_as_the_call(monkeypatch):
    bound = problems.Implementation("fastexperts", pointers=True).bind(problem())
    seen = []
    bound = replace(bound, call=lambda: seen.append(os.environ["FASTEXPERTS_TMA"]))
    monkeypatch.setenv("FASTEXPERTS_TMA", "1")
    bound.forward()
    assert os.environ["FASTEXPERTS_TMA"] == "1"
    monkeypatch.delenv("FASTEXPERTS_TMA")
    bound.forward()
    assert "FASTEXPERTS_TMA" not in os.environ
    assert seen == ["0", "0"]


def test_deviations_are_relative_frobenius():
    truth = tuple(torch.randn(7, n) for n in (3, 1, 2, 5, 4))
    found = problems.deviations(tuple(1.25 * t for t in truth), truth)
    assert list(found) == ["out", "x", "weight", "w1", "w2"]
    assert list(found.values()) == pytest.approx([0.25] * 5)


def test_the_loop_and_the_layer_agree():
    layer_problem = problem()
    ours = problems.Implementation("fastexperts").bind(layer_problem)
    # without transformers' interface: the function itself
    x, weight, w1, w2 = layer_problem.leaves
    ours = replace(ours, call=lambda: problems.fastexperts.moe_mlp(x, layer_problem.ids_TK, weight, w1, w2))
    assert max(problems.deviations(ours.step(), problems.loop_fp64(layer_problem)).values()) < 1e-5


@pytest.mark.parametrize(
    ("estimate", "expected"), [(0.0, (100, 40)), (1.0, (60, 30)), (40.0, (2, 1)), (300.0, (1, 1))]
)
def test_plan(estimate, expected):
    assert timing.plan(estimate, warmup_ms=60, measure_ms=150) == expected


def test_turns_are_everybody_s_and_follow_each_other_in_no_fixed_order():
    names = ["a", "b", "c", "d"]
    orders = timing.turns(names)
    assert [sorted(order) for order in orders] == [names] * timing.ROUNDS
    assert len({tuple(order) for order in orders}) == timing.ROUNDS
    for name in names:
        before = {order[order.index(name) - 1] for order in orders if order[0] != name}
        assert len(before) >= 2
    assert orders == timing.turns(names)


def test_results_round_trip(tmp_path):
    output = str(tmp_path / "layer-v1.2")
    results.write_layer(output, [DENSE, OURS], STEPS, ENVIRONMENT)
    found = json.loads((tmp_path / "layer-v1.2.json").read_text())
    assert results.rows_of(found) == [DENSE, OURS]
    assert results.breakdown_of(found) == STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["layer-v1.2.json"]


def test_tables_of_a_layer():
    text = report.layer_page(record(DENSE, replace(OURS, errors={"out": 1e-3, "x": 3e-3}), steps=STEPS))
    assert "| fastexperts | 2.000 | 618 | 0.75 | 6.250 | 594 | 0.80 | 450 | 2500 | 3.0e-03 |" in text
    assert "| up | 1.400 | 714 TF/s | 1.250 (dense) | 0.89 | 70.0% |" in text
    assert "| dh | 0.500 | 200 TF/s | 0.400 (bytes) | 0.80 | 25.0% |" in text
    assert "| `_combine` | no | 2 | 0.100 | 5.0% |" in text


def test_tables_of_shapes():
    at = {"shape": "olmoe", "tokens": 1024}
    short = [replace(row, **at) for row in (DENSE, replace(OURS, step_ms=20.0), DEFAULT)]
    left = replace(OURS, shape="mixtral", skipped="CUDA out of memory", forward_ms=None, step_ms=None)
    rows = [DENSE, OURS, DEFAULT, *short, left]
    assert report.worst_cases(rows).splitlines() == [
        f"- {text}, balanced)."
        for text in (
            "T ≥ 16,384, balanced, forward: at least **0.75 x dense** (qwen3-30b, T = 16,384",
            "T ≥ 16,384, balanced, forward + backward: at least **0.80 x dense** (qwen3-30b, T = 16,384",
            "T = 1,024, forward: at least **4.00 x grouped_mm** (olmoe, T = 1,024",
            "T = 1,024, forward + backward: at least **1.25 x grouped_mm** (olmoe, T = 1,024",
        )
    ]
    text = report.page({"layer-shapes": record(*rows)})
    assert "| 0.75 / 0.80 | 4.00 / 4.00 | 450 (1860) | 2500 (5400) | - |" in text
    assert "| mixtral | 16384 | balanced | - | - | - | - | - | - | - | CUDA out of memory |" in text
    assert ENVIRONMENT["command"] in text


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot_layer([DENSE, OURS, DEFAULT], tmp_path / "layer.png")
    report.plot_shapes(
        [DENSE, OURS, replace(DENSE, shape="olmoe"), replace(OURS, shape="olmoe")], tmp_path / "s.png"
    )
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "layer.png", tmp_path / "s.png"))


def test_what_is_committed_is_what_the_report_writes():
    """Else: python benchmarks/report.py"""
    for path, text in report.documents(report.load()).items():
        assert path.read_text(encoding="utf-8") == text, path


class FakeEvent:
    def __init__(self, **_):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_card(monkeypatch):
    """What layer.py asks of CUDA, answered for CPU tensors."""

    def on_cpu(function):
        def made(*args, device=None, **kwargs):
            return function(*args, device="cpu" if device == "cuda" else device, **kwargs)

        return made

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch, "empty", on_cpu(torch.empty))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(layer, "COPY", 1024)
    monkeypatch.setattr(layer, "graphed", lambda call: call)
    monkeypatch.setattr(layer, "kernels", lambda call: call() and {"_grouped_mm": (1.0, 4.0)})
    for name in ("make_experts", "dense_products"):
        monkeypatch.setattr(layer, name, functools.partial(getattr(problems, name), device="cpu"))
    monkeypatch.setattr(layer, "take_turns", functools.partial(timing.take_turns, warmup_ms=0.1))
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    real = layer.breakdown

    def breakdown(on):
        with monkeypatch.context() as zeros:
            zeros.setattr(torch, "zeros", on_cpu(torch.zeros))
            return real(on)

    monkeypatch.setattr(layer, "breakdown", breakdown)


def test_layer_from_arguments_to_page(fake_card, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    output = tmp_path / "layer.tiny"
    names = "eager,grouped_mm,fastexperts,fastexperts-fp32,fastexperts-pointers"
    command = f"layer.py --shapes tiny --tokens 40 --routing balanced,skewed --implementations {names}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(output)])
    layer.main()
    found = json.loads((tmp_path / "layer.tiny.json").read_text())
    rows = results.rows_of(found)
    assert [row.implementation for row in rows] == 2 * ["dense", *names.split(",")]
    assert all(
        max(row.errors.values()) < 0.01 and row.errors_against == "fp64"
        for row in rows
        if row.kept_mib is not None
    )
    assert [row.name for row in results.breakdown_of(found).passes][:3] == ["route", "up", "down"]
    assert "### Where its time is" in report.page({"layer.tiny": found})


def test_families_from_arguments_to_page(fake_card, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    tiny = {
        name: replace(layer_of, shape=shapes.Shape(name, 48, 32, 4, 2))
        for name, layer_of in shapes.SPECIALS.items()
    }
    monkeypatch.setattr(special, "SPECIALS", tiny)
    monkeypatch.setattr(special, "DEVICE", "cpu")
    monkeypatch.setattr(special, "take_turns", functools.partial(timing.take_turns, warmup_ms=0.1))
    output = tmp_path / "families"
    monkeypatch.setattr(sys, "argv", ["special.py", "--tokens", "20", "--output", str(output)])
    special.main()
    found = json.loads((tmp_path / "families.json").read_text())
    rows = [results.FamilyRow(**row) for row in found["families"]["rows"]]
    assert [row.family for row in rows] == list(shapes.SPECIALS)
    text = report.page({"families": found})
    assert all(f"| {row.family} | 20 | " in text for row in rows)


def test_what_does_not_fit_is_named(fake_card, monkeypatch, tmp_path):
    pytest.importorskip("transformers")

    def too_large(bound):
        if bound.implementation.base == "grouped_mm":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More")
        return {"kept_mib": 1.0, "peak_mib": 2.0}

    monkeypatch.setattr(layer, "memory", too_large)
    layer.fastexperts.register()
    found = layer.Combination(problem(torch.bfloat16), ["grouped_mm", "fastexperts"], "fp64").rows()
    assert [row.implementation for row in found] == ["dense", "fastexperts", "grouped_mm"]
    assert found[-1].skipped == "CUDA out of memory"
    assert "skipped: CUDA out of memory" in report.layer_table(found)


def test_tune_changes_one_pass_and_puts_it_back():
    tune = pytest.importorskip("tune")
    tiles, where = tune.tiles, (torch.device("cpu"), torch.float32)
    table = {name: tiles.tile(*where, name) for name in tiles.PASSES}
    other = replace(table["up"], k=16)
    with tune.with_tile("up", other), tune.with_tile("dx", None):
        assert {name: tiles.tile(*where, name) for name in tiles.PASSES} == table | {"up": other}
    assert {name: tiles.tile(*where, name) for name in tiles.PASSES} == table


COMPILED = {
    "environment": ENVIRONMENT,
    "compile": {
        "shape": "qwen3-30b",
        "tokens": 256,
        "runs": [
            {
                "cache": "cold",
                "import_s": 5.0,
                "context_s": 0.2,
                "first_step_s": 31.5,
                "second_step_s": 2e-3,
                "built": 11,
            }
        ],
        "changes": [{"what": "T = 7, balanced", "new": 0}],
    },
}


def test_compile_section():
    text = report.page({"compile-time": COMPILED})
    assert "Triton itself" not in text
    measured = {**COMPILED, "compile": {**COMPILED["compile"], "floor": {"first_launch_s": 2.5}}}
    assert "Triton itself takes 2.50 s" in report.page({"compile-time": measured})
    assert "| cold | 5.00 | 0.20 | **31.50** | 2.0 | 11 |" in text
    assert "| T = 7, balanced | 0 |" in text


def test_compilations_are_counted_where_triton_keeps_them():
    """Compiled for a card that is not here, in a process without the interpreter."""
    script = """
import compile_time, torch
from offline import offline
from fastexperts import cpu, kernels

def combine(tokens, top_k):
    routing = cpu.route(torch.zeros(tokens, top_k, dtype=torch.int64), 4, 128)
    kernels.combine(torch.zeros(tokens * top_k, 64), None, routing, torch.float32)

with offline(90):
    seen = [compile_time.compilations()]
    for tokens in (8, 8, 24):
        combine(tokens, 2)
        seen.append(compile_time.compilations())
    combine(8, 4)
    print(*seen, compile_time.compilations())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["0", "1", "1", "1", "2"], result.stderr
