"""Learning-rate schedules and weight-decay groups are those of Hugging Face's Trainer, under any plan."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Trainer,
    get_scheduler,
)

from colledge.launch.learning_rate import learning_rates
from colledge.models import HuggingFaceCausalLM
from colledge.parallel.setup import build_optimizer, undecayed
from colledge.settings import OptimizerSettings

STEPS = 12


@pytest.mark.parametrize("warmup_steps", [0, 1, 5, STEPS])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_every_step_is_that_of_transformers(schedule: Any, warmup_steps: int) -> None:
    settings = OptimizerSettings(learning_rate=3e-3, schedule=schedule, warmup_steps=warmup_steps)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=settings.learning_rate)
    name = "constant_with_warmup" if schedule == "constant" and warmup_steps else schedule
    scheduler = get_scheduler(name, optimizer, warmup_steps, STEPS)
    theirs = []
    for _ in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert learning_rates(settings, STEPS) == theirs
    assert (theirs[0] == 0) == (warmup_steps > 0)
    assert len(set(theirs)) > 1 or schedule == "constant"


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=24, attention_bias=True),
    "qwen3": Qwen3Config(**SIZES, intermediate_size=24, head_dim=4),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_head=4, n_layer=2, n_positions=16),
    "falcon": FalconConfig(**{**SIZES, "num_key_value_heads": 4}, bias=True),
}


class OneShard:
    """The operators around a sharded region, for a shard that is never run."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    leave = sum_in_place = max_in_place = enter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_what_decays_is_what_trainer_lets_decay_whatever_the_cut(name: str, dtype: torch.dtype) -> None:
    config = MODELS[name]
    whole = AutoModelForCausalLM.from_config(config)
    theirs = set(Trainer.get_decay_parameter_names(cast(Any, None), whole))
    names = {parameter for parameter, _ in whole.named_parameters(remove_duplicate=False)}
    assert theirs < names
    model = HuggingFaceCausalLM(config.to_dict())
    last = len(model.layer_names)
    halves = [(0, 2), (2, last)]
    shards = [None, (0, 1)] if model.shard_units > 1 else [None]
    for stages in ([(0, last)], halves):
        for units in shards:
            decaying = set()
            for layers in stages:
                module, parameters = model.build_stage(
                    layers, dtype, units, None if units is None else OneShard()
                )
                spared = undecayed(parameters, module)
                decaying |= {parameter for parameter, p in parameters.items() if p not in spared}
            assert decaying == theirs, (stages, units)


def test_only_the_first_group_decays() -> None:
    weight, bias = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = build_optimizer(
        OptimizerSettings(learning_rate=0.1, weight_decay=0.5), [weight, bias], {bias}
    )
    for parameter in (weight, bias):
        parameter.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.95, 0.95])
    assert bias.tolist() == [1.0, 1.0]
