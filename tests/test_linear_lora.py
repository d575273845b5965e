"""LoRA of linear layers: PEFT's numbers in every state of its modules; its own forward where we have none."""

import copy
import pickle

import pytest
import torch
from support import assert_close as assert_by_the_rule
from support_hf import assert_close, relative, saved_for_backward
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastexperts.errors import FastexpertsError
from fastexperts.hf import liger, linear_lora
from fastexperts.hf.optimize import PARTS

peft = pytest.importorskip("peft")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN, OUT, RANK = 24, 40, 5


class Toy(nn.Module):
    """One linear layer."""

    def __init__(self, bias=True, out=OUT):
        super().__init__()
        self.lin = nn.Linear(IN, out, bias=bias)

    def forward(self, x):
        return self.lin(x)


def adapted(bias=True, out=OUT, dtype=torch.float32, names=("default",), **config):
    """A PEFT model over `Toy`, x A^T and the update about N(0, 1); the same for the same arguments."""
    torch.manual_seed(0)
    settings = {"r": RANK, "lora_alpha": 7, "target_modules": ["lin"], "init_lora_weights": False} | config
    model = peft.get_peft_model(Toy(bias, out).to(dtype), peft.LoraConfig(**settings), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
            if "lora_B" in name:
                parameter.mul_(RANK / 7)
    return model.to(DEVICE).train()


def lora_of(model):
    return model.base_model.model.lin


def put(model):
    """The forward that was put in; it counts the calls that went to PEFT's."""
    forward = linear_lora.forward_of(lora_of(model), DEVICE)
    forward.put()
    original, forward.to_peft = forward.stock, 0

    def stock(*args, **kwargs):
        forward.to_peft += 1
        return original(*args, **kwargs)

    forward.stock = stock
    return forward


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def results(model, x, **kwargs):
    """y, dx, and the gradient of each parameter that asks for one."""
    torch.manual_seed(3)  # of dropouts
    x = x.detach().requires_grad_()
    leaves = {"dx": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    y = model(x, **kwargs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    found = zip(leaves, gradients, strict=True)
    return {"y": y.detach(), **{name: gradient for name, gradient in found if gradient is not None}}


def in_eval(model):
    model.eval()


def switch(model):
    model.set_adapter("second")


def delete(model):
    model.delete_adapter("default")
    model.set_adapter("second")


def merge(model):
    model.base_model.merge_adapter()


def unmerge(model):
    merge(model)
    model.base_model.unmerge_adapter()


def disable(model):
    model.base_model.disable_adapter_layers()


def disable_merged(model):
    merge(model)
    disable(model)


def enable_again(model):
    disable(model)
    model.base_model.enable_adapter_layers()


def both(model):
    model.base_model.set_adapter(["default", "second"])


def no_such(model):
    lora_of(model)._active_adapter = ["elsewhere"]


def one_of_two(model):
    lora_of(model)._active_adapter = ["elsewhere", "default"]


def drop(model):
    lora_of(model).lora_dropout["default"] = nn.Dropout(0.3)


def drop_nothing(model):
    lora_of(model).lora_dropout["default"] = nn.Dropout(0.0)


def drop_in_eval(model):
    drop(model)
    model.eval()


def drop_in_a_way_of_its_own(model):
    lora_of(model).lora_dropout["default"] = nn.AlphaDropout(0.3)


def train_base(model):
    for parameter in lora_of(model).base_layer.parameters():
        parameter.requires_grad_(True)


def freeze(factor):
    return lambda model: getattr(lora_of(model), factor)["default"].requires_grad_(False)


def rescaled(model):
    lora_of(model).set_scale("default", 3.0)


def scale_of_a_tensor(model):
    lora_of(model).scaling["default"] = torch.tensor(1.5, device=DEVICE)


def do_not_cast(model):
    lora_of(model).cast_input_dtype_enabled = False


def hooked(layer, register):
    def change(model):
        inner = lora_of(model)
        inner = inner.base_layer if layer == "base_layer" else getattr(inner, layer)["default"]
        getattr(inner, register)(lambda *args: None)

    return change


def forward_on_the_base(model):
    base = lora_of(model).base_layer
    base.forward = base.forward


def add_dora(model):
    add(model, use_dora=True)


def add_bias_of_b(model):
    add(model, lora_bias=True)


def add_rslora(model):
    add(model, use_rslora=True)


def add_alora(model):
    add(model, alora_invocation_tokens=[1])


def add(model, **config):
    torch.manual_seed(5)
    settings = {"r": RANK, "lora_alpha": 7, "target_modules": ["lin"], "init_lora_weights": False}
    model.add_adapter("added", peft.LoraConfig(**settings, **config))
    model.set_adapter("added")


OURS = {
    "as it is": lambda model: None,
    "eval": in_eval,
    "switched": switch,
    "deleted": delete,
    "unmerged again": unmerge,
    "enabled again": enable_again,
    "one of two that are active": one_of_two,
    "dropout of 0": drop_nothing,
    "dropout in eval": drop_in_eval,
    "trained base": train_base,
    "frozen A": freeze("lora_A"),
    "frozen B": freeze("lora_B"),
    "another scale": rescaled,
    "rslora": add_rslora,
}
PEFTS = {
    "merged": merge,
    "disabled": disable,
    "disabled when merged": disable_merged,
    "two active": both,
    "none active": no_such,
    "dropout": drop,
    "another dropout": drop_in_a_way_of_its_own,
    "scale of a tensor": scale_of_a_tensor,
    "inputs not cast": do_not_cast,
    "forward hook": hooked("lora_A", "register_forward_hook"),
    "pre-hook": hooked("lora_B", "register_forward_pre_hook"),
    "backward hook": hooked("base_layer", "register_full_backward_hook"),
    "backward pre-hook": hooked("base_layer", "register_full_backward_pre_hook"),
    "forward on the base": forward_on_the_base,
    "DoRA": add_dora,
    "alora": add_alora,
    "bias of B": add_bias_of_b,
}


@pytest.mark.parametrize("state", OURS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_plain_states_are_ours_and_equal_peft_s(state, bias):
    model, theirs = (adapted(bias, names=("default", "second")) for _ in range(2))
    forward = put(model)
    for each in (model, theirs):
        OURS[state](each)
    x = rows(2, 7, IN)
    assert_close(results(model, x), results(theirs, x))
    assert forward.to_peft == 0


@pytest.mark.parametrize("state", PEFTS)
def test_other_states_are_peft_s_to_the_bit(state):
    model, theirs = (adapted(names=("default", "second")) for _ in range(2))
    forward = put(model)
    for each in (model, theirs):
        PEFTS[state](each)
    x = rows(2, 7, IN)
    got, wanted = results(model, x), results(theirs, x)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert forward.to_peft == 1


@pytest.mark.parametrize("state", sorted(PEFTS.keys() - {"none active"}))
def test_a_state_that_is_not_served_is_told(state):
    """At the time of `optimize`; the row says what it met."""
    model = adapted(names=("default", "second"))
    PEFTS[state](model)
    (row,) = PARTS["adapters"](model, DEVICE)
    told = {
        "merged": "disabled or merged",
        "disabled": "disabled or merged",
        "disabled when merged": "disabled or merged",
        "two active": "2 active adapters",
        "dropout": r"Dropout(p=0.3, inplace=False) in training",
        "another dropout": "AlphaDropout(p=0.3",
        "scale of a tensor": "a scale that is no number",
        "inputs not cast": "inputs that are not to be cast",
        "DoRA": "an adapter of DoraLinearVariant",
        "alora": "an adapter of ALoraLinearVariant",
        "bias of B": "a bias of the adapter",
    }.get(state, "hooks on it")
    assert not row.on
    assert row.names == "lin"
    assert f"Linear: `forward` got {told}" in row.what or told in row.what
    assert "call optimize again" in row.what
    assert "forward" not in vars(lora_of(model))


def test_a_dropout_that_will_be_on_in_training_is_told_in_eval():
    model = adapted(lora_dropout=0.05).eval()
    with pytest.raises(FastexpertsError, match=r"Dropout\(p=0.05.*in training.*without dropout"):
        linear_lora.forward_of(lora_of(model), DEVICE)


def test_of_a_batch_of_several_adapters_and_other_arguments():
    model, theirs = (adapted(names=("default", "second")).eval() for _ in range(2))
    forward = put(model)
    x = rows(3, 7, IN)
    names = ["second", "__base__", "default"]
    assert torch.equal(model(x, adapter_names=names), theirs(x, adapter_names=names))
    assert forward.to_peft == 1
    assert torch.equal(lora_of(model)(x, alora_offsets=None), lora_of(theirs)(x, alora_offsets=None))
    assert forward.to_peft == 2
    with pytest.raises(TypeError):
        lora_of(model)(x, 1)


@pytest.mark.parametrize(
    "x",
    [
        rows(IN),
        rows(7, IN),
        rows(2, 3, 5, IN),
        rows(IN, 7).mT,
        rows(7, 2, IN).transpose(0, 1),
        rows(2, 7, 2 * IN)[..., ::2],
        rows(1, IN).expand(6, IN),
    ],
    ids=["1-D", "2-D", "4-D", "transposed", "batch second", "strided", "expanded"],
)
def test_shapes_and_strides(x):
    model, theirs = adapted(), adapted()
    forward = put(model)
    assert_close(results(model, x), results(theirs, x))
    assert forward.to_peft == 0


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(shape, dtype):
    model, theirs = adapted(dtype=dtype), adapted(dtype=dtype)
    put(model)
    x = rows(*shape).to(dtype)
    got, wanted = results(model, x), results(theirs, x)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), f"{name}: no rows give zeros"


def test_gradients_that_are_one_number_everywhere():
    """What `.sum().backward()` gives has strides of 0."""
    model, theirs = adapted(), adapted()
    put(model)
    for each in (model, theirs):
        each(rows(2, 7, IN)).sum().backward()
    a, b = ("base_model.model.lin.lora_A.default.weight", "base_model.model.lin.lora_B.default.weight")
    for name in (a, b):
        assert relative(model.get_parameter(name).grad, theirs.get_parameter(name).grad) < 1e-5


def test_the_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    operands = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 6), (4, 6), (4,), (3, 6), (4, 3))
    ]
    assert torch.autograd.gradcheck(
        lambda *tensors: linear_lora.lora_linear(*tensors, 0.7, torch.float64), operands
    )


