"""Loss curves with every part on beside those of the model as it was: fp32, five seeds, Adam."""

from statistics import median

import pytest
import torch
from support_hf import RESOLUTION, assert_close, relative, tiny_model, tokens
from support_liger import run_liger, step

from fastexperts.hf.optimize import PARTS, optimize

STEPS, EARLY, SEEDS, LEARNING_RATE = 20, 10, 5, 1e-3
VOCABULARY = 31


def batches(seed, device):
    """Three batches in turn: there is something to learn."""
    ids = [tokens(10 * seed + i, 1, 4, VOCABULARY).to(device) for i in range(3)]
    return [{"input_ids": ids[i % 3], "labels": ids[i % 3]} for i in range(STEPS)]


def curve(model, data):
    """The loss before each step of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for batch in data:
        losses.append(step(model, batch)["loss"].item())
        optimizer.step()
    return torch.tensor(losses, dtype=torch.float64)


def deviation(got, eager):
    """The largest relative deviation of a curve after its first steps."""
    return ((got - eager).abs() / eager)[EARLY:].max().item()


@pytest.mark.slow  # Liger's kernels in the interpreter
def test_the_curves_are_eager_s(monkeypatch):
    device = run_liger(monkeypatch)
    ours, grouped = [], []
    for seed in range(SEEDS):
        data = batches(seed, device)

        def build(implementation, seed=seed):
            small = {"vocab_size": VOCABULARY, "use_qk_norm": False, "attn_implementation": "eager"}
            model = tiny_model("glm4_moe", implementation, seed=seed, **small)
            return model.to(device).train()

        model = build("eager")
        summary = optimize(model, checkpoint="keep-attention", verbose=False)
        assert {part for part in PARTS if summary.on(part)} == set(PARTS) - {"adapters"}
        if seed == 0:
            reference = build("eager")
            assert_close(step(model, data[0]), step(reference, data[0]))
            ids = data[0]["input_ids"]
            assert relative(model(input_ids=ids).logits, reference(input_ids=ids).logits) <= 1e-5
        eager = curve(build("eager"), data)
        assert eager[-3:].mean() < eager[:3].mean() - 0.5, "it learns"
        got = curve(model, data)
        assert ((got - eager).abs() / eager)[:EARLY].max() <= 1e-5
        ours.append(deviation(got, eager))
        grouped.append(deviation(curve(build("grouped_mm"), data), eager))
    print(f"median deviation: ours {median(ours):.1e}, grouped_mm {median(grouped):.1e}")
    assert median(ours) <= 2 * max(median(grouped), RESOLUTION)
