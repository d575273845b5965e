"""`export` and `import`: merged checkpoints, stacked ones, and that a failed check leaves nothing behind."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support_adapters import EXPERTS, Trained, config_of
from support_hf import relative, tiny_model, tokens
from test_cli import run_cli
from transformers import AutoModelForCausalLM

from fastexperts.errors import FastexpertsError
from fastexperts.hf import checkpoint, export
from fastexperts.hf.adapters import CONFIG, WEIGHTS, read_adapter
from fastexperts.hf.checkpoint import INDEX, open_checkpoint, same_bits
from fastexperts.hf.export import export_to, import_from
from fastexperts.hf.merge import check_merged, merge


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One trained adapter that no test changes."""
    return Trained(tmp_path_factory.mktemp("shared"))


@torch.no_grad()
def logits_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return model.eval()(tokens()).logits


def tensors_of(folder):
    files = open_checkpoint(folder)
    return {key: files.tensor(key) for key in files.file_of}


def base_of(made):
    return str(made.base_folder)


@pytest.mark.parametrize("source", ["peft", "per-expert"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_merged_is_what_peft_merges(tmp_path, family, source):
    made = Trained(tmp_path, family)
    adapter = made.folder if source == "peft" else made.written(source, tmp_path / source)
    exported = export_to(adapter, "merged", tmp_path / "merged", base=base_of(made))
    assert "logits within" in exported.checks[1]
    assert relative(logits_of(tmp_path / "merged"), made.logits) <= 1e-5
    stock = PeftModel.from_pretrained(made.model(), made.folder).merge_and_unload()
    stock.save_pretrained(tmp_path / "stock")
    before, after, wanted = (tensors_of(tmp_path / name) for name in ("base", "merged", "stock"))
    changed = [key for key, tensor in before.items() if not same_bits(tensor, after[key])]
    assert {key.split(".")[-2] for key in changed} <= {
        *("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "q_proj")
    }
    assert exported.checks[0].startswith(f"{len(changed)} tensors changed")
    for key in before:
        assert (
            relative(after[key], wanted[key]) <= 1e-6
            if key in changed
            else same_bits(after[key], wanted[key])
        )
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        p.name for p in made.base_folder.iterdir()
    )
    index, base_index = (json.loads((tmp_path / n / INDEX).read_text()) for n in ("merged", "base"))
    assert index["weight_map"] == base_index["weight_map"]
    assert index["metadata"] == base_index["metadata"]


def test_merging_reads_one_file_at_a_time(shared, tmp_path, monkeypatch):
    source = open_checkpoint(shared.base_folder)
    assert len(source.files) > 3
    events = []
    read, save = checkpoint.Checkpoint.tensor, save_file

    def reading(self, key):
        events.append(key)
        return read(self, key)

    def saving(tensors, path, metadata):
        events.append(set(tensors))
        save(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint.Checkpoint, "tensor", reading)
    monkeypatch.setattr("safetensors.torch.save_file", saving)
    merge(shared.base, shared.adapter, source, tmp_path)
    pending = set()
    for event in events:
        if isinstance(event, set):
            assert event == pending
            pending = set()
        else:
            pending.add(event)
    assert sum(isinstance(event, set) for event in events) == len(source.files)


def test_bf16_is_summed_in_fp32_and_rounded_once(tmp_path):
    made = Trained(tmp_path, dtype=torch.bfloat16)
    exported = export_to(made.folder, "merged", tmp_path / "merged", base=base_of(made))
    assert "logits within" in exported.checks[1]
    before, after = tensors_of(made.base_folder), tensors_of(tmp_path / "merged")
    key = "model.layers.1.mlp.experts.6.up_proj.weight"
    lora = made.adapter.experts["model.layers.1.mlp.experts.gate_up_proj"]
    wanted = before[key].float() + lora.scale * lora.b[6, 16:] @ lora.a[6]
    assert after[key].dtype == torch.bfloat16
    assert torch.equal(after[key], wanted.bfloat16())
    assert not torch.equal(after[key], (before[key] + (wanted - before[key].float()).bfloat16()))


def test_embeddings_saved_modules_and_routers_merge(tmp_path):
    made = Trained(
        tmp_path,
        "mixtral",
        target_modules=["embed_tokens", "o_proj"],
        target_parameters=[*EXPERTS, "mlp.gate.weight"],
        modules_to_save=["lm_head"],
        use_rslora=True,
    )
    export_to(made.folder, "merged", tmp_path / "merged", base=base_of(made))
    before, after = tensors_of(made.base_folder), tensors_of(tmp_path / "merged")
    for key in ("lm_head", "model.embed_tokens", "model.layers.0.block_sparse_moe.gate"):
        assert relative(before[f"{key}.weight"], after[f"{key}.weight"]) > 0.01
    assert relative(logits_of(tmp_path / "merged"), made.logits) <= 1e-5


def test_tied_embeddings_are_not_merged_into_both_ends(tmp_path):
    made = Trained(tmp_path, target_modules=["embed_tokens"], overrides={"tie_word_embeddings": True})
    with pytest.raises(FastexpertsError, match=r"embed_tokens\.weight, which is one tensor with another"):
        export_to(made.folder, "merged", tmp_path / "merged", base=base_of(made), check="weights")
    assert not (tmp_path / "merged").exists()


def test_a_delta_dropped_in_one_expert_is_caught_by_the_weights(shared, tmp_path):
    source = open_checkpoint(shared.base_folder)
    merge(shared.base, shared.adapter, source, tmp_path)
    assert check_merged(shared.base, shared.adapter, source, open_checkpoint(tmp_path)) == 50
    for key in ("model.layers.0.mlp.experts.3.down_proj.weight", "model.norm.weight"):
        file = tmp_path / source.file_of[key]
        good = load_file(file)
        save_file(good | {key: source.tensor(key) * (1.0 if "experts" in key else 1.001)}, file)
        with pytest.raises(FastexpertsError, match=key):
            check_merged(shared.base, shared.adapter, source, open_checkpoint(tmp_path))
        save_file(good, file)


def test_b_read_by_expert_is_caught_by_the_logits(shared, tmp_path, monkeypatch):
    def swapped(base, adapter, source, output):
        wrong = {
            name: dataclasses.replace(
                lora, b=lora.b.permute(1, 2, 0).reshape(-1, 8, 3).permute(1, 0, 2).contiguous()
            )
            for name, lora in adapter.experts.items()
        }
        merge(base, dataclasses.replace(adapter, experts=wrong), source, output)

    monkeypatch.setattr(export, "merge", swapped)
    monkeypatch.setattr(export, "check_merged", lambda *_: 0)
    with pytest.raises(FastexpertsError, match=r"logits .* off those of base and adapter"):
        export_to(shared.folder, "merged", tmp_path / "merged", base=base_of(shared))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_not_kept(shared, tmp_path, monkeypatch):
    def broken(adapter, base, layout, folder):
        experts = {n: dataclasses.replace(lora, a=lora.a + 1e-7) for n, lora in adapter.experts.items()}
        return write(dataclasses.replace(adapter, experts=experts), base, layout, folder)

    write = export.write_adapter
    monkeypatch.setattr(export, "write_adapter", broken)
    with pytest.raises(FastexpertsError, match="unlike what was read"):
        export_to(shared.folder, "per-expert", tmp_path / "out", base=base_of(shared))
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_to_run_needs_another_check(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LOGITS_LIMIT", 1000)
    with pytest.raises(FastexpertsError, match="--check weights"):
        export_to(shared.folder, "merged", tmp_path / "merged", base=base_of(shared))
    assert list(tmp_path.iterdir()) == []
    exported = export_to(shared.folder, "merged", tmp_path / "merged", base=base_of(shared), check="weights")
    assert exported.checks == (
        "50 tensors changed, each within rounding of its sum in fp64; the others bitwise",
    )
    assert relative(logits_of(tmp_path / "merged"), shared.logits) <= 1e-5


def test_comparing_logits_needs_peft(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(FastexpertsError, match=r"fastexperts\[peft\]"):
        export_to(shared.folder, "merged", tmp_path / "merged", base=base_of(shared))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"to": "gguf"}, "'gguf'; it needs one of peft, per-expert, merged"),
        ({"check": "none"}, "'none'; it needs one of logits, weights"),
        ({"base": None}, "names none"),
        ({"base": "/nowhere/at/all"}, "config.json of a transformers model"),
        ({"to": "scattermoe"}, "no layout for adapters"),
        ({"source": "/nowhere", "to": "peft"}, "without adapter_config.json"),
    ],
)
def test_export_refuses(shared, tmp_path, arguments, complaint):
    asked = {"source": shared.folder, "to": "merged", "output": tmp_path / "x", "base": base_of(shared)}
    with pytest.raises(FastexpertsError, match=complaint):
        export_to(**(asked | arguments))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(shared, tmp_path):
    for to in ("peft", "per-expert", "merged"):
        with pytest.raises(FastexpertsError, match="not empty"):
            export_to(shared.folder, to, shared.base_folder, base=base_of(shared))
    (tmp_path / "empty").mkdir()
    export_to(shared.folder, "peft", tmp_path / "empty", base=base_of(shared))
    assert (tmp_path / "empty" / WEIGHTS).is_file()


