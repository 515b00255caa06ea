"""Adapters train under any plan as PEFT trains them in one process; what is dropped does not depend on the plan."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer

from colledge.models import HuggingFaceCausalLM
from colledge.models.float64 import keep_float64
from colledge.models.lora import StartingValues, is_adapter, peft_config, plain_name
from colledge.parallel import Engine, EngineSettings, OptimizerSettings
from colledge.plan import Plan
from colledge.settings import LoraSettings
from tests.multiproc.test_exactness import Case, _config, _start_weights, _summed_loss, make_batch
from tests.multiproc.workers import Workers

NUM_STEPS, TOLERANCE = 8, 1e-10
OPTIMIZER = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, gradient_clipping=0.5)

SETTINGS = {
    "llama-untied": LoraSettings(rank=4, alpha=8, targets="all-linear"),
    "qwen2-untied": LoraSettings(
        rank=3, targets=("q_proj", "o_proj", "down_proj"), modules_to_save=("lm_head", "norm")
    ),
    "gpt2-tied": LoraSettings(rank=2, targets=("c_attn", "c_proj", "c_fc"), blocks=(1, 2)),
}


def _stage(layers: tuple[int, int], *replicas: tuple[int, dict[str, float]]) -> dict[str, Any]:
    return {
        "layers": layers,
        "replicas": [
            {"samples": n, "shards": [{"device": d, "fraction": f} for d, f in shards.items()]}
            for n, shards in replicas
        ],
    }


def _plans(num_layers: int) -> dict[str, Plan]:
    last = num_layers
    trees: dict[str, list[dict[str, Any]]] = {
        "one device": [_stage((0, last), (4, {"d0": 1.0}))],
        "the embedding alone": [
            _stage((0, 1), (4, {"d2": 1.0})),
            _stage((1, 3), (4, {"d0": 1.0})),
            _stage((3, last), (4, {"d1": 1.0})),
        ],
        "shards": [_stage((0, last), (4, {"d0": 0.75, "d1": 0.25}))],
        "replicas of shards": [
            _stage((0, last), (3, {"d0": 0.75, "d1": 0.25}), (1, {"d2": 0.75, "d3": 0.25}))
        ],
        "replicas before shards": [
            _stage((0, 2), (3, {"d0": 1.0}), (1, {"d1": 1.0})),
            _stage((2, last), (4, {"d2": 0.5, "d3": 0.5})),
        ],
    }
    return {
        name: Plan.model_validate(
            {
                "schema": "colledge/plan/1",
                "num_layers": num_layers,
                "global_batch_size": 8,
                "microbatch_size": 4,
                "stages": stages,
                "recompute": [name == "replicas before shards"] * len(stages),
            }
        )
        for name, stages in trees.items()
    }


PLANS = tuple(_plans(5))


def _structure(model: str, settings: LoraSettings, held: bool = False) -> HuggingFaceCausalLM:
    frozen = "bfloat16" if held else None
    return HuggingFaceCausalLM(_config(model).to_dict(), settings, frozen_precision=frozen)


def _values(structure: HuggingFaceCausalLM, weights: dict[str, Tensor]) -> StartingValues:
    """Return the weights that training begins with; B is not 0, as it would hide faults of A's gradient."""
    generator = torch.Generator().manual_seed(5)
    shapes = structure.adapter_shapes
    second = {
        name: torch.randn(shape, generator=generator).double() / 10
        for name, shape in shapes.items()
        if name.endswith("lora_B.weight")
    }
    first = {name: shape for name, shape in shapes.items() if name not in second}
    return StartingValues({**weights, **second}, first, seed=3)


