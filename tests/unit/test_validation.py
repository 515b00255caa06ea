"""The best evaluation and early stopping are those of transformers' Trainer and its callback."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from colledge.report.validation import best_so_far


def theirs(
    losses: list[float], patience: int, threshold: float
) -> tuple[int | None, float | None, int | None]:
    """Return the best step and loss, and the evaluation at which the callback stops, as Trainer's loop calls it."""
    arguments = TrainingArguments(
        output_dir="unused",
        metric_for_best_model="loss",
        greater_is_better=False,
        use_cpu=True,
        save_strategy="steps",
    )
    callback, state, control = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl()
    holder = cast(Any, type("Holder", (), {})())
    holder.args, holder.state = arguments, state
    stopped = None
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        callback.on_evaluate(arguments, state, control, {"eval_loss": loss})
        Trainer._determine_best_metric(holder, {"eval_loss": loss}, None)
        if control.should_training_stop:
            stopped = step
            break
    return state.best_global_step, state.best_metric, stopped


@pytest.mark.parametrize("threshold", [0.0, 0.15])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_best_and_the_stop_are_those_of_transformers(patience: int, threshold: float) -> None:
    generator = random.Random(patience)
    stops = set()
    for _ in range(40):
        losses = [round(generator.uniform(1, 2), 1) for _ in range(8)]
        ours = None
        seen: dict[int, float] = {}
        for step, loss in enumerate(losses, start=1):
            seen[step] = loss
            best = best_so_far(seen, threshold)
            assert best is not None
            ours = best.step, best.loss, step if best.failures >= patience else None
            if ours[2] is not None:
                break
        assert ours == theirs(losses, patience, threshold)
        stops.add(ours[2] if ours is not None else None)
    assert len(stops) > 2


def test_nothing_was_evaluated() -> None:
    assert best_so_far({}) is None
