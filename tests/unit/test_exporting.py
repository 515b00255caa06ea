"""What is exported: merged adapters are those that PEFT merges; large models come in several files."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from colledge.errors import ConfigError
from colledge.launch.exporting import export
from colledge.launch.job import Job, OutputFolder
from colledge.launch.run_config import load_pool
from colledge.launch.saved_model import write_adapter, write_model
from colledge.models import HuggingFaceCausalLM, ModelWeights, SafetensorsDirectory, WeightWriter
from colledge.models.lora import peft_name

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0),
}  # fmt: skip
IDS = torch.arange(24).reshape(2, 12)


def base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def job(folder: Path, model: Path, **run: object) -> Job:
    (folder / "pool.yaml").write_text("devices: [{id: d0}]\n")
    made = Job.model_validate(
        {
            "kind": "train",
            "run": {"model": str(model), "data": {"train": "x.jsonl"}, "pool": "pool.yaml", **run},
            "pool": load_pool(folder / "pool.yaml"),
            "model": model,
            "devices": ("d0",),
            "output": folder / "out",
        }
    )
    output = OutputFolder(folder / "out")
    output.create()
    output.job.write_text(made.to_json())
    return made


def adapted(folder: Path, kind: str) -> tuple[Job, torch.nn.Module]:
    """Write the folder of a run that trained an adapter; return its job and the same model by PEFT."""
    model = base(kind, folder / "base")
    lora = {"rank": 3, "alpha": 12, "targets": "all-linear"}
    made = job(folder, model, method="lora", lora=lora)
    structure = HuggingFaceCausalLM.from_directory(model, made.run.adapters)
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(s, generator=generator) for n, s in structure.adapter_shapes.items()}
    assert made.run.adapters is not None
    write_adapter([values], made.run.adapters, str(model), model, folder / "out" / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), folder / "out" / "adapter"
    )
    state = peft.get_peft_model_state_dict(loaded)
    assert set(state) == {peft_name(name) for name in values}
    assert all(torch.equal(state[peft_name(name)], value) for name, value in values.items())
    return made, loaded


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merged_model_is_the_one_that_peft_merges(kind: str, tmp_path: Path) -> None:
    _, loaded = adapted(tmp_path, kind)
    export(tmp_path / "out", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(loaded), atol=1e-4)
    assert not torch.allclose(
        logits(merged), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), atol=1e-1
    )
    theirs = loaded.merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, theirs.get_parameter(name), atol=1e-5), name


def test_without_merging_the_adapter_folder_is_written_again(tmp_path: Path) -> None:
    _, loaded = adapted(tmp_path, "llama")
    export(tmp_path / "out", tmp_path / "again", merge=False)
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again"
    )
    assert torch.equal(logits(again), logits(loaded))


def test_a_large_model_comes_in_several_files(tmp_path: Path) -> None:
    model = base("llama", tmp_path / "base")
    tensors = SafetensorsDirectory(model)
    writer = WeightWriter(tmp_path, most_bytes=10_000)
    for name in tensors:
        writer.add({name: tensors[name]})
    writer.finish()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(model)))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensors[name].nbytes for name in tensors)


def test_a_whole_model_is_exported_and_has_nothing_to_merge(tmp_path: Path) -> None:
    model = base("llama", tmp_path / "base")
    job(tmp_path, model)
    trained = SafetensorsDirectory(model)
    source = ModelWeights(model, HuggingFaceCausalLM.from_directory(model, probe=False).skeleton())
    write_model([{name: trained[name] * 2 for name in trained}], source, tmp_path / "out" / "model")
    export(tmp_path / "out", tmp_path / "copy", merge=False)
    config = AutoConfig.from_pretrained(tmp_path / "copy")
    assert isinstance(config, PretrainedConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(again.model.embed_tokens.weight, trained["model.embed_tokens.weight"] * 2)
    for merge, target, said in ((True, "new", "no adapter to merge"), (False, "copy", "is there already")):
        with pytest.raises(ConfigError, match=said):
            export(tmp_path / "out", tmp_path / target, merge)
    with pytest.raises(ConfigError, match=r"holds no job\.json"):
        export(tmp_path, tmp_path / "new", merge=False)