def test_the_base_is_the_one_that_the_adapter_names(shared, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS).symlink_to(shared.folder / WEIGHTS)
    config = config_of(shared.folder) | {"base_model_name_or_path": base_of(shared)}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    exported = export_to(tmp_path / "adapter", "per-expert", tmp_path / "out")
    assert exported.checks == ("4 experts parameters, read back bitwise",)


def test_the_command_line_exports(shared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "merged"
    arguments = ("export", shared.folder, "--to", "merged", "-o", out, "--base", shared.base_folder)
    code, stdout, stderr = run_cli(monkeypatch, capsys, *arguments)
    assert (code, stderr) == (0, "")
    assert "logits within" in stdout
    assert stdout.endswith(f"Done: {out}\n")
    assert relative(logits_of(out), shared.logits) <= 1e-5
    code, stdout, stderr = run_cli(monkeypatch, capsys, *arguments)
    assert (code, stdout) == (2, "")
    assert "nothing is overwritten" in stderr


STACKED = {
    # Read off examples/convert.py of shawntan/scattermoe: w3 (up) fills the first half, w1 (gate) the second.
    "scattermoe": (
        "mixtral",
        {
            "block_sparse_moe.moe_mlp.experts": ["w3", "w1"],
            "block_sparse_moe.moe_mlp.output_experts": ["w2"],
        },
        "block_sparse_moe",
        "MixtralForCausalLM",
    ),
    # Read off modular_qwen3_moe_fused.py and its conversion in woct0rdho/transformers-qwen3-moe-fused.
    "qwen3-moe-fused": (
        "qwen3_moe",
        {f"mlp.{name}_proj": [f"{name}_proj"] for name in ("gate", "up", "down")},
        "mlp",
        "Qwen3MoeFusedForCausalLM",
    ),
}


@pytest.mark.parametrize("layout", STACKED)
def test_stacked_checkpoints_go_out_and_come_in(tmp_path, layout, monkeypatch, capsys):
    family, stacks, block, architecture = STACKED[layout]
    model = tiny_model(family, "eager")
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    export_to(tmp_path / "base", layout, tmp_path / "stacked")
    base, stacked = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "stacked")
    experts = 4 if family == "mixtral" else 8
    for layer in ("model.layers.0.", "model.layers.1."):
        for stack, parts in stacks.items():
            wanted = [
                torch.cat([base[f"{layer}{block}.experts.{e}.{part}.weight"] for part in parts])
                for e in range(experts)
            ]
            assert torch.equal(stacked[f"{layer}{stack}.weight"], torch.stack(wanted))
    assert not any(f"{block}.experts." in key for key in stacked)
    assert json.loads((tmp_path / "stacked" / "config.json").read_text())["architectures"] == [architecture]
    code, stdout, _ = run_cli(
        monkeypatch, capsys, "import", tmp_path / "stacked", "--from", layout, "-o", tmp_path / "back"
    )
    assert (code, stdout.splitlines()[0]) == (0, f"{2 * len(stacks)} stacks parted, bitwise what they were")
    back = tensors_of(tmp_path / "back")
    assert back.keys() == base.keys()
    assert all(same_bits(tensor, base[key]) for key, tensor in back.items())
    config, base_config = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("back", "base"))
    assert config == base_config
    with torch.no_grad():
        assert torch.equal(logits_of(tmp_path / "back"), model.eval()(tokens()).logits)


