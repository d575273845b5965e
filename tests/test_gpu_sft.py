"""SFTTrainer with TRL's own precision (fp32 weights, bf16 autocast, gradient checkpointing) on a GPU."""

import pytest
import torch

pytestmark = pytest.mark.gpu

VOCABULARY, LENGTH = 512, 256


def _model(dtype: torch.dtype, implementation: str):
    """A Qwen3-MoE with pre-activations of about N(0, 1), the same weights for every call."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.to(dtype)


def _first_gradients(
    tmp_path, dtype: torch.dtype, implementation: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients by parameter) of the first step through SFTTrainer, before the optimizer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Capture(TrainerCallback):
        gradients: dict[str, torch.Tensor]

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradients = {
                n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None
            }

    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCABULARY, (4, LENGTH), generator=generator).tolist()
    capture = Capture()
    trainer = SFTTrainer(
        model=_model(dtype, implementation),
        args=SFTConfig(
            output_dir=str(tmp_path / f"{implementation}-{dtype}"),
            max_steps=1,
            per_device_train_batch_size=4,
            max_length=LENGTH,
            bf16=dtype == torch.float32,
            gradient_checkpointing=True,
            max_grad_norm=0.0,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=_tokenizer(),
        callbacks=[capture],
    )
    loss = trainer.train().training_loss
    return loss, capture.gradients


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {str(i): i for i in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1", unk_token="0")


def test_trl_default_precision_by_the_bf16_rule(tmp_path):
    """Every gradient is as near to fp64 as eager's under this autocast (factor 2, floor 2^-9; router 2^-8).

    A top-k choice that bf16 flips moves both; the routers here see the same bf16 logits in the first layer.
    """
    pytest.importorskip("trl", reason="TRL is not installed on this GPU machine: carry its wheel")
    import fastexperts

    fastexperts.register()
    _, truth = _first_gradients(tmp_path, torch.float64, "eager")
    eager_loss, eager = _first_gradients(tmp_path, torch.float32, "eager")
    loss, ours = _first_gradients(tmp_path, torch.float32, "fastexperts")
    assert ours.keys() == eager.keys() == truth.keys()
    assert abs(loss - eager_loss) <= 2e-3 * abs(eager_loss)
    for name, expected in truth.items():
        norm = expected.norm()
        floor = 2.0**-8 if "mlp.gate." in name else 2.0**-9
        allowed = 2 * max((eager[name] - expected).norm(), floor * norm)
        error = (ours[name] - expected).norm()
        print(f"{name}: {error / norm:.2e}, eager {(eager[name] - expected).norm() / norm:.2e}")
        assert norm > 0
        assert error <= allowed, f"{name}: {error / norm:.2e} > {allowed / norm:.2e}"
