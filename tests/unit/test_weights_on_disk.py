"""Weights are read as from_pretrained reads them and written so that it reads them again, or refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, logging

from colledge.errors import ColledgeError, ModelError
from colledge.launch.run import check_weights, read_inputs
from colledge.launch.saved_model import write_model
from colledge.models import HuggingFaceCausalLM, ModelWeights
from colledge.models.weights import SafetensorsFiles

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GROUPED, "tie_word_embeddings": False},
    "tied llama": {"model_type": "llama", **GROUPED, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "rotary_pct": 0.25},
    "mixtral": {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", **EXPERTS},
    "olmoe": {"model_type": "olmoe", **EXPERTS, "num_key_value_heads": 4},
}  # fmt: skip
WITH_BUFFERS = {
    "deepseek_v3": {
        "model_type": "deepseek_v3", **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip
Stored = dict[str, Tensor]


def made(kind: str, folder: Path) -> Path:
    """Write a model with random values, norms too, as save_pretrained writes it."""
    values = dict({**CONFIGS, **WITH_BUFFERS}[kind])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.state_dict().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def change(folder: Path, how: Callable[[Stored], Stored]) -> Path:
    """Write other tensors in place of a folder's."""
    stored = how(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reconfigure(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def opened(folder: Path) -> tuple[HuggingFaceCausalLM, ModelWeights]:
    model = HuggingFaceCausalLM.from_directory(folder, probe=False)
    return model, ModelWeights(folder, model.skeleton())


def theirs(folder: Path) -> Stored:
    """Return what from_pretrained reads; nothing of it may be drawn at random."""
    logging.set_verbosity_error()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    state: Stored = model.state_dict()
    return state


def same(ours: Any, wanted: Stored) -> bool:
    return all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def as_the_hub_has_gpt2(stored: Stored) -> Stored:
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 32, 32).tril() for block in (0, 1)}
    return {name.removeprefix("transformer."): tensor for name, tensor in stored.items()} | masks


def as_the_base_model(stored: Stored) -> Stored:
    return {name.removeprefix("model."): tensor for name, tensor in stored.items()}


def under_the_head(stored: Stored) -> Stored:
    return {"lm_head.weight": stored.pop("model.embed_tokens.weight"), **stored}


def under_both(stored: Stored) -> Stored:
    return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"]}


def another_head(stored: Stored) -> Stored:
    return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].flip(0)}


def another_wrapping(stored: Stored) -> Stored:
    return {
        f"model.{name}" if name.startswith("lm_head") else name: tensor for name, tensor in stored.items()
    }


