"""What holds for every test: seeded, offline, and Triton's interpreter where there is no GPU."""

import fcntl
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Read by huggingface_hub when it is imported: a test that needs a hub fails at once, everywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not HAS_GPU:
    # Read by triton when it is imported, so it is set before any test module is.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers whatever ran before: test order differs between xdist workers."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(0)


@pytest.fixture
def one_large():
    """Of the tests that use it, one at a time: xdist workers share a card, and these take half of it."""
    with (Path(tempfile.gettempdir()) / f"fastexperts-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def given_back(request):
    """A GPU test leaves no memory behind that those of other xdist workers, on the same card, lack."""
    yield
    if request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()
