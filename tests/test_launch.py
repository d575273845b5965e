"""What is planned once: the same plan for other addresses and numbers of rows, another for anything else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from spies import use_interpreter
from support import Case, check_case
from triton import knobs
from triton.compiler.compiler import CompiledKernel

from fastexperts.kernels import launch
from fastexperts.kernels.launch import FAR, forgotten, planned


def planned_so_far():
    return sum(len(made) for made in launch._every_made)


@pytest.fixture
def plan():
    """(a planned function, the calls that reached it)"""
    made = []

    @planned
    def make(*tensors, **options):
        made.append((tensors, options))
        return len(made)

    return make, made


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(7, 31),
        torch.zeros(7, 64)[:, :32],
        torch.zeros(32, 7).t(),
        torch.zeros(7, 32, dtype=torch.float64),
        torch.zeros(7 * 32 + 1)[1:].view(7, 32),
        torch.zeros(0, 32),
        torch.zeros(1, 32).expand(FAR + 1, 32),
        torch.zeros(7, 1, 32),
        None,
    ],
)
def test_another_layout_is_another_plan(other, plan):
    make, made = plan
    assert make(torch.zeros(7, 32), top_k=2) == make(torch.zeros(7, 32), top_k=2) == 1
    assert make(other, top_k=2) == 2
    assert make(torch.zeros(7, 32), top_k=2) == 1
    assert len(made) == 2


def test_rows_are_not_part_of_it_and_experts_are(plan):
    make, _ = plan
    assert make(torch.zeros(7, 32)) == make(torch.zeros(900, 32)) == 1
    assert make(torch.zeros(2, 7, 32)) == 2
    assert make(torch.zeros(3, 7, 32)) == 3
    assert make(torch.zeros(7)) == make(torch.zeros(900)) == 4


def test_steps_of_any_length_share_their_plans(monkeypatch):
    """Packed batches have another number of tokens each time: nothing may grow with it."""
    use_interpreter(monkeypatch)
    with forgotten():
        counts = []
        for tokens in (33, 70, 41):
            check_case(Case(tokens=tokens, experts=4, dims=(48, 80)))
            counts.append(planned_so_far())
    assert counts[0] > 0
    assert counts == counts[:1] * 3


def test_options_and_the_environment_are_part_of_it(plan, monkeypatch):
    make, _ = plan
    assert [make(torch.zeros(7, 32), top_k=k, name="up") for k in (1, 2, 1)] == [1, 2, 1]
    monkeypatch.setenv("FASTEXPERTS_TMA", "0")
    assert make(torch.zeros(7, 32), top_k=1, name="up") == 3
    with forgotten():
        assert make(torch.zeros(7, 32), top_k=1, name="up") == 4


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every launch of a plan's compiled kernel, in the order of Triton's launcher."""
    recorded = []
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(launch.driver, "_active", driver)
    compiled = object.__new__(CompiledKernel)
    values = {"module": "m", "function": 11, "packed_metadata": (4, 1, 0), "name": "k", "src": None}
    vars(compiled).update(values, _run=lambda *args: recorded.append(args))
    plan = launch.Plan(None, (None,), (5,), {"BLOCK": 64}, _compiled=compiled)

    def call():
        recorded.clear()
        plan((3, 2), (torch.zeros(1),), 9)
        return recorded[0]

    return call


@pytest.mark.parametrize("when", ["enter", "exit"])
@pytest.mark.parametrize("chained", [True, False])
def test_a_planned_launch_is_tritons_own(when, chained, calls, monkeypatch):
    """But for metadata and hooks, where nobody has set a hook. Triton's own is what a set one leads to."""
    quiet = calls()
    assert quiet[:9] == (3, 2, 1, 7, 11, (4, 1, 0), None, None, None)
    assert quiet[9:] == (torch.zeros(1), 5, 9, 64)
    name, heard = f"launch_{when}_hook", []
    if chained:
        monkeypatch.setattr(getattr(knobs.runtime, name), "calls", [heard.append])
    else:
        monkeypatch.setattr(knobs.runtime, name, heard.append)
    loud = calls()
    assert loud[:6] + loud[9:] == quiet[:6] + quiet[9:]
    assert loud[7:9] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    assert None not in loud[6:9]


def test_a_hook_may_be_none(calls, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    assert calls()[6:9] == (None, None, None)


def test_layers_that_differ_in_one_thing_follow_each_other(monkeypatch):
    """Each computes what it computes alone."""
    use_interpreter(monkeypatch)
    case = Case(tokens=33, experts=4, dims=(48, 80))
    changes = (
        {},
        {"experts": 3},
        {"tokens": 70},
        {"layout": "interleaved"},
        {"top_k": 1},
        {"activation": "geglu"},
    )
    for change in (*changes, {}):
        check_case(replace(case, **change))