def test_a_second_derivative_is_refused():
    model = adapted()
    put(model)
    x = rows(7, IN).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def accumulated(model):
    """Two micro-batches; in each the layer runs twice, once in checkpointing, and the graph serves twice."""
    for part in rows(2, 3, IN).requires_grad_():
        inner = checkpoint(model, part, use_reentrant=False)
        y = model(inner.tanh())
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_checkpointing_double_use_and_a_graph_used_twice():
    model, theirs = adapted(out=IN), adapted(out=IN)
    forward = put(model)
    assert_close(accumulated(model), accumulated(theirs))
    assert forward.to_peft == 0


def test_what_is_kept():
    model = adapted(dtype=torch.bfloat16)
    put(model)
    x = rows(2, 7, IN).bfloat16()
    layer = lora_of(model)
    parameters = {p.data_ptr() for p in layer.parameters()}

    def kept():
        with saved_for_backward() as saved:
            model(x.requires_grad_())
        return sorted(
            "x" if t.data_ptr() == x.data_ptr() else f"{list(t.shape)} {t.dtype}"
            for t in saved
            if t.data_ptr() not in parameters
        )

    xa, a, b = (f"[{dims}] torch.bfloat16" for dims in (f"14, {RANK}", f"{RANK}, {IN}", f"{OUT}, {RANK}"))
    assert kept() == sorted([xa, a, b, "x"])  # the factors lie in fp32
    freeze("lora_A")(model)
    assert kept() == sorted([xa, a, b])
    freeze("lora_B")(model)
    assert kept() == sorted([a, b])