KINDS: dict[str, tuple[str, Callable[[Stored], Stored]]] = {
    **{kind: (kind, dict) for kind in CONFIGS},
    "gpt2 of the hub": ("gpt2", as_the_hub_has_gpt2),
    "the base model": ("tied llama", as_the_base_model),
    "tied, under the head's name": ("tied llama", under_the_head),
    "tied, under both names": ("tied llama", under_both),
    "tied, two values": ("tied llama", another_head),
    "a head inside the base": ("llama", another_wrapping),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_from_pretrained_and_come_back_from_what_is_written(
    kind: str, tmp_path: Path
) -> None:
    name, how = KINDS[kind]
    folder = change(made(name, tmp_path / "model"), how)
    wanted = theirs(folder)
    model, weights = opened(folder)
    assert set(weights) == set(wanted)
    assert same(weights, wanted)
    assert weights.unexpected == ()

    layers = [
        {n: weights[n] + 1 for n in model.layer_parameters(index) if n not in model.tied}
        for index in range(len(model.layer_names))
    ]
    write_model(layers, weights, tmp_path / "written")
    again = theirs(tmp_path / "written")
    assert set(again) == set(wanted)
    assert same(again, {n: tensor + 1 for n, tensor in wanted.items()})
    assert same(opened(tmp_path / "written")[1], again)
    if name == kind:  # as save_pretrained writes it, to the names
        stored = load_file(folder / "model.safetensors")
        assert {n: t.shape for n, t in load_file(tmp_path / "written" / "model.safetensors").items()} == {
            n: t.shape for n, t in stored.items()
        }


def test_a_model_with_two_values_for_a_tied_weight_trains_them_apart(tmp_path: Path) -> None:
    model, weights = opened(change(made("tied llama", tmp_path), another_head))
    assert model.tied == {}
    assert not weights.ties
    assert model.spec.config["tie_word_embeddings"] is False
    write_model([dict(weights)], weights, tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["tie_word_embeddings"] is False
    assert opened(change(tmp_path, under_both))[0].tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_weights_that_are_no_parameters_are_read_too(tmp_path: Path) -> None:
    folder = made("deepseek_v3", tmp_path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights, wanted = ModelWeights(folder, skeleton), theirs(folder)
    assert any("e_score_correction_bias" in name for name in wanted)
    assert same(weights, wanted)
    assert set(weights.on_disk(wanted)) == set(load_file(folder / "model.safetensors"))


def test_a_whole_file_counts_and_an_index_beside_it_does_not(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(opened(folder)[1], theirs(folder))


def test_a_configuration_may_name_the_file(tmp_path: Path) -> None:
    folder = made("llama", tmp_path / "model")
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    change(folder, another_head)
    reconfigure(folder, transformers_weights="other.safetensors")
    wanted = theirs(folder)
    _, weights = opened(folder)
    assert same(weights, wanted)
    write_model([dict(weights)], weights, tmp_path / "written")
    assert same(theirs(tmp_path / "written"), wanted)
    for name in ("../model/other.safetensors", "other.bin", 3):
        reconfigure(folder, transformers_weights=name)
        assert "transformers_weights" in refusal(lambda: opened(folder))


def test_two_values_of_a_tied_weight_are_seen_whatever_the_file_is_called(tmp_path: Path) -> None:
    folder = made("tied llama", tmp_path)

    def apart(stored: Stored) -> Stored:
        return {**stored, "lm_head.weight": stored["model.embed_tokens.weight"] + 3}

    change(folder, apart)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    reconfigure(folder, transformers_weights="other.safetensors")
    model, weights = opened(folder)
    assert not model.tied
    assert same(weights, theirs(folder))


def test_shards_are_read_whatever_the_index_says_of_their_tensors(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file)
        weight_map |= {part[0]: file, f"no.such.{number}": file}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert same(opened(folder)[1], theirs(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: is not there" in refusal(lambda: opened(folder))


def test_what_the_model_has_no_place_for_is_said(tmp_path: Path) -> None:
    folder = change(made("llama", tmp_path), lambda stored: {**stored, "value_head.weight": torch.ones(2)})
    (note,) = opened(folder)[1].notes()
    assert "value_head.weight" in note


def test_the_written_configuration_names_the_type_that_holds_every_number(tmp_path: Path) -> None:
    folder = made("llama", tmp_path / "model")
    _, weights = opened(folder)
    mixed = {n: t if "norm" in n else t.to(torch.bfloat16) for n, t in weights.items()}
    write_model([mixed], weights, tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["dtype"] == "float32"
    assert same(theirs(tmp_path / "written"), {name: tensor.float() for name, tensor in mixed.items()})


# -- refused -------------------------------------------------------------------------------------------------------


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(ModelError) as refused:
        act()
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def without(*names: str) -> Callable[[Stored], Stored]:
    return lambda stored: {name: tensor for name, tensor in stored.items() if name not in names}


def with_value(value: float, name: str = "model.norm.weight") -> Callable[[Stored], Stored]:
    return lambda stored: {**stored, name: torch.full_like(stored[name], value)}


def with_type(dtype: torch.dtype) -> Callable[[Stored], Stored]:
    return lambda stored: {n: t.to(dtype) if "proj" in n else t for n, t in stored.items()}


NORM, EXPERT = "model.norm.weight", "model.layers.0.block_sparse_moe.experts.1.w1.weight"
SPOILT: dict[str, tuple[str, Callable[[Stored], Stored], str]] = {
    "nothing": ("llama", lambda _: {"x": torch.ones(1)}, "21 of the model's 21 weights are in none"),
    "missing": ("llama", without(NORM, "lm_head.weight"), f"2 of the model's 21 weights .* {NORM}, lm_head.weight"),
    "tied, neither": ("tied llama", without("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "an expert": ("mixtral", without(EXPERT), r"gate_up_proj'? .*|do not make"),
    "a shape": ("llama", lambda s: {**s, NORM: torch.ones(31)}, rf"{NORM}' has shape \[31\], .* wants \[32\]"),
    "NaN": ("llama", with_value(float("nan")), f"{NORM}' holds NaN"),
    "infinity": ("llama", with_value(-float("inf")), f"{NORM}' holds infinity"),
    "NaN in an expert": (
        "qwen3_moe", with_value(float("nan"), "model.layers.0.mlp.experts.1.up_proj.weight"), "experts.1.up_proj.*NaN"
    ),
    "8-bit floats": ("llama", with_type(torch.float8_e4m3fn), "stored as F8_E4M3; .* not quantised"),
    "integers": ("llama", with_type(torch.int8), "stored as I8; .* not quantised"),
    "fp8 scales": (
        "llama", lambda s: {**s, "model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)},
        "weight_scale_inv .*quantised",
    ),
    "GPTQ": ("llama", lambda s: {n.replace("proj.weight", "proj.qweight"): t for n, t in s.items()}, "qweight .*quant"),
    "bitsandbytes": ("llama", lambda s: {**s, "model.layers.0.mlp.up_proj.weight.absmax": s[NORM]}, "absmax .*quant"),
    "mxfp4": ("llama", lambda s: {**s, "model.layers.0.mlp.experts.gate_up_proj_blocks": s[NORM]}, "_blocks .*quant"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_are_not_whole_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    name, how, said = SPOILT[kind]
    folder = change(made(name, tmp_path), how)
    with pytest.raises(ModelError, match=said):
        opened(folder)[1].check_values()
    refusal(lambda: opened(folder)[1].check_values())


def test_files_that_are_not_whole_are_found_before_devices_start(tmp_path: Path) -> None:
    folder = made("llama", tmp_path / "model")
    (tmp_path / "pool.yaml").write_text("devices: [{id: d0}]\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {folder}\ndata: {{train: x.jsonl}}\npool: pool.yaml\noutput: {tmp_path / 'out'}\n"
    )
    change(folder, lambda stored: {**stored, "more.weight": torch.ones(1)})
    inputs = read_inputs(tmp_path / "run.yaml", with_data=False)  # as for profiling
    assert any("more.weight" in note for note in inputs.notes)
    check_weights(inputs, Console())
    change(folder, with_value(float("nan")))
    assert NORM in refusal(lambda: check_weights(inputs, Console()))
    change(folder, without(NORM))
    assert NORM in refusal(lambda: read_inputs(tmp_path / "run.yaml", with_data=False))


@pytest.mark.parametrize("kind", ["llama", "tied llama"])
def test_a_start_reads_every_tensor_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(kind, tmp_path / "model")
    (tmp_path / "pool.yaml").write_text("devices: [{id: d0}]\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {folder}\ndata: {{train: x.jsonl}}\npool: pool.yaml\noutput: {tmp_path / 'out'}\n"
    )
    names: list[str] = []
    read = SafetensorsFiles.read

    def noted(self: SafetensorsFiles, some: Iterable[str]) -> Stored:
        names.extend(some := list(some))
        return read(self, some)

    monkeypatch.setattr(SafetensorsFiles, "read", noted)
    check_weights(read_inputs(tmp_path / "run.yaml", with_data=False), Console())
    assert sorted(names) == sorted(load_file(folder / "model.safetensors"))


def test_a_quantised_configuration_is_refused_with_its_method(tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    for settings, method in (({"quant_method": "awq", "bits": 4}, "awq"), ({"load_in_4bit": True}, "4bit")):
        reconfigure(folder, quantization_config=settings)
        assert method in refusal(lambda: opened(folder))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": {"base_model_name_or_path": "my/base"}}, "an adapter of my/base"),
        ({"adapter_config.json": {}}, "an adapter of a model that it does not name"),
        ({"state.json": {"schema": "colledge/checkpoint/1"}}, "a checkpoint of a run"),
        ({"job.json": {}}, "the output of a run"),
        ({"model.gguf": {}}, "GGUF"),
        ({"notes.txt": {}}, r"no config\.json there"),
    ],
)
def test_a_folder_of_something_else_is_named(files: dict[str, object], said: str, tmp_path: Path) -> None:
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ModelError, match=said):
        HuggingFaceCausalLM.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("model.fp16.safetensors", r"it holds model\.fp16\.safetensors"),
        ("consolidated.safetensors", r"it holds consolidated\.safetensors"),
        ("pytorch_model.bin", "it holds pickled files"),
        ("model-q4.gguf", "it holds GGUF files"),
    ],
)
def test_files_that_are_not_read_are_named(there: str, said: str, tmp_path: Path) -> None:
    folder = made("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / there)
    with pytest.raises(ModelError, match=said):
        opened(folder)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../other/model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "model.bin"},
        {"a": 3},
        {"a": ["model.safetensors"]},
        {"a": "x.safetensors", "b": 3},
        {},
        [],
    ],
)
def test_an_index_names_files_of_its_own_folder_alone(weight_map: object, tmp_path: Path) -> None:
    folder = made("llama", tmp_path / "model")
    shutil.copytree(folder, tmp_path / "other")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json" in refusal(lambda: opened(folder))


def test_a_damaged_header_never_gives_other_weights(tmp_path: Path) -> None:
    """A header of a few hundred bytes, with one byte changed anywhere: refused, or a name that is then missing."""
    folder = made("llama", tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    wanted = theirs(folder)
    model = HuggingFaceCausalLM.from_directory(folder, probe=False)
    skeleton = model.skeleton()
    length = struct.unpack("<Q", whole[:8])[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        place = int(torch.randint(8 + length, (), generator=generator))
        damaged = bytearray(whole)
        damaged[place] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(damaged)
        try:
            weights = ModelWeights(folder, skeleton)
            weights.check_values()
        except ColledgeError:
            continue
        assert same(weights, wanted)


def test_the_configuration_of_a_written_model_is_one_that_loads(tmp_path: Path) -> None:
    folder = made("gpt2", tmp_path / "model")
    _, weights = opened(folder)
    write_model([dict(weights)], weights, tmp_path / "written")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "written"), PretrainedConfig)