@cache
def reference(
    model: str, held: bool = False, settings: LoraSettings | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """Train with PEFT in this process; return the losses, and what was trained by its plain name.

    Args:
        model: Which one.
        held: Whether frozen matrices are rounded to bfloat16 before.
        settings: The adapters; by default those of SETTINGS.
    """
    torch.set_num_threads(1)
    settings = settings or SETTINGS[model]
    case = Case(model=model)
    plain, weights = _start_weights(case)
    keep_float64(plain)
    structure = _structure(model, settings)
    values = _values(structure, weights)
    adapted = peft.get_peft_model(plain, peft_config(settings))
    trained = {
        plain_name(name).removeprefix("base_model.model.").replace(".modules_to_save.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in trained.items():
        parameter.data = values[name].double().clone()
    for parameter in adapted.parameters():
        if held and not parameter.requires_grad and parameter.dim() == 2:
            parameter.data = parameter.bfloat16().double()
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), adapted))
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    groups = [
        {
            "params": [p for p in trained.values() if (names[id(p)] in decaying) == decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, OPTIMIZER.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate)
    losses = []
    for index in range(NUM_STEPS):
        batch = make_batch(case, index)
        labels = batch.targets["labels"]
        optimizer.zero_grad()
        loss = _summed_loss(adapted(**batch.inputs).logits, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        assert OPTIMIZER.gradient_clipping is not None
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER.gradient_clipping)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in trained.items()}


def train(
    plan: Plan, model: str, settings: LoraSettings, workers: Workers, held: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    case, structure = Case(model=model), _structure(model, settings, held)
    _, weights = _start_weights(case)
    engine = Engine(
        plan,
        structure,
        _values(structure, weights),
        EngineSettings(optimizer=OPTIMIZER, precision="float64", seed=7),
        workers.ranks,
        workers.wire,
    )
    losses = [engine.train_step(make_batch(case, index)).loss for index in range(NUM_STEPS)]
    layers = engine.state_dict(trained_only=True).values()
    engine.close()
    return losses, {name: tensor for layer in layers for name, tensor in layer.items()}


def _difference(
    one: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]
) -> float:
    assert set(one[1]) == set(other[1])
    losses = [abs(a - b) / abs(b) for a, b in zip(one[0], other[0], strict=True)]
    tensors = [float((t - other[1][n]).abs().max() / other[1][n].abs().max()) for n, t in one[1].items()]
    return max(*losses, *tensors)


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("model", SETTINGS)
def test_adapters_train_as_peft_trains_them(model: str, plan_name: str, workers: Workers) -> None:
    structure = _structure(model, SETTINGS[model])
    plan = _plans(len(structure.layer_names))[plan_name]
    assert _difference(train(plan, model, SETTINGS[model], workers), reference(model)) <= TOLERANCE


@pytest.mark.parametrize("model", SETTINGS)
def test_what_is_dropped_does_not_depend_on_the_plan(model: str, workers: Workers) -> None:
    settings = SETTINGS[model].model_copy(update={"dropout": 0.3})
    plans = _plans(len(_structure(model, settings).layer_names))
    alone, *others = [train(plan, model, settings, workers) for plan in plans.values()]
    for other in others:
        assert _difference(other, alone) <= TOLERANCE
    assert _difference(alone, reference(model)) > 0.01  # something is dropped


@pytest.mark.parametrize("model", SETTINGS)
def test_frozen_weights_held_in_bfloat16_are_widened_for_every_product(model: str, workers: Workers) -> None:
    plan = _plans(len(_structure(model, SETTINGS[model]).layer_names))["replicas before shards"]
    trained = train(plan, model, SETTINGS[model], workers, held=True)
    assert _difference(trained, reference(model, held=True)) <= TOLERANCE
    assert _difference(trained, reference(model)) > 1e-4  # something is rounded


def test_only_adapters_and_modules_to_save_are_sent_back(workers: Workers) -> None:
    model = "qwen2-untied"
    plan = _plans(len(_structure(model, SETTINGS[model]).layer_names))["shards"]
    _, trained = train(plan, model, SETTINGS[model], workers)
    blocks = range(len(_structure(model, SETTINGS[model]).layer_names) - 2)
    norms = {
        f"model.layers.{i}.{name}_layernorm.weight" for i in blocks for name in ("input", "post_attention")
    }
    others = {name for name in trained if not is_adapter(name)}
    assert others == {"lm_head.weight", "model.norm.weight"} | norms  # PEFT looks at how names end
