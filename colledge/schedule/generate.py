"""The order in which each stage computes its forwards and backwards.

With S stages, M micro-batches and warm-up depth w_s, stage s runs w_s forwards and then one backward, one
forward in turn (1F1B, PipeDream-flush: Narayanan et al., arXiv 2104.04473). GPipe (Huang et al., arXiv
1811.06965) is the same with w_s = M.

Stages in which, and before which, nothing trains run forwards only.

    S=3, M=4, w=(3,2,1)      stage 0   F0 F1 F2 B0 F3 B1 B2 B3
                             stage 1      F0 F1 B0 F2 B1 F3 B2 B3
                             stage 2         F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

from collections.abc import Sequence

from colledge.schedule.action import Action, ActionKind


def compute_order(
    warmup: Sequence[int], num_microbatches: int, first_backward: int = 0
) -> tuple[tuple[Action, ...], ...]:
    """Return the forwards and backwards of each stage, in order.

    Args:
        warmup: Forwards that each stage runs before its first backward; more than `num_microbatches` means all.
        num_microbatches: Micro-batches in a step.
        first_backward: The first stage that runs backwards; those before it run forwards only.
    """
    order = []
    for stage, depth in enumerate(warmup):
        depth = min(depth, num_microbatches) if stage >= first_backward else num_microbatches
        actions = [Action(ActionKind.FORWARD, stage, m) for m in range(depth)]
        for m in range(num_microbatches if stage >= first_backward else 0):
            actions.append(Action(ActionKind.BACKWARD, stage, m))
            if depth + m < num_microbatches:
                actions.append(Action(ActionKind.FORWARD, stage, depth + m))
        order.append(tuple(actions))
    return tuple(order)
