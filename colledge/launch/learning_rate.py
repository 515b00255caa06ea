"""The learning rate of every step: the coordinator sends it, so that no device need know how far the run is."""

from __future__ import annotations

import torch
from transformers import get_scheduler

from colledge.settings import OptimizerSettings

_NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def learning_rates(settings: OptimizerSettings, steps: int) -> list[float]:
    """Return the rate of each of `steps` steps, as `transformers.get_scheduler` gives it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    scheduler = get_scheduler(_NAMES[settings.schedule], optimizer, settings.warmup_steps, steps)
    (factor,) = scheduler.lr_lambdas
    return [settings.learning_rate * factor(step) for step in range(steps)]
