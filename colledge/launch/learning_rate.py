"""The learning rate of every step: the coordinator sends it, so that no device need know how far the run is."""

from __future__ import annotations

import math

from colledge.settings import OptimizerSettings


def learning_rates(settings: OptimizerSettings, steps: int) -> list[float]:
    """Return the rate of each of `steps` steps: those of `transformers.get_scheduler`, which imports all of peft."""
    return [settings.learning_rate * _factor(settings, step, steps) for step in range(steps)]


def _factor(settings: OptimizerSettings, step: int, steps: int) -> float:
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    decay_steps = max(1, steps - warmup)
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return (steps - step) / decay_steps
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / decay_steps)))
