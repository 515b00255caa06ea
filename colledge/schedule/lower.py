"""From the order of computation to everything a stage does: receives, sends, gradient sync and update.

A receive stands just before the computation that needs it and waits; a send stands just after the computation
that makes it and does not wait. So a stage never waits for a peer to take what it sends, and the order cannot
deadlock as long as the computation order itself can run (`validate` checks that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colledge.plan import Plan
from colledge.schedule.action import Action, ActionKind
from colledge.schedule.generate import compute_order


@dataclass(frozen=True)
class Schedule:
    """Every action of every stage, in order. Prints one stage a line and parses back."""

    stages: tuple[tuple[Action, ...], ...]
    num_microbatches: int

    def __str__(self) -> str:
        """Return one line a stage, actions separated by spaces."""
        return "\n".join(" ".join(str(action) for action in stage) for stage in self.stages)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Return the schedule that `str` printed.

        Raises:
            ValueError: A word is no action.
        """
        stages = tuple(
            tuple(Action.parse(word) for word in line.split())
            for line in text.strip().splitlines()
            if line.strip() and not line.startswith("#")
        )
        numbers = [a.microbatch for stage in stages for a in stage if a.microbatch is not None]
        return cls(stages, max(numbers, default=-1) + 1)

    def in_flight(self, stage: int) -> int:
        """Return the most micro-batches whose activations a stage keeps for their backwards at once."""
        most = alive = 0
        if not has_backwards(self.stages[stage]):
            return 0
        for action in self.stages[stage]:
            if action.kind is ActionKind.FORWARD:
                alive += 1
                most = max(most, alive)
            elif action.kind is ActionKind.BACKWARD:
                alive -= 1
        return most


def has_backwards(actions: Sequence[Action]) -> bool:
    """Return whether a stage with these actions runs backwards."""
    return any(action.kind is ActionKind.BACKWARD for action in actions)


def lower(order: Sequence[Sequence[Action]], num_microbatches: int) -> Schedule:
    """Return the schedule that runs a computation order: receives, sends, SYNC and STEP inserted.

    Gradients are sent to stages that run backwards.
    """
    last = len(order) - 1
    stages = []
    for stage, computations in enumerate(order):
        actions: list[Action] = []
        sends_back = stage > 0 and has_backwards(order[stage - 1])
        for action in computations:
            if action.kind is ActionKind.FORWARD:
                before = ActionKind.RECEIVE_FORWARD if stage > 0 else None
                after = ActionKind.SEND_FORWARD if stage < last else None
            else:
                before = ActionKind.RECEIVE_BACKWARD if stage < last else None
                after = ActionKind.SEND_BACKWARD if sends_back else None
            if before is not None:
                actions.append(Action(before, stage, action.microbatch))
            actions.append(action)
            if after is not None:
                actions.append(Action(after, stage, action.microbatch))
        actions += [Action(ActionKind.SYNC, stage), Action(ActionKind.STEP, stage)]
        stages.append(tuple(actions))
    return Schedule(tuple(stages), num_microbatches)


def plan_schedule(plan: Plan, first_trained: int = 0) -> Schedule:
    """Return the schedule of a plan: what the planner simulates and the engine runs.

    Args:
        plan: The plan.
        first_trained: The model's first layer that trains anything; stages that end there or before run no backwards.
    """
    count = plan.num_microbatches
    return lower(compute_order(plan.warmup_depths(), count, plan.first_backward(first_trained)), count)