def test_a_stacked_adapter_goes_out_and_comes_in(shared, tmp_path):
    per_expert = shared.written("per-expert", tmp_path / "per-expert")
    export_to(shared.folder, "qwen3-moe-fused", tmp_path / "stacked", base=base_of(shared))
    stacked, matrices = load_file(tmp_path / "stacked" / WEIGHTS), load_file(per_expert / WEIGHTS)
    layer = "base_model.model.model.layers.1.mlp"
    for name in ("gate_proj.lora_A", "up_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B"):
        wanted = [matrices[f"{layer}.experts.{e}.{name}.weight"] for e in range(8)]
        assert torch.equal(stacked[f"{layer}.{name}.weight"], torch.stack(wanted))
    assert config_of(tmp_path / "stacked")["target_modules"] == [
        "down_proj",
        "gate_proj",
        "q_proj",
        "up_proj",
    ]
    assert read_adapter(tmp_path / "stacked", shared.base).layout == "qwen3-moe-fused"
    import_from(tmp_path / "stacked", "qwen3-moe-fused", tmp_path / "back", base=base_of(shared))
    a, b = load_file(shared.folder / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert relative(shared.stock(tmp_path / "back"), shared.logits) <= 1e-6
    with pytest.raises(FastexpertsError, match="layout peft"):
        import_from(shared.folder, "qwen3-moe-fused", tmp_path / "again", base=base_of(shared))


def test_a_stacked_checkpoint_with_a_strange_key_raises(tmp_path):
    tiny_model("qwen3_moe", "eager").save_pretrained(tmp_path / "base")
    export_to(tmp_path / "base", "qwen3-moe-fused", tmp_path / "stacked")
    file = tmp_path / "stacked" / "model.safetensors"
    good = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    for bad, complaint in (
        (good | {"model.layers.0.mlp.extra": torch.ones(1)}, "model.layers.0.mlp.extra"),
        ({k: v for k, v in good.items() if k != key}, f"without {key}"),
        (good | {key: good[key][:5].clone()}, rf"{key} \[5, 16, 32\]"),
    ):
        save_file(bad, file)
        with pytest.raises(FastexpertsError, match=complaint):
            import_from(tmp_path / "stacked", "qwen3-moe-fused", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(FastexpertsError, match="of type qwen3_moe, not mixtral"):
        import_from(tmp_path / "stacked", "scattermoe", tmp_path / "out")
    with pytest.raises(FastexpertsError, match="one of scattermoe, qwen3-moe-fused"):
        import_from(tmp_path / "stacked", "megablocks", tmp_path / "out")
