"""Schedules as data: golden texts, round trips, and errors that show the fault in the grid."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colledge.errors import PlanError
from colledge.plan import Plan
from colledge.schedule import Action, ActionKind, Schedule, compute_order, lower, plan_schedule, validate

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules"


@pytest.mark.parametrize(
    ("name", "warmup", "num_microbatches", "first_backward"),
    [
        ("gpipe", (3, 3, 3), 3, 0),
        ("1f1b", (3, 2, 1), 4, 0),
        ("1f1b-odd-warmup", (5, 3, 1), 6, 0),
        ("1f1b-frozen-prefix", (3, 2, 1), 4, 1),
        ("1f1b-last-stage-trains", (3, 2, 1), 2, 2),
        ("nothing-trains", (3, 2, 1), 2, 3),
    ],
)
def test_golden_schedules(
    name: str, warmup: tuple[int, ...], num_microbatches: int, first_backward: int
) -> None:
    text = (GOLDEN / f"{name}.txt").read_text()
    schedule = lower(compute_order(warmup, num_microbatches, first_backward), num_microbatches)
    assert str(schedule).splitlines() == text.splitlines()[1:]
    assert Schedule.parse(text) == schedule


@given(
    depths=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda d: tuple(sorted(d, reverse=True))),
    num_microbatches=st.integers(1, 6),
    first_backward=st.integers(0, 4),
)
def test_falling_warmups_run_and_round_trip(
    depths: tuple[int, ...], num_microbatches: int, first_backward: int
) -> None:
    schedule = lower(compute_order(depths, num_microbatches, first_backward), num_microbatches)
    validate(schedule)
    assert Schedule.parse(str(schedule)) == schedule
    for stage, depth in enumerate(depths):
        kinds = {action.kind for action in schedule.stages[stage]}
        backward = stage >= first_backward
        assert schedule.in_flight(stage) == (min(depth, num_microbatches) if backward else 0)
        assert (ActionKind.BACKWARD in kinds) == backward
        assert (ActionKind.SEND_BACKWARD in kinds) == (stage > first_backward)
        assert (ActionKind.RECEIVE_BACKWARD in kinds) == (backward and stage < len(depths) - 1)


@pytest.mark.parametrize("text", ["F3@1", "SEND_F0@2", "RECV_B11@0", "SYNC@1", "STEP@0"])
def test_actions_round_trip(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["F@1", "SYNC2@1", "X3@1", "F3", "SEND_X1@0", "f3@1", ""])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no action"):
        Action.parse(text)


def test_plans_get_the_schedule_they_name() -> None:
    stages = [
        {"layers": [s, s + 1], "replicas": [{"samples": 1, "shards": [{"device": f"d{s}"}]}]}
        for s in range(2)
    ]
    base = {"schema": "colledge/plan/1", "num_layers": 2, "global_batch_size": 4, "microbatch_size": 1}
    in_flight = {}
    for schedule in ({"name": "gpipe"}, {"name": "1f1b"}, {"name": "1f1b", "warmup": [3, 1]}):
        plan = Plan.model_validate({**base, "stages": stages, "schedule": schedule})
        lowered = plan_schedule(plan)
        in_flight[str(schedule)] = [lowered.in_flight(s) for s in range(2)]
    assert list(in_flight.values()) == [[4, 4], [2, 1], [3, 1]]


@pytest.mark.parametrize(
    ("first_trained", "first_backward"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
)
def test_stages_below_the_first_layer_that_trains_run_forwards_only(
    first_trained: int, first_backward: int
) -> None:
    stages = [
        {"layers": layers, "replicas": [{"samples": 1, "shards": [{"device": f"d{layers[0]}"}]}]}
        for layers in ([0, 2], [2, 4])
    ]
    base = {"schema": "colledge/plan/1", "num_layers": 4, "global_batch_size": 2, "microbatch_size": 1}
    plan = Plan.model_validate({**base, "stages": stages, "recompute": [True, True]})
    assert plan.first_backward(first_trained) == first_backward
    assert plan_schedule(plan, first_trained) == lower(compute_order((2, 1), 2, first_backward), 2)
    assert [plan.recomputes(s, first_trained) for s in range(2)] == [s >= first_backward for s in range(2)]


GOOD = """
F0@0 SEND_F0@0 RECV_B0@0 B0@0 SYNC@0 STEP@0
RECV_F0@1 F0@1 B0@1 SEND_B0@1 SYNC@1 STEP@1
"""


def test_a_good_schedule_is_accepted() -> None:
    validate(Schedule.parse(GOOD))


@pytest.mark.parametrize(
    ("old", "new", "message", "marked"),
    [
        ("F0@0 SEND_F0@0", "SEND_F0@0 F0@0", "SEND_F0@0 comes before F0@0", ">SEND_F0@0< F0@0"),
        ("F0@1 B0@1 SEND_B0@1", "B0@1 F0@1 SEND_B0@1", "B0@1 comes before F0@1", ">B0@1<"),
        ("RECV_F0@1 F0@1", "F0@1 RECV_F0@1", "F0@1 comes before its receive", ">F0@1< RECV_F0@1"),
        ("RECV_B0@0 B0@0", "B0@0 RECV_B0@0", "B0@0 comes before its receive", ">B0@0< RECV_B0@0"),
        ("F0@1 B0@1", "F0@1 F0@1 B0@1", "F0@1 appears twice", "F0@1 >F0@1< B0@1"),
        ("SYNC@1 STEP@1", "SYNC@0 STEP@1", "SYNC@0 stands on stage 1", ">SYNC@0<"),
        ("B0@1 SEND_B0@1", "", "B0@1 is missing", "stage 1 | RECV_F0@1 F0@1 SYNC@1"),
        ("SYNC@0 STEP@0", "STEP@0", "stage 0 does not end with SYNC and STEP", "stage 0 | F0@0"),
    ],
)
def test_faults_are_named_and_marked(old: str, new: str, message: str, marked: str) -> None:
    with pytest.raises(PlanError) as error:
        validate(Schedule.parse(GOOD.replace(old, new)))
    assert message in str(error.value)
    assert marked in str(error.value)


def test_a_deadlock_is_found_and_marked() -> None:
    # Stage 0 wants the first backward before it starts the second forward; stage 1 wants both forwards first.
    order = [
        [Action(kind, stage, m) for kind, m in actions]
        for stage, actions in enumerate(
            [
                [
                    (ActionKind.FORWARD, 0),
                    (ActionKind.BACKWARD, 0),
                    (ActionKind.FORWARD, 1),
                    (ActionKind.BACKWARD, 1),
                ],
                [
                    (ActionKind.FORWARD, 0),
                    (ActionKind.FORWARD, 1),
                    (ActionKind.BACKWARD, 0),
                    (ActionKind.BACKWARD, 1),
                ],
            ]
        )
    ]
    with pytest.raises(PlanError) as error:
        validate(lower(order, 2))
    text = str(error.value)
    assert "deadlock: RECV_B0@0, RECV_F1@1 wait for ever" in text
    assert "stage 0 | F0@0 SEND_F0@0 >RECV_B0@0< B0@0" in text
    assert "stage 1 | RECV_F0@1 F0@1 >RECV_F1@1< F1@1" in text
