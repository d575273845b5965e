"""Routed tokens are counted once, where they were sent, and only in training."""

from collections import Counter

import pytest
import torch
from recipes import SMALL
from support_hf import Ops

from fastexperts.metrics.expert_load import ExpertLoad
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


def test_forwards_without_gradients_are_not_counted():
    """Such as a preference loss's reference, which may run in training mode."""
    model = small_model()
    with ExpertLoad(model) as load, torch.no_grad():
        model(torch.randint(256, (1, 8)))
    assert load.counts().sum() == 0


def test_padding_of_packed_rows_is_told_by_positions():
    model = small_model()
    position = torch.tensor([[*range(5), *range(7), 0, 0, 0]])
    with ExpertLoad(model) as load:
        model(torch.randint(256, (1, 15)), position_ids=position)
    assert load.counts().sum(1).tolist() == [12 * 4] * 2


def test_a_loss_that_calls_the_decoder_itself_has_its_padding_excluded():
    model = small_model()
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 3:] = 0
    with ExpertLoad(model) as load:
        model.get_decoder()(torch.randint(256, (2, 10)), attention_mask=mask)
        assert load.counts().sum(1).tolist() == [13 * 4] * 2
        model.get_decoder()(torch.randint(256, (2, 10)))
    assert load.counts().sum(1).tolist() == [33 * 4] * 2, "the mask is forgotten with its batch"


def test_the_mask_of_a_batch_that_failed_is_forgotten():
    model = small_model()
    mask = torch.zeros(1, 8, dtype=torch.int64)
    with ExpertLoad(model) as load:
        with pytest.raises(IndexError):
            model(torch.full((1, 8), 10**6), attention_mask=mask)
        model(torch.randint(256, (1, 8)))
    assert load.counts().sum(1).tolist() == [8 * 4] * 2


def test_reset_and_columns_of_the_counts():
    model = small_model()
    with ExpertLoad(model) as load:
        model(torch.randint(256, (1, 8)))
        before = load.counts()
        load.reset()
        assert load.counts().sum() == 0
        assert before.sum() == 2 * 8 * 4, "what was given stays"
        model(torch.randint(256, (1, 8)))
    assert load.counts().sum() == 2 * 8 * 4
    assert list(load.top_k.values()) == [4, 4]


def test_counting_waits_for_nothing():
    model = small_model()
    batch = {"input_ids": torch.randint(256, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.int64)}
    with Ops() as plain:
        model(**batch)
    with ExpertLoad(model), Ops() as counted:
        model(**batch)
    extra = Counter(counted.names) - Counter(plain.names)
    assert not set(extra) & {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::bincount"}
    assert extra.total() <= 10 * 2 + 20, "a few for each layer, and for the batch"


@pytest.mark.slow  # traces the model
def test_compiled_models_are_counted():
    model = small_model()
    batch = {"input_ids": torch.randint(256, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.int64)}
    batch["attention_mask"][1, 12:] = 0
    want = routed(model, batch)
    with ExpertLoad(model) as load:
        compiled = torch.compile(model, backend="eager")
        for times in (1, 2):
            compiled(**batch, labels=batch["input_ids"]).loss.backward()
            assert torch.equal(load.counts(), times * want)
