"""Routed tokens are counted once, where they were sent, and only in training."""

import pytest
import torch
from recipes import SMALL

from fastexperts.metrics.routing_health import ExpertLoad, imbalance
from fastexperts.train.models import load_model, load_tokenizer
from fastexperts.train.recipe import ModelSettings


def small_model(config="tiny-qwen3-moe"):
    chosen = ModelSettings(config=config, overrides=SMALL[config])
    return load_model(chosen, load_tokenizer(chosen), torch.float32, 0).train()


def routed(model, batch):
    """Counts by the router's own output, which knows nothing of the experts' hooks."""
    router_logits = model(**batch, output_router_logits=True).router_logits
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    chosen = [logits.topk(k, dim=-1).indices[keep].flatten() for logits in router_logits]
    return torch.stack([torch.bincount(each, minlength=experts) for each in chosen])


def test_counts_are_the_router_s():
    model = small_model()
    batch = {"input_ids": torch.randint(256, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.int64)}
    batch["attention_mask"][1, 12:] = 0
    want = routed(model, batch)
    with ExpertLoad(model) as load:
        model(**batch)
        assert torch.equal(load.counts(), want)
        model(**batch)
    assert torch.equal(load.counts(), 2 * want)
    model(**batch)
    assert torch.equal(load.counts(), 2 * want), "nothing is counted after the with"


def test_evaluation_is_not_counted():
    model = small_model().eval()
    with ExpertLoad(model) as load:
        model(torch.randint(256, (1, 8)))
    assert load.counts().sum() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted(reentrant):
    model = small_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    next(iter(ExpertLoad(model).layers.values())).register_forward_pre_hook(lambda *_: calls.append(1))
    tokens = torch.randint(256, (2, 8))
    with ExpertLoad(model) as load:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(calls) == 2, "a forward and its recomputation, or this shows nothing"
    assert load.counts().sum(1).tolist() == [2 * 8 * 4] * 2


def test_ids_that_are_no_local_expert_are_not_counted():
    model = small_model()
    load = ExpertLoad(model)
    name, experts = next(iter(load.layers.items()))
    ids = torch.tensor([[0, 3], [-1, 16], [3, 99]])
    with load:
        hook = experts.register_forward_pre_hook(
            lambda module, args: (args[0], args[1].clamp(0, 15), args[2])
        )
        experts(torch.randn(3, 32), ids, torch.rand(3, 2))
        hook.remove()
    counts = load.counts()[0]
    assert (counts[0], counts[3], counts.sum()) == (1, 2, 3), name


def test_imbalance():
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert imbalance(counts) == [1.0, 4.0, 0.0]