def test_without_gradients():
    model, theirs = adapted(), adapted()
    forward = put(model)
    x = rows(2, 7, IN)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert relative(model(x), theirs(x)) < 1e-6
            assert not model(x).requires_grad
    wanted = results(theirs, x)
    y = model(x)  # which asks for none itself, as after embeddings
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = dict(zip(trained, torch.autograd.grad(y, list(trained.values()), dy), strict=True))
    assert_close(got, {name: wanted[name] for name in got})
    assert forward.to_peft == 0


LOW = {
    # weights, factors (None: as PEFT makes them, which is fp32), autocast
    "bf16 weights": (torch.bfloat16, None, None),
    "bf16 weights and factors": (torch.bfloat16, torch.bfloat16, None),
    "fp16 weights": (torch.float16, None, None),
    "bf16 autocast": (torch.float32, None, torch.bfloat16),
    "bf16 autocast over bf16 weights": (torch.bfloat16, None, torch.bfloat16),
}


def wide(train_base_too=True):
    """As `adapted`, wide enough for statistics."""
    torch.manual_seed(0)
    model = Toy(out=192)
    model.lin = nn.Linear(160, 192)
    config = peft.LoraConfig(r=12, lora_alpha=18, target_modules=["lin"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale / (1.5 if "lora_B" in name else 1))
    if train_base_too:
        train_base(model)
    return model.to(DEVICE).train()


@pytest.mark.parametrize("case", LOW)
def test_low_precision_by_the_rule(case):
    """Against fp64 of the same rounded values, beside PEFT in the same dtypes: tests/support.py."""
    weights, factors, cast = LOW[case]
    low = cast or weights
    model = wide()
    layer = lora_of(model)
    layer.base_layer.to(weights)
    if factors:
        layer.lora_A.to(factors), layer.lora_B.to(factors)
    theirs, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    forward = put(model)
    x = rows(4, 64, 160).to(low if cast is None else torch.float32)
    with torch.autocast(DEVICE, cast, enabled=cast is not None):
        got, eager = results(model, x), results(theirs, x)
    ref = results(truth, x.double())
    assert forward.to_peft == 0
    assert got.keys() == eager.keys() == ref.keys()
    assert len(got) == 6
    for name, tensor in ref.items():
        assert got[name].dtype == eager[name].dtype, name
        assert_by_the_rule(got[name], eager[name], tensor, low, name)


def test_an_update_is_added_without_being_rounded():
    """Nearer to fp64 than PEFT's own bf16 factors: the update meets the layer in the sum of a product."""
    model = wide()
    model.to(torch.bfloat16)
    theirs, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    put(model)
    x = rows(4, 64, 160).bfloat16()
    with torch.no_grad():
        ours, peft_s, ref = model(x), theirs(x), truth(x.double())
    assert relative(ours, ref) < relative(peft_s, ref)


def test_under_autocast_fp64_is_peft_s_and_what_mixes_dtypes_raises_as_peft_does():
    model, theirs = (adapted(dtype=torch.float64) for _ in range(2))
    forward = put(model)
    x = rows(7, IN).double()
    assert_close(results(model, x), results(theirs, x))
    assert forward.to_peft == 0
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(model(x), theirs(x))
    assert forward.to_peft == 1
    with pytest.raises(RuntimeError, match="dtype"):
        model(x.float())
    assert forward.to_peft == 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.to("meta")(x)
    assert forward.to_peft == 3
    assert model(x.to("meta")).shape == (7, OUT)
    assert forward.to_peft == 4


def test_a_backward_under_autocast_is_that_of_the_forward():
    model = adapted()
    put(model)
    x = rows(7, IN)
    wanted, y = results(model, x), model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = dict(zip(trained, torch.autograd.grad(y, list(trained.values()), dy), strict=True))
    assert_close(got, {name: wanted[name] for name in got}, 0)


def test_a_weight_of_whole_numbers_is_not_cast():
    """Under autocast neither is it by PyTorch."""
    model = adapted()
    forward = put(model)
    base = lora_of(model).base_layer
    base.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(RuntimeError):
        model(rows(7, IN))
    assert forward.to_peft == 1


def test_a_parameter_that_is_more_than_a_tensor_is_peft_s():
    class Quantised(nn.Parameter):
        pass

    model = adapted()
    forward = put(model)
    base = lora_of(model).base_layer
    base.weight = Quantised(base.weight.detach(), requires_grad=False)
    model(rows(7, IN))
    assert forward.to_peft == 1


def test_other_modules_are_refused_and_others_hooks_run():
    class Wide(nn.Linear):
        pass

    model = Toy()
    model.lin = Wide(IN, OUT)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lin"]))
    with pytest.raises(FastexpertsError, match="quantised, sharded or wrapped layer"):
        linear_lora.forward_of(lora_of(model), DEVICE)

    model = adapted()
    lora_of(model).forward = lora_of(model).forward
    with pytest.raises(FastexpertsError, match="put on the instance"):
        linear_lora.forward_of(lora_of(model), DEVICE)

    class Theirs(type(lora_of(model))):
        pass

    model = adapted()
    lora_of(model).__class__ = Theirs
    with pytest.raises(FastexpertsError, match=f"that of another class of {__name__}"):
        linear_lora.forward_of(lora_of(model), DEVICE)

    model, seen = adapted(), []
    forward = put(model)
    lora_of(model).register_forward_hook(lambda *_: seen.append("forward"))
    lora_of(model).register_full_backward_hook(lambda *_: seen.append("backward"))
    results(model, rows(7, IN))
    assert (seen, forward.to_peft) == (["forward", "backward"], 0)


def test_what_there_is_to_serve(monkeypatch):
    assert PARTS["adapters"](Toy(), DEVICE)[0].what == linear_lora.NONE_FOUND
    model = adapted()
    (row,) = PARTS["adapters"](model, DEVICE)
    assert (row.on, row.modules, row.names) == (True, 1, "lin")
    (again,) = PARTS["adapters"](model, DEVICE)
    assert again == row
    assert liger.restore(model) == 1
    assert "forward" not in vars(lora_of(model))
    monkeypatch.setattr(linear_lora, "find_spec", lambda name: None)
    assert linear_lora.candidates(model) == {}


def test_a_copied_a_pickled_and_an_unloaded_model():
    model = adapted()
    linear_lora.forward_of(lora_of(model), DEVICE).put()
    x = rows(7, IN)
    wanted = results(model, x)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        lora_of(model).base_layer.weight.mul_(2)
    for twin in twins:
        assert lora_of(twin).forward.module is lora_of(twin)
        assert_close(results(twin, x), wanted, 0)
    (twin, _) = twins
    merged = twin.merge_and_unload()
    assert type(merged.lin) is nn.Linear
    assert relative(merged(x), wanted["y"]) < 1e-6
    assert adapted().state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
def test_compiled_is_the_same(cast):
    torch._dynamo.reset()
    model = adapted()
    forward = linear_lora.forward_of(lora_of(model), DEVICE)
    forward.put()
    x = rows(2, 7, IN)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
        wanted, got = results(model, x), results(compiled, x)
        assert_close({name.removeprefix("_orig_mod."): t for name, t in got.items()}, wanted)
        model.base_model.disable_adapter_layers()
        assert torch.equal(compiled(x), model(x)), "a state that changes is traced again"
