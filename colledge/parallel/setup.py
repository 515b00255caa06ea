"""What the coordinator tells a device before the first step: its place in the plan, as plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch import nn

from colledge.models import ModelSpec
from colledge.plan import Plan
from colledge.records import Record
from colledge.settings import BackendName, Emulation, OptimizerSettings, Precision

ParameterGroups = list[dict[str, Any]]  # as torch.optim takes them


class RouteEstimate(Record):
    """The measured route to another device, by which a wait is split into communication and idling."""

    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)


class DeviceSetup(Record):
    """Everything a device needs to take its place: the plan, the model's structure, how to train.

    `deepspeed` is a complete configuration of DeepSpeed. `meeting` names this setup: by it replicas find each other
    where a library wants a process group of its own.
    """

    plan: Plan
    device: str
    ranks: dict[str, int]
    model: ModelSpec
    precision: Precision
    loss: str
    optimizer: OptimizerSettings
    backend: BackendName = "native"
    deepspeed: dict[str, JsonValue] = Field(default_factory=dict)
    meeting: str
    seed: int = 0
    accelerator: str = "cpu"
    threads: int | None = None
    timeout_s: float = Field(gt=0)
    emulations: dict[str, Emulation] = Field(default_factory=dict)
    routes: dict[str, RouteEstimate] = Field(default_factory=dict)


# What `transformers.Trainer.get_decay_parameter_names` looks for in names.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decays(name: str) -> bool:
    """Return whether weight decay reaches a parameter of that name, as far as the name tells."""
    return _UNDECAYED.search(name.lower()) is None


def undecayed(parameters: Mapping[str, nn.Parameter], module: nn.Module) -> frozenset[nn.Parameter]:
    """Return the parameters that weight decay leaves alone, those of Hugging Face's Trainer: biases and norms.

    Args:
        parameters: By their names in the whole model, so that the answer does not depend on the plan.
        module: That holds them.
    """
    norms = {p for part in module.modules() if isinstance(part, nn.LayerNorm) for p in part.parameters()}
    return frozenset(p for name, p in parameters.items() if p in norms or not decays(name))


def build_optimizer(
    settings: OptimizerSettings,
    parameters: Sequence[nn.Parameter],
    without_decay: Set[nn.Parameter] = frozenset(),
) -> torch.optim.Optimizer:
    """Return the PyTorch optimizer of these parameters; some can be left out of weight decay."""
    return make_optimizer(settings, parameter_groups(settings, parameters, without_decay))


def parameter_groups(
    settings: OptimizerSettings, parameters: Sequence[nn.Parameter], without_decay: Set[nn.Parameter]
) -> ParameterGroups:
    """Return the parameters in two groups, with weight decay and without."""
    return [
        {"params": [p for p in parameters if p not in without_decay], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p in without_decay], "weight_decay": 0.0},
    ]


def make_optimizer(settings: OptimizerSettings, groups: ParameterGroups) -> torch.optim.Optimizer:
    """Return the PyTorch optimizer of some groups of parameters."""
    if settings.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
        )
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
