"""What is exported and generated from: merged adapters are PEFT's; nothing that is missing is made up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from colledge.errors import ConfigError, ModelError
from colledge.launch.exporting import export
from colledge.launch.generating import generate
from colledge.launch.inputs import check_output
from colledge.launch.job import Job, OutputFolder
from colledge.launch.run_config import RunConfig, load_pool
from colledge.launch.saved_model import write_adapter, write_model
from colledge.models import HuggingFaceCausalLM, ModelWeights, SafetensorsDirectory, WeightWriter
from colledge.models.lora import peft_name
from colledge.parallel.checkpoint import CheckpointState

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


# -- files that are not whole --------------------------------------------------------------------------------------

FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]


def change(file: Path, how: Callable[[Tensors], Tensors]) -> None:
    """Write other tensors in place of a file's."""
    tensors = {name: tensor.clone() for name, tensor in how(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def with_tokenizer(folder: Path) -> None:
    words = {f"w{number}": number for number in range(61)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w1"
    )
    tokenizer.save_pretrained(folder)


def refusals(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


SPOILT: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != FACTOR}, "q_proj.lora_A"),
    "no adapter's": (lambda t: {**t, "base_model.model.model.extra.lora_A.weight": torch.ones(2, 2)}, "extra.lora_A"),
    "of another rank": (lambda t: {**t, FACTOR: torch.ones(5, 32)}, "q_proj.lora_A"),
    "NaN": (lambda t: {**t, FACTOR: t[FACTOR] * float("nan")}, "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_adapters_that_are_not_whole_are_neither_merged_nor_tried(kind: str, tmp_path: Path) -> None:
    adapted(tmp_path, "llama")
    out, (how, said) = tmp_path / "out", SPOILT[kind]
    with_tokenizer(out / "adapter")
    assert generate(out, "w3 w4", 2, chat=False) is not None
    change(out / "adapter" / "adapter_model.safetensors", how)
    assert said in refusals(lambda: generate(out, "w3 w4", 2, chat=False))
    assert said in refusals(lambda: export(out, tmp_path / "merged", merge=True))
    assert not (tmp_path / "merged").exists()


def test_nothing_is_generated_by_weights_that_nobody_stored(tmp_path: Path) -> None:
    model = base("llama", tmp_path)
    with_tokenizer(model)
    said = generate(model, "w3 w4", 3, chat=False)
    assert generate(model, "w3 w4", 3, chat=False) == said
    whole = (model / "model.safetensors").read_bytes()
    for how, line in (
        (lambda t: {n: v for n, v in t.items() if n != NORM}, NORM),
        (lambda t: {**t, NORM: torch.ones(31)}, NORM),
        (lambda t: {**t, NORM: t[NORM] * float("inf")}, "infinity"),
    ):
        change(model / "model.safetensors", how)
        assert line in refusals(lambda: generate(model, "w3 w4", 3, chat=False))
        (model / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"base_model_name_or_path": 3}, "adapter"),
        ({"r": "eight"}, "adapter"),
        ({"r": 0}, "adapter"),
        ({"peft_type": "NO_SUCH"}, "adapter"),
        ({"target_modules": [["q_proj"]]}, "adapter"),
        ({"target_modules": ["no_such"]}, "no_such"),
        ({"alpha_pattern": 3}, "adapter"),
    ],
)
def test_a_malformed_adapter_config_is_one_line(values: dict[str, object], said: str, tmp_path: Path) -> None:
    adapted(tmp_path, "llama")
    adapter = tmp_path / "out" / "adapter"
    with_tokenizer(adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert said in refusals(lambda: generate(adapter, "w3 w4", 2, chat=False))


def checkpoint(out: Path, step: int, values: Tensors) -> Path:
    """Write a checkpoint of one file, as a run leaves it."""
    folder = out / f"checkpoint-{step}"
    folder.mkdir()
    state = {f"{name}@exp_avg": tensor.clone() for name, tensor in values.items()}
    save_file({**values, **state}, folder / "all.safetensors")
    digest = hashlib.sha256((folder / "all.safetensors").read_bytes()).hexdigest()
    (folder / "state.json").write_text(
        CheckpointState(step=step, seed=0, files={"all.safetensors": digest}).to_json()
    )
    return folder


def test_an_older_checkpoint_is_exported_with_a_word_on_the_newer_one(tmp_path: Path) -> None:
    model = base("llama", tmp_path / "base")
    job(tmp_path, model)
    out, values = tmp_path / "out", load_file(model / "model.safetensors")
    checkpoint(out, 2, {name: tensor + 2 for name, tensor in values.items()})
    newest = checkpoint(out, 4, {name: tensor + 4 for name, tensor in values.items()})
    assert export(out, tmp_path / "whole", merge=False).passed_over == ()
    with (newest / "all.safetensors").open("ab") as file:
        file.write(b"more")
    trained = export(out, tmp_path / "older", merge=False)
    assert trained.found == out / "checkpoint-2"
    (fault,) = trained.passed_over
    assert str(newest) in fault
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "older")
    assert torch.equal(again.model.norm.weight, values[NORM] + 2)
    assert torch.equal(
        again.lm_head.weight, values["model.embed_tokens.weight"] + 2
    )  # tied: both of the checkpoint
    assert torch.equal(trained.weights()["lm_head.weight"], values["model.embed_tokens.weight"] + 2)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: {n: v for n, v in t.items() if n != NORM}, f"holds no '{NORM}'"),
        (lambda t: {**t, "model.more.weight": torch.ones(1)}, "model.more.weight"),
        (lambda t: {**t, NORM: torch.ones(31)}, r"has shape \[31\]"),
        (lambda t: {**t, NORM: t[NORM] * float("nan")}, "holds NaN"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_exported(
    how: Callable[[Tensors], Tensors], said: str, tmp_path: Path
) -> None:
    model = base("llama", tmp_path / "base")
    job(tmp_path, model)
    checkpoint(tmp_path / "out", 2, how(load_file(model / "model.safetensors")))
    with pytest.raises(ModelError, match=said):
        export(tmp_path / "out", tmp_path / "new", merge=False)
    assert not (tmp_path / "new").exists()


def test_a_run_writes_over_nothing_that_it_reads(tmp_path: Path) -> None:
    made = job(tmp_path, base("llama", tmp_path / "out" / "model")).run
    out, other = tmp_path / "out", tmp_path / "base"
    for run, model, said in (
        ({"output": out}, out / "model", "model is"),
        ({"output": out}, out / "model" / "inner", "model is"),
        ({"output": out}, out / "adapter", "model is"),
        ({"output": other}, other, "the model's own folder"),
        ({"output": out, "data": {"train": out / "model" / "x.jsonl"}}, other, "data.train is"),
        ({"output": out, "data": {"train": out / "metrics.jsonl"}}, other, "data.train is"),
        (
            {
                "output": out,
                "evaluate_every": 1,
                "data": {"train": "x.jsonl", "validation": out / "adapter" / "x.jsonl"},
            },
            other,
            "data.validation is",
        ),
    ):
        changed = RunConfig.model_validate({**made.model_dump(), **run})
        assert said in refusals(lambda changed=changed, model=model: check_output(changed, model))
    for output in (tmp_path / "another", tmp_path, other / "out"):
        check_output(made.model_copy(update={"output": output}), other)
