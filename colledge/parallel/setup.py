"""What the coordinator tells a device before the first step: its place in the plan, as plain data."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from colledge.models import ModelSpec
from colledge.plan import Plan
from colledge.records import Record
from colledge.settings import Emulation, OptimizerSettings, Precision


class RouteEstimate(Record):
    """The measured route to another device, by which a wait is split into communication and idling."""

    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)


class DeviceSetup(Record):
    """Everything a device needs to take its place: the plan, the model's structure, how to train."""

    plan: Plan
    device: str
    ranks: dict[str, int]
    model: ModelSpec
    precision: Precision
    loss: str
    optimizer: OptimizerSettings
    seed: int = 0
    accelerator: str = "cpu"
    threads: int | None = None
    timeout_s: float = Field(gt=0)
    emulations: dict[str, Emulation] = Field(default_factory=dict)
    routes: dict[str, RouteEstimate] = Field(default_factory=dict)


def build_optimizer(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the PyTorch optimizer of these parameters."""
    fused = bool(parameters)
    groups = [{"params": parameters}]  # which may be empty: a stage may be all frozen
    if settings.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=fused,
    )
