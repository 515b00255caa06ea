"""The round loop, in virtual time: deadlines, quorum, late answers, deaths, moves, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colledge.errors import ColledgeError, ConfigError
from colledge.federation.message import Kind, Message, Payload, decode, encode
from colledge.federation.node import Outgoing
from colledge.federation.rounds import RoundSettings
from tests.federation.toy import World

TREE = {
    "cloud": None,
    "edge-0": "cloud",
    "edge-1": "cloud",
    "a": "edge-0",
    "b": "edge-0",
    "c": "edge-1",
    "d": "edge-1",
}
PATIENT = RoundSettings(count=4, deadline=1e6, first_deadline=1e6)


def test_every_node_takes_part_in_every_round() -> None:
    world = World(TREE, PATIENT)
    records = world.run()
    assert sorted((r.node, r.round) for r in records) == sorted((id, n) for id in TREE for n in range(1, 5))
    assert world.strategy("cloud").merged == [(n, ("edge-0", "edge-1")) for n in range(1, 5)]
    assert not any(r.missing or r.late or r.refused or r.failed for r in records)


def test_a_run_is_the_same_twice_and_its_parts_count() -> None:
    one, two, other = World(TREE, PATIENT), World(TREE, PATIENT), World(TREE, PATIENT, parts=2)
    for world in (one, two, other):
        world.run()
    assert one.digests() == two.digests()
    assert one.digests(["cloud"]) != other.digests(["cloud"])
    assert other.strategy("edge-0").merged == [(n, ("a", "b")) for n in range(1, 9) for _ in range(2)]


def test_time_is_that_of_the_slowest_path() -> None:
    world = World(TREE, PATIENT, busy_s={"a": 5.0, "cloud": 2.0}, latency_s=0.0)
    records = world.run()
    ends = [r.ended_s for r in records if r.node == "cloud"]
    assert ends == pytest.approx([8, 16, 24, 32])  # a, edge-0, cloud: 5 + 1 + 2 a round


@settings(max_examples=100, deadline=None)
@example(
    deaths=[("cloud", 7.0, 3.0), ("edge-0", 6.1, 1.0)], parts=1
)  # an answer comes before its task is given again
@given(
    deaths=st.lists(
        st.tuples(st.sampled_from(sorted(TREE)), st.floats(0.1, 20), st.floats(0.1, 30)),
        min_size=1,
        max_size=5,
    ),
    parts=st.integers(1, 2),
)
def test_a_node_that_dies_and_comes_back_changes_nothing(
    deaths: list[tuple[str, float, float]], parts: int
) -> None:
    undisturbed = World(TREE, PATIENT, parts=parts)
    undisturbed.run()
    world = World(TREE, PATIENT, parts=parts)
    busy_until: dict[str, float] = {}
    for id, at_s, for_s in sorted(deaths, key=lambda death: death[1]):
        if at_s > busy_until.get(id, 0.0):
            world.die(id, at_s, for_s)
            busy_until[id] = at_s + for_s
    world.run()
    assert world.digests() == undisturbed.digests()


def test_a_slow_child_is_not_waited_for_where_a_quorum_answered() -> None:
    limits = RoundSettings(count=6, deadline=10.0, quorum=0.5)
    world = World(TREE, limits, busy_s={"d": 25.0}, latency_s=0.0)
    records = world.run()
    slow = [r for r in records if r.node == "edge-1"]
    assert all("d" in r.missing for r in slow[:2])
    assert any("d" in r.late for r in slow)
    assert max(r.ended_s for r in records if r.node == "cloud") < 6 * 15


@pytest.mark.parametrize("takes_late", [True, False])
def test_a_late_answer_is_merged_in_the_next_round_or_dropped(takes_late: bool) -> None:
    limits = RoundSettings(count=4, deadline=10.0, quorum=0.5)
    world = World(TREE, limits, busy_s={"d": 14.0}, takes_late=takes_late, latency_s=0.0)
    world.run()
    merged = [children for _, children in world.strategy("edge-1").merged]
    assert merged[0] == ("c",)
    assert (("c", "d") in merged) == takes_late


def test_a_dead_child_is_missed_and_taken_back() -> None:
    limits = RoundSettings(count=8, deadline=10.0, quorum=0.5)
    world = World(TREE, limits, latency_s=0.0)
    world.die("d", 4.0, 9.0)
    world.run()
    merged = [children for _, children in world.strategy("edge-1").merged]
    assert ("c",) in merged
    assert merged[-1] == ("c", "d")


def test_without_a_quorum_rounds_are_given_up_and_then_the_run() -> None:
    limits = RoundSettings(count=20, deadline=5.0, quorum=1.0, failed_rounds=2)
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, limits)
    world.simulation.at(3.5, lambda: world.simulation.kill("b"))
    with pytest.raises(
        ColledgeError, match=r"'cloud': 2 rounds in a row had answers of fewer than 2 of 2 children"
    ):
        world.run()


def test_children_that_never_come_are_named() -> None:
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, RoundSettings(count=2, first_deadline=30.0))
    world.simulation.kill("b")
    with pytest.raises(ColledgeError, match=r"1 of 2 children of 'cloud' joined within 30 s; missing: b"):
        world.run()


def test_a_child_that_never_comes_is_done_without_where_a_quorum_is_there() -> None:
    limits = RoundSettings(count=2, first_deadline=30.0, quorum=0.5)
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, limits)
    world.simulation.kill("b")
    world.run()
    assert world.strategy("cloud").merged == [(1, ("a",)), (2, ("a",))]


def test_a_node_moves_at_any_moment() -> None:
    world = World(TREE, RoundSettings(count=6, deadline=1e6, first_deadline=1e6))
    world.simulation.at(4.4, lambda: world.simulation.move("b", "edge-1"))
    world.run()
    first = [set(children) for _, children in world.strategy("edge-0").merged]
    second = [set(children) for _, children in world.strategy("edge-1").merged]
    assert first[0] == {"a", "b"}
    assert first[-1] == {"a"}
    assert second[-1] == {"b", "c", "d"}
    assert all("b" in one or "b" in two for one, two in zip(first, second, strict=True))


def test_a_child_that_moves_before_its_parent_began_is_not_waited_for() -> None:
    world = World(TREE, RoundSettings(count=2, first_deadline=600.0))
    world.die("a", 0.0, 5.0)  # so that its parent waits for it
    world.simulation.at(4.0, lambda: world.simulation.move("b", "edge-1"))
    records = world.run()
    assert [children for _, children in world.strategy("edge-0").merged] == [("a",)] * 2
    assert world.strategy("edge-1").merged[-1] == (2, ("b", "c", "d"))
    assert max(record.ended_s for record in records) < 60.0


@pytest.mark.parametrize("when", ["joining", "in the first round", "in the second round"])
def test_a_parent_that_was_told_of_a_leave_knows_it_after_a_restart(when: str) -> None:
    limits = RoundSettings(count=6, deadline=600.0, first_deadline=600.0)
    world = World(TREE, limits, busy_s={"a": 5.0})  # a round takes seven seconds
    left_at_s = 9.0 if when == "in the second round" else 2.0
    if when == "joining":
        world.die("a", 0.0, 4.0)  # so that its parent waits for it
    world.simulation.at(left_at_s, lambda: world.simulation.move("b", "edge-1"))
    world.die("edge-0", left_at_s + 1.0, 0.5)
    records = world.run()
    assert world.strategy("edge-0").merged[-1] == (6, ("a",))
    assert world.strategy("edge-0").forgotten == (["b"] if when == "in the second round" else [])
    assert world.strategy("edge-1").merged[-1] == (6, ("b", "c", "d"))
    assert not any(record.missing or record.failed for record in records)
    assert max(record.ended_s for record in records) < 600.0  # nobody was waited for until a deadline


JOIN = Message(Kind.JOIN, payload=Payload({"toy": True}))


def answer_to(task: Message) -> Message:
    answer = Payload({"answer": {"digest": "x"}, "records": []}, {"x": torch.ones(3)})
    return Message(Kind.ANSWER, task.round, task.part, answer)


@pytest.mark.parametrize("began", [False, True])
def test_a_child_that_left_and_came_back_is_expected_after_a_restart(began: bool) -> None:
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, PATIENT)
    node = world.simulation.nodes["cloud"].node
    node.start()
    if began:
        for task in node.take("a", JOIN) + node.take("b", JOIN):
            node.take(task.target, answer_to(task.message))
    node.take("b", Message(Kind.LEAVE))
    node.take("b", JOIN)
    again = world.make("cloud")
    tasks = again.start() if began else again.start() + again.take("a", JOIN) * 2 + again.take("b", JOIN)
    assert [task.target for task in tasks] == ["a", "b"]


@pytest.mark.parametrize("began", [False, True])
def test_a_root_that_all_have_left_waits_for_nodes_after_a_restart(began: bool) -> None:
    world = World({"cloud": None, "a": "cloud"}, PATIENT)
    node = world.simulation.nodes["cloud"].node
    node.start()
    if began:
        [task] = node.take("a", JOIN)
        node.take("a", answer_to(task.message))
    with pytest.raises(ColledgeError, match="all children of 'cloud' have left"):
        node.take("a", Message(Kind.LEAVE))
    again = world.make("cloud")
    assert [one.target for one in again.start()] == (["a"] if began else [])
    assert "other" in [one.target for one in again.take("other", JOIN) + again.take("a", JOIN)]


def test_a_child_that_leaves_before_it_joined_is_not_waited_for() -> None:
    node = World(TREE, PATIENT).simulation.nodes["edge-0"].node
    node.start()
    assert node.take("b", Message(Kind.LEAVE)) == []
    [join] = node.take("a", Message(Kind.JOIN, payload=Payload({"toy": True})))
    assert (join.target, join.message.kind, node.children) == ("cloud", Kind.JOIN, {"a"})


def test_a_root_whose_children_all_leave_before_it_began_says_so() -> None:
    node = World({"cloud": None, "a": "cloud"}, PATIENT).simulation.nodes["cloud"].node
    node.start()
    with pytest.raises(ColledgeError, match="all children of 'cloud' have left"):
        node.take("a", Message(Kind.LEAVE))


def test_what_a_node_may_not_do(caplog: pytest.LogCaptureFixture) -> None:
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, PATIENT)
    node = world.simulation.nodes["cloud"].node
    node.start()
    with caplog.at_level(logging.WARNING):
        assert node.take("stranger", Message(Kind.ANSWER)) == []
        assert node.take("a", Message(Kind.TASK)) == []
    assert "an answer of stranger, which is not its child" in caplog.text
    assert "a task from a, which is not its parent" in caplog.text
    [refusal] = node.take("a", Message(Kind.JOIN, payload=Payload({"toy": 10})))
    assert refusal.message.kind is Kind.STOP
    with pytest.raises(ColledgeError, match=r"'cloud' refuses 'a': its toy is 10, that of 'cloud' is True"):
        world.simulation.nodes["a"].node.take("cloud", refusal.message)


def test_a_malformed_answer_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    limits = RoundSettings(count=2, deadline=10.0, quorum=0.5)
    world = World({"cloud": None, "a": "cloud", "b": "cloud"}, limits)
    bad = world.strategy("b")
    bad.answer = lambda: Payload({"digest": "b"})  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        records = world.run()
    assert [r.refused for r in records if r.node == "cloud"] == [("b",), ("b",)]
    assert (
        "cloud: the answer of b in round 1 is refused: a malformed payload: tensor 'x' is missing"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda fields: fields.pop("node"), "a malformed payload: key 'node' is missing"),
        (lambda fields: fields["node"].pop("terms"), "a malformed payload: key 'node.terms' is missing"),
        (lambda fields: fields["node"]["terms"].update(toy=[1]), r"toy was \[1\], is True"),
        (lambda fields: fields["node"]["terms"].update(node="b"), "node was b, is a"),
        (lambda fields: fields["node"]["terms"]["model"].update(blocks=2), "model.blocks was 2, is None"),
    ],
)
def test_a_state_of_another_federation_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], None], why: str
) -> None:
    world = World({"cloud": None, "a": "cloud"}, PATIENT)
    world.run()
    kept = decode(world.stores["a"].kept or b"")
    fields = json.loads(json.dumps(kept.payload.fields))
    change(fields)
    world.stores["a"].kept = encode(Message(kept.kind, payload=Payload(fields, kept.payload.tensors)))
    with pytest.raises(
        ConfigError, match=f"'a' kept is of another federation or node: {why}. Fix: .*output"
    ) as found:
        world.make("a").start()
    assert "\n" not in str(found.value)


def test_an_answer_that_cannot_be_delivered_is_sent_again() -> None:
    world = World({"cloud": None, "a": "cloud"}, PATIENT)
    child = world.simulation.nodes["a"].node
    child.start()
    sends = child.take("cloud", Message(Kind.TASK, 1, 0, Payload({"digest": "x"})))
    assert [s.message.kind for s in sends] == [Kind.ANSWER]
    assert child.undelivered(sends[0]) == []
    assert child.wake() == []  # not yet
    world.clocks["a"].spend(PATIENT.retry_s)
    assert child.wake() == sends
    assert (
        child.take("cloud", Message(Kind.TASK, 1, 0, Payload({"digest": "x"}))) == sends
    )  # the same task again
    assert isinstance(sends[0], Outgoing)
