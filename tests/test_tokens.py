"""Each trained token is counted once, with the keys of its own document, and nothing waits for the device."""

import pytest
import torch
from support_hf import Ops, tiny_model, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastexperts.metrics.mixers import Span
from fastexperts.metrics.tokens import TokenMeter, count

SPANS = (Span(), Span(4), Span(3, 2), Span(causal=False))
PAD = 0


def met(span, documents, *, causal):
    """Keys that the queries of documents of these lengths meet, one by one."""

    def keys(seen):
        number = seen // span.stride
        return number if span.limit is None else min(number, span.limit)

    charged = causal and span.causal
    return sum(keys(query + 1 if charged else length) for length in documents for query in range(length))


def expected(documents, *, causal):
    return [sum(documents), *(met(span, documents, causal=causal) for span in SPANS)]


def masked(lengths, width, *, left=False):
    rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    return torch.tensor(rows)


def counted(mask=None, position=None, *, causal=True):
    shape = (mask if mask is not None else position).shape
    return count(mask, position, torch.ones(shape, dtype=torch.bool), SPANS, causal=causal).tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_counts_nothing(causal):
    for left in (False, True):
        got = counted(masked([5, 9, 1], 9, left=left), causal=causal)
        assert got == expected([5, 9, 1], causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_meet_their_own_keys(causal):
    """The last three are padding, as TRL pads: positions of 0."""
    position = torch.tensor([[*range(5), *range(7), *range(2), 0, 0, 0]])
    assert counted(position=position, causal=causal) == expected([5, 7, 2], causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_tells_padding_among_positions(causal):
    """Positions that run on through padding, and rows and documents of one token."""
    rows = torch.arange(9).expand(3, 9)
    assert counted(masked([5, 9, 1], 9), rows, causal=causal) == expected([5, 9, 1], causal=causal)
    packed = torch.tensor([[*range(5), *range(3), 0, 1, 2]])
    assert counted(masked([9], 11), packed, causal=causal) == expected([5, 3, 1], causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_trl_s_batches_are_told_apart(causal):
    collator_of = pytest.importorskip("trl.trainer.sft_trainer").DataCollatorForLanguageModeling
    rows = [{"input_ids": [7] * 11, "seq_lengths": [6, 5]}, {"input_ids": [7] * 4, "seq_lengths": [4]}]
    packed = collator_of(pad_token_id=PAD, padding_free=True, pad_to_multiple_of=8)(rows)
    assert packed["position_ids"].shape == (1, 16)
    assert "attention_mask" not in packed
    assert counted(position=packed["position_ids"], causal=causal) == expected([6, 5, 4], causal=causal)
    padded = collator_of(pad_token_id=PAD)(rows)
    assert counted(padded["attention_mask"], causal=causal) == expected([11, 4], causal=causal)


class Wrapper(nn.Module):
    """What DDP does: the model is called, with its hooks, by another module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


def batch(length=12):
    mask = masked([length, 5], length)
    return {"input_ids": tokens(length=length) * mask, "attention_mask": mask}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_each_micro_batch_is_counted_once(checkpointing):
    model = tiny_model("qwen3_moe", "eager").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    meter = TokenMeter(model, [Span()])
    for _ in range(3):
        Wrapper(model)(**batch(), use_cache=False).logits.sum().backward()
    assert meter.take() == (3 * 17, {Span(): 3 * met(Span(), [12, 5], causal=True)})
    assert meter.take() == (0, {Span(): 0}), "taken is taken"


def test_a_model_that_is_recomputed_as_a_whole_is_counted_once():
    model = tiny_model("qwen3_moe", "eager").train()
    meter = TokenMeter(model)
    embeddings = torch.randn(2, 7, 32, requires_grad=True)
    logits = checkpoint(lambda x: model(inputs_embeds=x).logits, embeddings, use_reentrant=False)
    logits.sum().backward()
    assert meter.take()[0] == 14


def test_evaluation_and_forwards_without_gradients_are_not_counted():
    model = tiny_model("qwen3_moe", "eager")
    meter = TokenMeter(model)
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    assert meter.take() == (0, {})
    model(**batch())
    assert meter.take() == (17, {})
    meter.stop()
    model(**batch())
    assert meter.take() == (0, {})


def test_positional_tokens_embeddings_and_adapters_are_counted():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("qwen3_moe", "eager"), lora).train()
    meter = TokenMeter(model)
    model(batch()["input_ids"])
    assert meter.take()[0] == 24
    model(inputs_embeds=torch.randn(2, 7, 32))
    assert meter.take()[0] == 14
    meter.stop()


def test_counting_waits_for_nothing():
    model = nn.Identity().train()
    meter = TokenMeter(model, SPANS)
    packed = torch.tensor([[*range(5), *range(7)]])
    with Ops() as ops:
        for inputs in (batch(), {"input_ids": packed, "position_ids": packed}):
            meter._count(model, (), inputs)
    assert "aten::cumsum" in ops.names
    assert {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}.isdisjoint(ops.names)
    meter.take()


@pytest.mark.gpu
def test_counting_never_synchronises():
    model = nn.Identity().train()
    meter = TokenMeter(model, SPANS)
    mask, packed = masked([5, 9], 9).cuda(), torch.tensor([[*range(5), *range(7)]]).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter._count(model, (), {"input_ids": mask, "attention_mask": mask})
        meter._count(model, (), {"input_ids": packed, "position_ids": packed})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    documents = [5, 9, 5, 7]
    assert meter.take() == (
        sum(documents),
        dict(zip(SPANS, expected(documents, causal=True)[1:], strict=True)),
    )
