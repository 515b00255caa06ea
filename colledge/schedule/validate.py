"""Is a schedule one that can run? Order, completeness, deadlock; the error prints the grid, the fault marked."""

from __future__ import annotations

from colledge.errors import PlanError
from colledge.schedule.action import Action, ActionKind
from colledge.schedule.lower import Schedule, has_backwards

_SENT_AS = {
    ActionKind.RECEIVE_FORWARD: (ActionKind.SEND_FORWARD, -1),
    ActionKind.RECEIVE_BACKWARD: (ActionKind.SEND_BACKWARD, +1),
}
_NEEDS = {  # what must have happened on the same stage before
    ActionKind.BACKWARD: ActionKind.FORWARD,
    ActionKind.SEND_FORWARD: ActionKind.FORWARD,
    ActionKind.SEND_BACKWARD: ActionKind.BACKWARD,
}


def validate(schedule: Schedule) -> None:
    """Check that every stage computes every micro-batch once, in order, and that no stage waits for ever.

    The first stages may run forwards only: nothing trains there.

    Raises:
        PlanError: What is wrong, with the grid of actions and the fault between `>` and `<`.
    """
    trains = False
    for stage, actions in enumerate(schedule.stages):
        trains = trains or has_backwards(actions)
        _check_stage(schedule, stage, actions, trains)
    _check_progress(schedule)


def _check_stage(schedule: Schedule, stage: int, actions: tuple[Action, ...], trains: bool) -> None:
    last = len(schedule.stages) - 1
    done: set[Action] = set()
    for position, action in enumerate(actions):
        fault = ""
        if action.stage != stage:
            fault = f"stands on stage {stage}"
        elif action in done:
            fault = "appears twice"
        elif action.kind in _NEEDS and Action(_NEEDS[action.kind], stage, action.microbatch) not in done:
            fault = f"comes before {_NEEDS[action.kind].value}{action.microbatch}@{stage}"
        elif (
            action.kind is ActionKind.FORWARD
            and stage > 0
            and Action(ActionKind.RECEIVE_FORWARD, stage, action.microbatch) not in done
        ) or (
            action.kind is ActionKind.BACKWARD
            and stage < last
            and Action(ActionKind.RECEIVE_BACKWARD, stage, action.microbatch) not in done
        ):
            fault = "comes before its receive"
        if fault:
            raise PlanError(f"{action} {fault}.\n{_grid(schedule, {stage: position})}")
        done.add(action)
    for microbatch in range(schedule.num_microbatches):
        for kind in (ActionKind.FORWARD, ActionKind.BACKWARD)[: 1 + trains]:
            if Action(kind, stage, microbatch) not in done:
                raise PlanError(f"{Action(kind, stage, microbatch)} is missing.\n{_grid(schedule, {})}")
    if [action.kind for action in actions[-2:]] != [ActionKind.SYNC, ActionKind.STEP]:
        raise PlanError(f"stage {stage} does not end with SYNC and STEP.\n{_grid(schedule, {})}")


def _check_progress(schedule: Schedule) -> None:
    """Run the schedule with sends that never wait and receives that wait for their send."""
    position = [0] * len(schedule.stages)
    sent: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(schedule.stages):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if action.kind in _SENT_AS:
                    kind, offset = _SENT_AS[action.kind]
                    if Action(kind, stage + offset, action.microbatch) not in sent:
                        break
                sent.add(action)
                position[stage] += 1
                moved = True
    stuck = {s: p for s, p in enumerate(position) if p < len(schedule.stages[s])}
    if stuck:
        waiting = ", ".join(str(schedule.stages[s][p]) for s, p in stuck.items())
        raise PlanError(f"deadlock: {waiting} wait for ever.\n{_grid(schedule, stuck)}")


def _grid(schedule: Schedule, marks: dict[int, int]) -> str:
    lines = []
    for stage, actions in enumerate(schedule.stages):
        words = [str(action) for action in actions]
        if stage in marks:
            words[marks[stage]] = f">{words[marks[stage]]}<"
        lines.append(f"stage {stage} | " + " ".join(words))
    return "\n".join(lines)
