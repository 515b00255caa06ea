"""What the coordinator tells a device before the first step: its place in the plan, as plain data."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from colledge.models import ModelSpec, Precision
from colledge.plan import Plan
from colledge.records import Record


class OptimizerSettings(Record):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) or SGD, with PyTorch's names and defaults.

    `gradient_clipping` bounds the 2-norm of all gradients of the model together; None leaves them.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0)
    gradient_clipping: float | None = Field(default=None, gt=0)

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the PyTorch optimizer for these parameters."""
        fused = all(p.is_floating_point() for p in parameters) and bool(parameters)
        if self.name == "adamw":
            return torch.optim.AdamW(
                parameters,
                lr=self.learning_rate,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                fused=fused,
            )
        return torch.optim.SGD(
            parameters,
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=fused,
        )

    @property
    def state_factor(self) -> float:
        """Bytes of optimizer state for every byte of trainable parameter."""
        if self.name == "adamw":
            return 2.0
        return 1.0 if self.momentum else 0.0


class Emulation(Record):
    """A slower device to rehearse: computing takes `slowdown` times as long, sends are held back."""

    slowdown: float = Field(default=1.0, ge=1)
    bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    latency_s: float = Field(default=0.0, ge=0)


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
    accelerator: str = "cpu"
    threads: int | None = None
    timeout_s: float = Field(gt=0)
    emulations: dict[str, Emulation] = Field(default_factory=dict)
    routes: dict[str, RouteEstimate] = Field(default_factory=dict)
