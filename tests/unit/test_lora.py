"""Adapters that do not fit a model are refused in one line that names what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from colledge.errors import ModelError
from colledge.launch.saved_model import write_adapter
from colledge.models import HuggingFaceCausalLM
from colledge.models.lora import peft_name, targets_of
from colledge.settings import LoraSettings

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
TIED = GPT2Config(
    vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
)
LINEARS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (LLAMA, {"targets": ("qq_proj",)}, ["'qq_proj'", "Fix: name some of", LINEARS]),
        (LLAMA, {"targets": ("q_proj", "c_attn")}, ["no linear of the model is called 'c_attn'", LINEARS]),
        (LLAMA, {"targets": ("q_proj", "lm_head")}, ["lm_head lies outside the blocks", "modules_to_save"]),
        (LLAMA, {"modules_to_save": ("score",)}, ["no module 'score'", "embed_tokens", "lm_head"]),
        (LLAMA, {"blocks": (1, 3)}, ["[1, 3]", "blocks 0 to 2"]),
        (
            TIED,
            {"modules_to_save": ("lm_head",)},
            ["lm_head.weight or transformer.wte.weight, which are one"],
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    config: PretrainedConfig, settings: dict[str, object], said: list[str]
) -> None:
    with pytest.raises(ModelError) as refused:
        HuggingFaceCausalLM(config.to_dict(), LoraSettings.model_validate(settings))
    line = str(refused.value)
    assert "\n" not in line
    for part in said:
        assert part in line


def test_blocks_that_train_otherwise_are_of_another_kind() -> None:
    model = HuggingFaceCausalLM(LLAMA.to_dict(), LoraSettings(rank=2, blocks=(1, 2)))
    assert model.layer_kinds == ("embedding", "block", "block.1", "block.1", "head")
    trained = [sum(model.trains(name) for name in model.layer_parameters(index)) for index in range(5)]
    assert trained == [0, 0, 4, 4, 0]  # A and B of q_proj and v_proj, PEFT's choice


def test_all_linears_of_some_blocks_are_adapted_and_the_folder_names_them(tmp_path: Path) -> None:
    settings = LoraSettings(rank=2, targets="all-linear", blocks=(2,))
    structure = HuggingFaceCausalLM(LLAMA.to_dict(), settings)
    assert {name.split(".")[2] for name in structure.adapter_shapes} == {"2"}
    assert targets_of(structure.adapter_shapes) == set(LINEARS.split(", ")) - {"lm_head"}
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(LLAMA)
    whole.save_pretrained(tmp_path / "model")
    values = {name: torch.randn(shape) for name, shape in structure.adapter_shapes.items()}
    write_adapter([values], settings, str(tmp_path / "model"), tmp_path / "model", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(whole, tmp_path / "adapter").state_dict()
    for name, value in values.items():
        path = peft_name(name).replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        assert torch.equal(loaded[path], value)
