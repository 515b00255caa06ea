"""What losses on the validation data decide: which step was the best, and when to stop early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BestSoFar:
    """The lowest loss and its step; `failures` counts the evaluations in a row that were not low enough."""

    step: int
    loss: float
    failures: int


def best_so_far(losses: Mapping[int, float], threshold: float = 0.0) -> BestSoFar | None:
    """Return the best of some evaluations, None of none; they count as in transformers' EarlyStoppingCallback.

    Args:
        losses: By step.
        threshold: How much lower than the best before it a loss must be not to count as a failure. The best is the
            lowest, by however little.
    """
    best: BestSoFar | None = None
    for step, loss in sorted(losses.items()):
        if best is None:
            best = BestSoFar(step, loss, 0)
            continue
        failures = 0 if best.loss - loss > threshold else best.failures + 1
        lower = (step, loss) if loss < best.loss else (best.step, best.loss)
        best = BestSoFar(*lower, failures)
    return best
