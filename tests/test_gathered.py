"""Tensors of layers, gathered into stacks."""

import pytest
import torch

from fastexperts.metrics.gathered import Gathered


@pytest.fixture
def taken():
    return []


def gathered(taken, elements=8):
    return Gathered(lambda *group: taken.append(group), elements)


def full(value, *shape, dtype=torch.int64):
    return torch.full(shape, value, dtype=dtype)


def test_layers_that_follow_each_other_are_one_stack(taken):
    each = gathered(taken, elements=100)
    for row in (3, 4, 5):
        each.add(row, full(row, 2, 2), None, "softmax")
    assert taken == []
    each.flush()
    each.flush()
    ((first, stack, keep, kind),) = taken
    assert (first, keep, kind) == (3, None, "softmax")
    assert torch.equal(stack, torch.stack([full(row, 2, 2) for row in (3, 4, 5)]))


def test_no_more_than_so_many_elements_are_kept(taken):
    each = gathered(taken, elements=8)
    for row in range(5):
        each.add(row, full(row, 2, 2), None)
    assert [(first, len(stack)) for first, stack, *_ in taken] == [(0, 2), (2, 2)]
    each.flush()
    assert [(first, len(stack)) for first, stack, *_ in taken] == [(0, 2), (2, 2), (4, 1)]


KEEP = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("row", "tensor", "keep", "kind"),
    [
        (0, full(1, 2), KEEP, "a"),
        (2, full(1, 2), KEEP, "a"),
        (1, full(1, 3), KEEP, "a"),
        (1, full(1, 2, dtype=torch.int32), KEEP, "a"),
        (1, full(1, 2), KEEP.clone(), "a"),
        (1, full(1, 2), None, "a"),
        (1, full(1, 2), KEEP, "b"),
    ],
    ids=["the same layer", "a later layer", "shape", "dtype", "another batch", "no padding", "kind"],
)
def test_what_does_not_go_on_begins_another_stack(taken, row, tensor, keep, kind):
    each = gathered(taken)
    each.add(0, full(0, 2), KEEP, "a")
    each.add(row, tensor, keep, kind)
    each.flush()
    assert [(first, len(stack)) for first, stack, *_ in taken] == [(0, 1), (row, 1)]
    assert taken[0][2] is KEEP
    assert taken[1][2] is keep


def test_what_is_cleared_is_not_taken(taken):
    each = gathered(taken)
    each.add(0, full(0, 2), KEEP)
    each.clear()
    each.flush()
    assert taken == []
