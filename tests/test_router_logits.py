"""Entropy and size of router logits are what transformers' own recording gives, for each kind of router."""

import inspect
import math

import pytest
import torch
from families import cases, has_all_families, outputs, tiny_family
from support_hf import Ops, tiny_model, tokens

from fastexperts.metrics.expert_load import ExpertLoad
from fastexperts.metrics.router_logits import SCORES, RouterLogits, entropy, nearest_score
from fastexperts.metrics.tokens import TrainedTokens

CPU = torch.device("cpu")


class Watched:
    """The routers of a model, watched; a context manager."""

    def __init__(self, model):
        self.tokens, layers = TrainedTokens(model), ExpertLoad(model).layers
        self.routers = RouterLogits(model, layers, self.tokens)

    def __enter__(self):
        self.tokens.start()
        self.routers.start()
        return self.routers

    def __exit__(self, *_):
        self.routers.stop()
        self.tokens.stop()


def recording(family):
    """A tiny model of a family of which this transformers records router logits, as all do from 5.23 on."""
    model = tiny_model(family, "eager").train()
    if not has_all_families() and "router_logits" not in (model._can_record_outputs or {}):
        pytest.skip(f"this transformers records no router logits of {family}")
    return model


def expected(logits_TE, kind, keep_T):
    """(tokens, sum of entropies, sum of mean squares), token by token, in fp64."""
    score = {"softmax": torch.exp, "sigmoid": torch.sigmoid}[kind]
    rows = []
    for logits_E in logits_TE[keep_T].double():
        p_E = score(logits_E) / score(logits_E).sum()
        rows.append([1.0, float(-(p_E * p_E.log()).sum()), float((logits_E**2).mean())])
    return torch.tensor(rows, dtype=torch.float64).sum(0)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3_moe", "softmax"),
        ("mixtral", "softmax"),
        ("deepseek_v3", "sigmoid"),
        ("ernie4_5_moe", "softmax"),
    ],
)
def test_the_sums_are_those_of_recorded_logits(family, kind):
    model = recording(family)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, 9:] = 0
    batch = {"input_ids": tokens(), "attention_mask": mask}
    with torch.no_grad():
        recorded = model.get_decoder()(**batch, output_router_logits=True).router_logits
    want = torch.stack([expected(each.flatten(0, -2), kind, mask.flatten().bool()) for each in recorded])
    with Watched(model) as routers:
        model(**batch)
        assert routers.table(CPU)[:, 0].tolist() == [33.0] * len(recorded), "tokens without padding"
        torch.testing.assert_close(routers.table(CPU), want, rtol=1e-5, atol=0)
        model(**batch)
        torch.testing.assert_close(routers.table(CPU), 2 * want, rtol=1e-5, atol=0)
        routers.reset()
        assert routers.table(CPU).sum() == 0
        assert set(routers.columns.values()) == {recorded[0].shape[-1]}
    model(**batch)
    assert routers.table(CPU).sum() == 0, "watched no more"


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_and_evaluation_are_not_summed(reentrant):
    model = recording("deepseek_v3")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    with Watched(model) as routers:
        for router in routers.routers.values():
            router.module.register_forward_hook(lambda *_: calls.append(1))
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        assert len(calls) == 2, "a forward and its recomputation, or this shows nothing"
        model.eval()(tokens())
        assert routers.table(CPU)[:, 0].tolist() == [48.0]


def test_after_the_first_batch_nothing_is_waited_for():
    model = tiny_model("qwen3_moe", "eager").train()
    with Ops() as plain:
        model(tokens())
    with Watched(model) as routers:
        model(tokens())
        with Ops() as watched:
            model(tokens())
    waits = [ops.names.count("aten::_local_scalar_dense") for ops in (plain, watched)]
    assert waits[0] == waits[1]
    assert len(watched.names) - len(plain.names) <= 25 * len(routers.routers) + 20, "a few for each layer"


def test_entropy_and_its_bounds():
    assert entropy(torch.ones(1, 7)).item() == pytest.approx(math.log(7))
    assert entropy(torch.tensor([[0.0, 3.0, 0.0]])).item() == 0
    assert entropy(torch.zeros(1, 4)).item() == 0, "not NaN"


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_score_is_found_by_the_weights(name, scaled):
    logits = torch.randn(50, 8)
    scores = logits.softmax(-1) if name == "none" else SCORES[name](logits)
    weight, index = scores.topk(3)
    if scaled:
        weight = 2.5 * weight / weight.sum(-1, keepdim=True)
    assert nearest_score(scores if name == "none" else logits, index, weight) == name


def test_what_no_score_gives_is_taken_for_softmax():
    logits = torch.randn(50, 8)
    index = logits.topk(2).indices
    assert nearest_score(logits, index, torch.tensor([[1.0, 0.01]]).expand(50, 2)) == "softmax"
    assert nearest_score(torch.zeros(50, 8), index, torch.ones(50, 2)) == "softmax", "all alike"
    assert nearest_score(logits, index, torch.ones(50, 2)) == "softmax"


SCORED = {
    "gemma4": "none",
    "diffusion_gemma": "none",
    "deepseek_v4": "sqrtsoftplus",  # named in the config, as of the next two
    "inkling2": "sigmoid",
    "cohere2_moe": "softmax",
}
"""Family -> its scores, where the word is not in the source of its router."""


@pytest.mark.slow  # a model of each class
def test_every_family_s_routers_are_found_and_counted():
    """The scores that are found are those of which the source of the router speaks."""
    without, wrong = set(), []
    for case in cases():
        model = tiny_family(case)
        tokens_, load = TrainedTokens(model), ExpertLoad(model)
        routers = RouterLogits(model, load.layers, tokens_)
        with load:
            tokens_.start()
            routers.start()
            outputs(model)
        if not routers.routers:
            without.add(case.family)
            continue
        kinds = set(routers._score.values())
        source = " ".join(inspect.getsource(type(router.module)) for router in routers.routers.values())
        want = SCORED.get(case.family) or ("sigmoid" if "sigmoid" in source else "softmax")
        counted = routers.table(CPU)[:, 0].tolist()
        routed = [n / k for n, k in zip(load.counts().sum(1).tolist(), load.top_k.values(), strict=True)]
        if kinds != {want} or counted != routed:
            wrong.append((str(case), kinds, want, counted, routed))
    assert wrong == []
    assert without == {"ernie4_5_vl_moe"}
