"""The adapter under torch.compile: one graph, the same gradients, a gate that is compared while tracing."""

import pytest
import torch
from support_hf import assert_close, layer_inputs, outputs_and_gradients, toy_experts
from torch._dynamo.backends.common import aot_autograd

import fastexperts
from fastexperts.errors import FastexpertsError
from fastexperts.hf.gate import activation_of


@pytest.fixture(autouse=True)
def registered():
    fastexperts.register()
    torch._dynamo.reset()


def clamped(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def test_a_compiled_forward_is_our_op():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    module = toy_experts(gate=clamped, values={"limit": 2.0})
    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*layer_inputs(module))
    (targets,) = graphs
    names = {str(target) for target in targets if "getitem" not in str(target)}
    assert names == {"fastexperts.moe_mlp.default"}


@pytest.mark.parametrize("enabled_first", [False, True])
def test_compiles_without_a_graph_break(enabled_first):
    module = toy_experts(gate=clamped, values={"limit": 2.0})
    if enabled_first:
        activation_of(module)
    inputs = layer_inputs(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, module, inputs)
    assert_close(got, outputs_and_gradients(module, module, inputs), tolerance=0)


def test_a_value_changed_after_compilation_is_compared_again():
    module = toy_experts(gate=clamped, values={"limit": 2.0})
    inputs = layer_inputs(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(*inputs)
    module.limit = 0.25
    assert_close(
        outputs_and_gradients(compiled, module, inputs),
        outputs_and_gradients(module, module, inputs),
        tolerance=0,
    )
    assert not torch.equal(before, compiled(*inputs))
    # On the instance: torch.compile sees no method that is patched on a class after compilation.
    module._apply_gate = lambda h: 2 * clamped(module, h)
    with pytest.raises(
        (FastexpertsError, torch._dynamo.exc.TorchDynamoException), match="no Activation equals"
    ):
        compiled(*inputs)


@pytest.mark.parametrize("what", ["a value of the config", "the mode"])
def test_what_the_gate_reads_is_a_guard(what):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return (self.config.factor if what == "a value of the config" else 2.0 - self.training) * (
            self.act_fn(gate) * up
        )

    module = toy_experts(gate=gate)
    module.config.factor = 1.0
    inputs = layer_inputs(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(*inputs)
    module.config.factor = 2.0
    module.eval()
    with pytest.raises(
        (FastexpertsError, torch._dynamo.exc.TorchDynamoException), match="no Activation equals"
    ):
        compiled(*inputs)


def test_a_gate_that_reads_a_parameter_is_refused_while_tracing():
    module = toy_experts(gate=lambda self, h: self.scale * clamped(self, h), values={"limit": 2.0})
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        (FastexpertsError, torch._dynamo.exc.TorchDynamoException), match="reads the parameter scale"
    ):
        compiled(*layer_inputs(module))


def test_a_wrong_gate_is_refused_while_tracing():
    module = toy_experts(gate=lambda self, h: 1.01 * clamped(self, h), values={"limit": 2.0})
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        (FastexpertsError, torch._dynamo.exc.TorchDynamoException), match="no Activation equals"
    ):
        compiled(*layer_inputs(module))
