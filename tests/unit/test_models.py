"""Models as ordered layers: the parts give the whole bit for bit, and what cannot be cut is refused in one line."""

from __future__ import annotations

import copy
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from colledge.errors import ModelError
from colledge.models import HuggingFaceCausalLM, SafetensorsDirectory, Slice, build_model
from colledge.models.float64 import keep_float64
from colledge.models.probe import check_parts
from colledge.models.sharding import unit_range

_COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 3}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "num_key_value_heads": 8,
    "v_head_dim": 8,
}
_EXPERTS = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 16}
_OPT = {"ffn_dim": 42, "max_position_embeddings": 16, "pad_token_id": 1}
# name -> what is not as in most, and into how many units its blocks can be cut
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    **dict.fromkeys(
        ("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "glm", "granite", "llama"), ({}, 4)
    ),
    **dict.fromkeys(("nemotron", "olmo", "phi", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"), ({}, 4)),
    **dict.fromkeys(("gpt_neox", "persimmon"), ({}, 8)),
    **dict.fromkeys(("falcon", "bloom", "ctrl", "moshi", "olmo2"), ({}, 1)),
    "codegen": ({"n_embd": 32, "n_inner": 42, "n_head": 8, "n_positions": 16, "rotary_dim": 4}, 1),
    "deepseek_v2": (
        {**_LATENT, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
        1,
    ),
    "emu3": ({"text_config": {**_COMMON, "attention_dropout": 0.1}, "vq_config": {"base_channels": 32}}, 4),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, 4),
    "falcon, groups": ({"new_decoder_architecture": True, "num_kv_heads": 4}, 4),
    "falcon, ALiBi": ({"alibi": True, "multi_query": False}, 1),
    "gemma": ({"head_dim": 8}, 4),
    "gemma2": ({"head_dim": 8, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 3.0, **_SLIDING}, 4),
    "gemma3_text": ({"head_dim": 8, "final_logit_softcapping": 3.0, **_SLIDING}, 4),
    "gpt2": ({"n_embd": 32, "n_inner": 42, "n_layer": 3, "n_head": 8, "n_positions": 16}, 8),
    "gptj": ({"rotary_dim": 4, "n_positions": 16}, 8),
    "jetmoe": ({"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, 1),
    "llama, dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 4),
    "llama, yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, 4),
    "longcat_flash": ({**_LATENT, "num_hidden_layers": 6, "ffn_hidden_size": 42, **_EXPERTS}, 1),
    "mistral": ({"sliding_window": 3}, 4),
    "mixtral": ({"intermediate_size": 48, "num_local_experts": 4}, 1),
    "openai-gpt": ({"n_embd": 32, "n_head": 8, "n_positions": 16, "n_layer": 3}, 1),
    "opt": (_OPT, 8),
    "opt, projected": ({**_OPT, "word_embed_proj_dim": 16}, 8),
    "opt, norm after": ({**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, 8),
    "qwen2, sliding": ({"use_sliding_window": True, **_SLIDING}, 4),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, 1),
    "rwkv": ({"context_length": 16}, 1),
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, 4),
    "stablelm, head norms": ({"qk_layernorm": True}, 1),
    "xglm": ({"ffn_dim": 42, "max_position_embeddings": 16}, 8),
    "xlstm": ({"num_heads": 4, "num_blocks": 3, "embedding_dim": 32}, 1),
}
MAIN = ("llama", "qwen2", "gpt2")
SHARDED = (*MAIN, "opt", "phi3", "qwen3", "gpt_neox")


class _OneShard:
    """f and g of a replica of one shard."""

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x


def _model(model_type: str, **changes: Any) -> HuggingFaceCausalLM:
    special = KINDS[model_type][0]
    return HuggingFaceCausalLM({**_COMMON, "model_type": model_type.partition(",")[0], **special, **changes})


def _whole(model: HuggingFaceCausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    whole: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**model.spec.config), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms and biases too
    return whole


def _batch() -> tuple[Tensor, Tensor]:
    """Return ids and a mask with padding left and right, and a row of padding only."""
    ids = torch.randint(1, 40, (5, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, :3] = 0
    mask[4] = 0
    return ids, mask


def _composed(model: HuggingFaceCausalLM, whole: torch.nn.Module, cuts: list[int], masked: bool) -> Tensor:
    values = whole.state_dict()  # what routers keep as buffers too
    x, mask = _batch()
    for layers in pairwise(cuts):
        stage, parameters = model.build_stage(layers, torch.float32)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
            x = stage(x, {"attention_mask": mask} if masked else {})
    return x


def _logits(whole: torch.nn.Module, masked: bool) -> Tensor:
    ids, mask = _batch()
    with torch.no_grad():
        output = whole(input_ids=ids, use_cache=False, **({"attention_mask": mask} if masked else {}))
    logits: Tensor = output.logits
    return logits


@pytest.mark.parametrize("cuts", [[0, 5], [0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 4, 5]], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", MAIN)
def test_stages_give_the_whole_model_bit_for_bit(model_type: str, tied: bool, cuts: list[int]) -> None:
    model = _model(model_type, tie_word_embeddings=tied)
    whole = _whole(model)
    assert bool(model.tied) == tied
    for masked in (True, False):
        assert torch.equal(_composed(model, whole, cuts, masked), _logits(whole, masked))


@pytest.mark.parametrize("model_type", KINDS)
def test_any_model_built_so_stays_exact(model_type: str) -> None:
    model = _model(model_type)
    whole = _whole(model)
    assert model.layer_names == ("embedding", "block.0", "block.1", "block.2", "head")
    for cuts, masked in (([0, 1, 2, 3, 4, 5], True), ([0, 1, 2, 3, 4, 5], False), ([0, 2, 4, 5], True)):
        assert torch.equal(_composed(model, whole, cuts, masked), _logits(whole, masked))


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ],
    ids=str,
)
def test_the_variants_of_attention_are_at_work(model_type: str, change: dict[str, Any]) -> None:
    with_it, without = _whole(_model(model_type)), _whole(_model(model_type, **change))
    assert not torch.equal(_logits(with_it, True), _logits(without, True))


@pytest.mark.parametrize("model_type", MAIN)
def test_layers_are_named_in_model_order(model_type: str) -> None:
    model = _model(model_type)
    assert model.layer_names == ("embedding", "block.0", "block.1", "block.2", "head")
    assert model.layer_kinds == ("embedding", "block", "block", "block", "head")
    assert [model.boundary_shape((9,), i) for i in (0, 1)] == [(9,), (9, 32)]
    assert model.shard_units == (8 if model_type == "gpt2" else 4)
    assert build_model(model.spec).layer_names == model.layer_names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", MAIN)
def test_layers_hold_every_parameter_once(model_type: str, tied: bool) -> None:
    model = _model(model_type, tie_word_embeddings=tied)
    wanted = {n: tuple(p.shape) for n, p in _whole(model).named_parameters(remove_duplicate=False)}
    held = [item for i in range(len(model.layer_names)) for item in model.layer_parameters(i).items()]
    assert dict(held) == wanted
    assert len(held) == len(wanted)
    for copy_name, source in model.tied.items():
        assert wanted[copy_name] == wanted[source]


@pytest.mark.parametrize("model_type", MAIN)
def test_a_spec_is_plain_data_without_dropout(model_type: str) -> None:
    model = _model(model_type)  # GPT-2 drops out a tenth where nothing is said
    again = build_model(type(model.spec).model_validate(json.loads(model.spec.model_dump_json())))
    assert again.spec == model.spec
    stage, _ = build_model(model.spec).build_stage((0, 5), torch.float32)
    assert all(m.p == 0 for m in stage.modules() if isinstance(m, torch.nn.Dropout))


@pytest.mark.parametrize("edges", [[0, 3, 4], [0, 1, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("model_type", SHARDED)
def test_uneven_shards_cover_every_entry_once(model_type: str, edges: list[int]) -> None:
    model = _model(model_type)
    if model.shard_units == 8:  # 5/3 of 8 and the like
        edges = [0, *(2 * edge - 1 for edge in edges[1:-1]), 8]
    shards = list(pairwise(edges))
    built = {u: model.build_stage((0, 5), torch.float32, u, _OneShard())[1] for u in shards}
    sharded = 0
    for name, parameter in _whole(model).named_parameters():
        if model.slices(name, shards[0]) is None:
            assert all(model.slices(name, units) is None for units in shards)
            continue
        sharded += 1
        again, count = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for units in shards:
            part = model.slices(name, units)
            assert part is not None
            taken = part.take(parameter.detach())
            assert taken.is_contiguous()
            assert built[units][name].shape == taken.shape
            part.put(again, taken)
            ones = torch.zeros_like(parameter)
            part.put(ones, torch.ones_like(taken))
            count += ones
        assert torch.equal(again, parameter)
        assert torch.equal(count, torch.ones_like(count))
    assert sharded >= 3 * (6 if model_type in MAIN else 4)  # of three blocks; some fuse their projections


def test_a_slice_of_fused_projections_takes_its_part_of_each() -> None:
    whole = torch.arange(12.0).view(1, 12)
    part = Slice(1, ((1, 2), (5, 6), (9, 10)))
    assert part.take(whole).tolist() == [[1.0, 5.0, 9.0]]
    target = torch.zeros_like(whole)
    part.put(target, torch.tensor([[7.0, 8.0, 9.0]]))
    assert target.nonzero()[:, 1].tolist() == [1, 5, 9]


def test_columns_fall_to_the_nearest_unit() -> None:
    assert [unit_range(42, units, 4) for units in ((0, 3), (3, 4))] == [(0, 32), (32, 42)]
    assert unit_range(10, (0, 4), 4) == (0, 10)


@pytest.mark.parametrize(
    ("model_type", "found"),
    [
        ("bert", "shares weights between layers"),
        ("hrm_text", "model.L_module.layers: 16 HrmTextDecoderLayer, model.H_module.layers: 16"),
        ("xlnet", "parameters outside its layers: transformer.mask_emb"),
        ("t5", "T5Config"),
        ("vit", "ViTConfig"),
    ],
)
def test_a_structure_that_is_not_known_is_shown(model_type: str, found: str) -> None:
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    with pytest.raises(ModelError) as refused:
        HuggingFaceCausalLM(config)
    assert found in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_blocks_that_cannot_be_sharded_have_one_unit() -> None:
    model = _model("olmo2")  # it normalises all heads' queries together
    assert model.shard_units == 1
    with pytest.raises(ModelError, match=r"cannot be cut into shards.*plan without tensor parallelism"):
        model.slices("model.layers.0.self_attn.q_proj.weight", (0, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no-such-model"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 33},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    config = {**_COMMON, "model_type": "llama", **changes}
    with pytest.raises(ModelError) as refused:
        HuggingFaceCausalLM(config)
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        HuggingFaceCausalLM.from_directory(tmp_path)
    assert "\n" not in str(refused.value)


# -- the probe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", KINDS)
def test_the_probe_passes_what_is_exact(model_type: str) -> None:
    model = _model(model_type)
    assert model.shard_units == KINDS[model_type][1]
    check_parts(model)


@pytest.mark.parametrize("model_type", MAIN)
def test_the_probe_is_quick_for_large_models(model_type: str) -> None:
    model = HuggingFaceCausalLM({"model_type": model_type})  # 7 billion parameters, for Llama
    began_s = time.process_time()
    check_parts(model)
    assert time.process_time() - began_s < 3  # about 0.3 on an idle machine


class _LeakyBlock(LlamaDecoderLayer):
    """Uses what came into the first block, beside its own input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if self.self_attn.layer_idx == 0:
            kwargs["position_embeddings"][0].first = hidden_states
        output: Tensor = super().forward(hidden_states, **kwargs)
        return output + getattr(kwargs["position_embeddings"][0], "first", torch.zeros(()))


def test_the_probe_sees_what_passes_beside_the_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", _LeakyBlock)
    with pytest.raises(
        ModelError, match=r"'llama' is not exact when it is cut: block\.1 alone does not give"
    ):
        check_parts(_model("llama"))


def test_the_probe_sees_shards_that_are_cut_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colledge.models.sharding._GROUPED", ("query_key_value", "qkv_proj"))
    with pytest.raises(ModelError, match=r"'phi3' is not exact.*shard"):
        check_parts(_model("phi3"))


def test_the_probe_sees_random_numbers() -> None:
    model = HuggingFaceCausalLM({"model_type": "phimoe", "num_hidden_layers": 2})  # it jitters its router
    with pytest.raises(ModelError, match="'phimoe' is not exact when it is cut: it draws random numbers"):
        check_parts(model)


def test_a_model_opened_from_files_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_model("llama").config.to_dict()))
    assert HuggingFaceCausalLM.from_directory(tmp_path).shard_units == 4
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer", _LeakyBlock)
    with pytest.raises(ModelError, match="not exact when it is cut"):
        HuggingFaceCausalLM.from_directory(tmp_path)


# -- float64 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gemma3_text", "cohere", "nemotron", "olmo", "opt"]
)
def test_float64_is_kept_throughout(model_type: str) -> None:
    """In float64 the library's code computes what it does in float32, and rounds nothing to float32 on its way."""
    single = _whole(_model(model_type))
    rounding, kept = copy.deepcopy(single).double(), copy.deepcopy(single).double()
    keep_float64(kept)
    ids = _batch()[0]
    x = torch.randn(5, 9, single.get_input_embeddings().embedding_dim, dtype=torch.float64)  # type: ignore[operator]
    with torch.no_grad():
        assert torch.allclose(kept(input_ids=ids).logits.float(), single(input_ids=ids).logits, atol=1e-5)
        moves = [
            float((model(inputs_embeds=x * (1 + 1e-12)).logits - model(inputs_embeds=x).logits).abs().max())
            for model in (kept, rounding)
        ]
    assert 0 < moves[0] < 1e-10
    if model_type not in ("nemotron", "opt"):  # whose norms and attention are PyTorch's own
        assert moves[1] == 0 or moves[1] > 1e-10


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model in the files that save_pretrained writes."""
    _whole(_model("llama", tie_word_embeddings=True)).save_pretrained(tmp_path)  # type: ignore[operator]
    return tmp_path


def test_saved_files_load_by_name(saved: Path) -> None:
    model = HuggingFaceCausalLM.from_directory(saved)
    weights = SafetensorsDirectory(saved)
    whole = _whole(_model("llama", tie_word_embeddings=True))
    assert set(weights) == {name for name, _ in whole.named_parameters()}
    assert len(weights) == len(set(weights))
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights[name], parameter)
    assert set(model.tied) == {"lm_head.weight"}


def test_weights_in_several_files_load_by_name(tmp_path: Path) -> None:
    whole = _whole(_model("llama"))
    whole.save_pretrained(tmp_path, max_shard_size="20KB")  # type: ignore[operator]
    assert (tmp_path / "model.safetensors.index.json").is_file()
    weights = SafetensorsDirectory(tmp_path)
    assert all(torch.equal(weights[name], parameter) for name, parameter in whole.named_parameters())
    next(iter(tmp_path.glob("model-00002*"))).unlink()
    assert "\n" not in _refusal(lambda: [weights[name] for name in weights])


def _refusal(act: Any) -> str:
    with pytest.raises(ModelError) as refused:
        act()
    return str(refused.value)


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    there = tmp_path / "nowhere"
    for act in (HuggingFaceCausalLM.from_directory, SafetensorsDirectory):
        text = _refusal(lambda act=act: act(there))
        assert str(there) in text
        assert "save_pretrained" in text
        assert "\n" not in text


def test_missing_weights_are_one_line(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    text = _refusal(lambda: SafetensorsDirectory(saved))
    assert "model.safetensors" in text
    assert "\n" not in text


@pytest.mark.parametrize("size", [0, 5, 300, 20_000])
def test_truncated_weights_are_one_line(saved: Path, size: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    text = _refusal(lambda: SafetensorsDirectory(saved))
    assert str(saved) in text
    assert "copy the model again" in text
    assert "\n" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": [1]}', '"text"', '{"weight_map": 3}'])
def test_a_damaged_index_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "\n" not in _refusal(lambda: SafetensorsDirectory(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"text"', "3"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refusal = _refusal(lambda: HuggingFaceCausalLM.from_directory(tmp_path))
    assert "\n" not in refusal
    assert "config.json" in refusal


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert "not pickle" in _refusal(lambda: SafetensorsDirectory(tmp_path))
