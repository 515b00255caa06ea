"""Narrower numbers: products as torch.autocast makes them, frozen weights in two bytes, and what a profile says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from colledge.errors import ConfigError
from colledge.launch.run_config import RunConfig
from colledge.measure.analytic import model_profile_from_config
from colledge.models import HuggingFaceCausalLM
from colledge.records import parse_record
from colledge.settings import LoraSettings

LLAMA = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
IDS = torch.arange(36).reshape(3, 12)


def outputs(model: HuggingFaceCausalLM, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what each layer gives, one stage a layer."""
    x, found = IDS, []
    for index in range(len(model.layer_names)):
        stage, parameters = model.build_stage((index, index + 1), torch.float32)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
            x = stage(x, {})
        found.append(x)
    return found


@CONFIGS
def test_mixed_precision_is_what_autocast_makes_of_the_library_s_model(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    library = AutoModelForCausalLM.from_config(config).eval()
    weights = dict(library.named_parameters(remove_duplicate=False))
    *hidden, logits = outputs(HuggingFaceCausalLM(config.to_dict(), mixed_precision="bfloat16"), weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits.float(), library(input_ids=IDS).logits.float())
    with torch.no_grad():
        assert not torch.equal(logits.float(), library(input_ids=IDS).logits)
    assert {x.dtype for x in hidden} == {torch.float32}  # what goes from stage to stage


@CONFIGS
def test_held_weights_take_half_the_memory_and_the_profile_says_so(config: PretrainedConfig) -> None:
    lora = LoraSettings(rank=2)
    plain, held = (
        HuggingFaceCausalLM(config.to_dict(), lora, frozen_precision=p) for p in (None, "bfloat16")
    )
    for index in range(len(plain.layer_names)):
        _, parameters = held.build_stage((index, index + 1), torch.float32)
        for name, parameter in parameters.items():
            narrow = parameter.dim() == 2 and not parameter.requires_grad
            assert parameter.dtype is (torch.bfloat16 if narrow else torch.float32)
            assert parameter.dtype is held.dtype_of(name, torch.float32)
    before, after = (model_profile_from_config(m, name="m", sequence_length=16).layers for m in (plain, held))
    for whole, half in zip(before, after, strict=True):
        assert half.trainable_parameter_bytes == whole.trainable_parameter_bytes
        assert half.parameter_bytes < 0.6 * whole.parameter_bytes
        assert half.saved_bytes_per_sample <= whole.saved_bytes_per_sample + 16 * 61 * 4
    assert model_profile_from_config(held, name="m", sequence_length=16).frozen_precision == "bfloat16"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"frozen_precision": "bfloat16"}, "frozen_precision is for method: lora"),
        ({"mixed_precision": "bfloat16", "precision": "float64"}, "needs precision: float32, saw float64"),
        ({"mixed_precision": "float16"}, "'bfloat16'"),
    ],
)
def test_precisions_that_do_not_go_together_are_refused(keys: dict[str, str], said: str) -> None:
    run = {"model": "m", "data": {"train": "t.jsonl"}, "pool": "pool.yaml", **keys}
    with pytest.raises(ConfigError, match=said):
        parse_record(RunConfig, run, "run.yaml")
