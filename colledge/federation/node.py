"""A node's round loop, written once for every strategy, transport and tier: a state machine without input or output.

    JOINING ──▶ IDLE ──task──▶ GATHERING ──answers, deadline──▶ IDLE ──stop──▶ FINISHED
                                  │  ▲ next part
                                  └──┘

The driver (a simulation, or a process) hands over what arrives and what time it is, and sends what comes back. A
node works while it handles a message; nothing here waits.

- A task is told by its parent's round and part. Its answer is kept, with all that the next round needs, before it is
  sent; the same task again gets the same answer. So a node that dies, parent or child, is started again and nothing
  is learnt twice: the run comes to what it would have come to.
- A round ends when all children answered, or at its deadline with a quorum of them. Answers that come later are
  merged in the next round or dropped, as the strategy says; a child that cannot be reached is not waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from pydantic import JsonValue

from colledge.errors import ColledgeError, ConfigError
from colledge.federation.clock import Clock
from colledge.federation.message import Kind, Message, MessageError, Payload
from colledge.federation.node_state import NodeState, difference
from colledge.federation.record import NodeRound
from colledge.federation.rounds import Gathering, RoundSettings
from colledge.federation.strategy import Strategy
from colledge.federation.trainer import Trainer
from colledge.federation.transport import NodeId
from colledge.records import Record

_log = logging.getLogger("colledge.federation")
_MISSES = 2  # rounds in a row in which a child cannot be reached, after which it is taken to have left
_LONGEST_NAME = 200


class Store(Protocol):
    """Where a node keeps its state."""

    def save(self, state: Message) -> None:
        """Keep a state, instead of the one before, whole or not at all."""

    def load(self) -> Message | None:
        """Return the state that was kept, if one was."""

    def note(self, lines: Sequence[NodeRound]) -> None:
        """Write down what the node did."""


class Judge(Protocol):
    """Tells how good a node's model is."""

    def __call__(self, strategy: Strategy, round_index: int) -> float | None:
        """Return its accuracy, or None in a round in which it is not looked at."""


@dataclass(frozen=True)
class Outgoing:
    """A message to be sent."""

    target: NodeId
    message: Message


Key = tuple[int, int]  # a task, by its parent's round and part


class _Phase(Enum):
    JOINING = "joining"
    IDLE = "idle"
    GATHERING = "gathering"
    FINISHED = "finished"


class _Answer(Record):
    """The fields of an answer: the strategy's, and what the nodes of this subtree did since the last one.

    `answer` is None where a round had no quorum: there is none, and nobody need wait for it.
    """

    answer: dict[str, JsonValue] | None
    records: tuple[NodeRound, ...]


class Node:
    """One node of the tree.

    Args:
        id: Its name.
        parent: Its parent; None for the root.
        children: Those expected to join before the first round.
        strategy: What it does in a round.
        trainer: Whose work is written down.
        settings: How rounds end.
        clock: Its time.
        greeting: What parent and child must agree on, by name.
        model: The spec of its model; a state of another one is refused.
        store: Where its state is kept; None keeps none.
        judge: Tells how good its model is; None is not known.
    """

    def __init__(
        self,
        id: NodeId,
        parent: NodeId | None,
        children: Sequence[NodeId],
        strategy: Strategy,
        trainer: Trainer,
        settings: RoundSettings,
        clock: Clock,
        greeting: Mapping[str, JsonValue],
        model: Mapping[str, JsonValue],
        store: Store | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.id, self.parent, self.strategy = id, parent, strategy
        self.children: set[NodeId] = set()
        self.round = 0
        self.records: list[NodeRound] = []  # of this subtree, not yet handed on
        self._expected = set(children)
        self._trainer, self._settings, self._clock, self._store = trainer, settings, clock, store
        self._judge = judge
        self._greeting = dict(greeting)
        self._terms: dict[str, JsonValue] = {"node": id, **greeting, "model": dict(model)}
        self._phase = _Phase.JOINING
        self._gathering: Gathering | None = None
        self._task: tuple[NodeId, Key] | None = None  # the last one begun
        self._answer: Payload | None = None  # to it, once there is one
        self._next: tuple[NodeId, Message] | None = None  # a task that came while another was under way
        self._late: dict[NodeId, Payload] = {}
        self._left: set[NodeId] = set()  # children that left and did not come back
        self._unstopped: set[NodeId] = set()  # children that do not know yet that all is over
        self._answer_s: dict[NodeId, float] = {}
        self._misses: dict[NodeId, int] = {}
        self._taken: dict[NodeId, Key] = {}  # each child's last answer, late ones too
        self._merged: Key = (0, 0)  # before the state that was kept
        self._due_s: float | None = None  # when what goes on in this phase is over
        self._retry: Outgoing | None = None
        self._retry_at_s = 0.0
        self._heard_s = clock.now_s()
        self._failed = 0
        self._line = NodeRound(node=id, round=0)

    @property
    def phase(self) -> str:
        """What it is doing, in a word."""
        return self._phase.value

    @property
    def wake_at_s(self) -> float | None:
        """When to call `wake`; None for never."""
        if self._retry is None:
            return self._due_s
        return self._retry_at_s if self._due_s is None else min(self._retry_at_s, self._due_s)

    @property
    def answers_until_s(self) -> float | None:
        """Until when children should have answered; None while they have no task."""
        return None if self._gathering is None else self._gathering.deadline_s

    @property
    def is_finished(self) -> bool:
        """Whether there are no more rounds, and all children know."""
        return self._phase is _Phase.FINISHED and not self._unstopped

    # -- what the driver calls -----------------------------------------------------------------------------------

    def start(self) -> list[Outgoing]:
        """Begin, or go on from the state that was kept.

        Raises:
            ConfigError: The state is of another federation.
        """
        self._heard_s = self._clock.now_s()
        kept = self._store.load() if self._store is not None else None
        if kept is not None:
            state = self._restore(kept)
            if state.finished:
                return self._finish()
            if state.round:
                self._phase = _Phase.IDLE
                return self._ready() if state.part is None else self._gather(state.part)
        if not self._expected:
            return self._ready()
        self._due_in(self._settings.first_deadline_s)
        return [self._join()] if self.parent is not None else []

    def take(self, sender: NodeId, message: Message, num_bytes: int = 0) -> list[Outgoing]:
        """Handle a message.

        Raises:
            ColledgeError: The parent ended this node's part, for a reason.
        """
        self._count(sender, received=num_bytes)
        self._misses.pop(sender, None)
        if sender == self.parent:
            self._heard_s = self._clock.now_s()
        match message.kind:
            case Kind.JOIN:
                return self._admit(sender, message.payload)
            case Kind.LEAVE:
                return self._part_with(sender)
            case Kind.ANSWER:
                return self._take_answer(sender, message)
            case Kind.TASK if sender == self.parent:
                return self._take_task(sender, message)
            case Kind.STOP if sender == self.parent:
                reason = message.payload.fields.get("reason")
                if isinstance(reason, str):
                    raise ColledgeError(f"{sender!r} refuses {self.id!r}: {reason[:_LONGEST_NAME]}.")
                return self._finish()
        _log.warning(
            "%s: a %s from %s, which is not its parent, was dropped", self.id, message.kind.value, sender
        )
        return []

    def wake(self) -> list[Outgoing]:
        """Do what is due at `wake_at_s`.

        Raises:
            ColledgeError: Too few children are there, or the parent has been silent for too long.
        """
        now_s = self._clock.now_s()
        if self._retry is not None and self._retry_at_s <= now_s:
            retry, self._retry = self._retry, None
            return [retry]
        if self._due_s is None or now_s < self._due_s:
            return []
        if self._phase is _Phase.JOINING:
            return self._end_joining()
        if self._phase is _Phase.GATHERING:
            return self._end_gathering(timed_out=True)
        if self._phase is _Phase.FINISHED:
            self._unstopped, self._due_s = set(), None
        if self._phase is _Phase.IDLE and self.parent is not None:
            if now_s - self._heard_s > self._settings.patience_s:
                raise ColledgeError(
                    f"{self.id!r} has heard nothing of its parent {self.parent!r} for "
                    f"{self._settings.patience_s:g} s.",
                    fix="look at that node, or raise rounds.patience.",
                )
            self._wait_for_parent()
            return [self._join()]
        return []

    def undelivered(self, outgoing: Outgoing) -> list[Outgoing]:
        """Learn that a message could not be delivered."""
        if outgoing.message.kind is Kind.TASK:
            child = outgoing.target
            self._misses[child] = self._misses.get(child, 0) + 1
            if self._misses[child] == _MISSES:
                _log.warning("%s: %s cannot be reached and is taken to have left", self.id, child)
                return self._part_with(child)
            if self._gathering is not None and outgoing.message.part == self._gathering.part:
                self._gathering.waiting.discard(child)
                return self._end_gathering()
        elif outgoing.message.kind in (Kind.ANSWER, Kind.JOIN) and outgoing.target == self.parent:
            self._retry, self._retry_at_s = outgoing, self._clock.now_s() + self._settings.retry_s
        return []

    def delivered(self, outgoing: Outgoing, num_bytes: int) -> None:
        """Learn that a message was delivered, and of how many bytes it was."""
        self._count(outgoing.target, sent=num_bytes)

    def move(self, parent: NodeId) -> list[Outgoing]:
        """Change the parent; what was under way for the old one is given up. No weights move."""
        assert self.parent is not None
        leave = Outgoing(self.parent, Message(Kind.LEAVE))
        self.parent, self._task, self._answer, self._next, self._retry = parent, None, None, None, None
        self._gathering, self._heard_s = None, self._clock.now_s()
        if self._phase is not _Phase.JOINING:
            self._phase = _Phase.IDLE
            self._wait_for_parent()
        return [leave, self._join()]

    # -- joining and leaving -------------------------------------------------------------------------------------

    def _join(self) -> Outgoing:
        assert self.parent is not None
        return Outgoing(self.parent, Message(Kind.JOIN, payload=Payload(self._greeting)))

    def _ready(self) -> list[Outgoing]:
        """All children that will be are there: begin, or wait for the parent's task, unless it is there already."""
        self._phase = _Phase.IDLE
        if self.parent is None:
            return self._next_round()
        self._wait_for_parent()
        return self._follow() or [self._join()]

    def _end_joining(self) -> list[Outgoing]:
        if len(self.children) >= self._settings.quorum_of(len(self._expected)):
            return self._ready()
        missing = ", ".join(sorted(self._expected - self.children))
        raise ColledgeError(
            f"{len(self.children)} of {len(self._expected)} children of {self.id!r} joined within "
            f"{self._settings.first_deadline_s:g} s; missing: {missing}.",
            fix="start them, raise rounds.first_deadline or lower rounds.quorum.",
        )

    def _admit(self, child: NodeId, greeting: Payload) -> list[Outgoing]:
        for name, value in self._greeting.items():
            seen = greeting.fields.get(name)
            if seen != value:
                reason = f"its {name} is {str(seen)[:_LONGEST_NAME]}, that of {self.id!r} is {value}"
                _log.warning("%s: %s is refused: %s", self.id, child, reason)
                return [Outgoing(child, Message(Kind.STOP, payload=Payload({"reason": reason})))]
        if self._phase is _Phase.FINISHED:
            return [Outgoing(child, Message(Kind.STOP))]
        self.children.add(child)
        if child in self._left:
            self._left.discard(child)
            self._keep_left()
        if self._phase is _Phase.JOINING and self.children >= self._expected:
            return self._ready()
        gathering = self._gathering
        if gathering is None or child in gathering.answers:
            return []
        gathering.waiting.add(child)
        return [self._task_for(child)]

    def _part_with(self, child: NodeId) -> list[Outgoing]:
        self._unstopped.discard(child)
        if self._phase is _Phase.JOINING:
            self._expected.discard(child)
            self.children.discard(child)
            self._left.add(child)
            self._keep_left()
            return self._ready() if self.children >= self._expected else []
        if child not in self.children or self._phase is _Phase.FINISHED:
            return []
        self.children.discard(child)
        self._late.pop(child, None)
        self.strategy.forget(child)
        self._left.add(child)
        self._keep_left()
        if self._gathering is None:
            return []
        self._gathering.waiting.discard(child)
        self._gathering.answers.pop(child, None)
        return self._end_gathering()

    # -- a round -------------------------------------------------------------------------------------------------

    def _next_round(self) -> list[Outgoing]:
        """At the root: begin the next round, or end."""
        if self.round >= self._settings.count:
            return self._finish()
        return self._begin(None)

    def _take_task(self, parent: NodeId, message: Message) -> list[Outgoing]:
        key = (message.round, message.part)
        if self._task == (parent, key):
            return [self._answer_message()] if self._answer is not None else []
        if self._task is not None and self._task[0] == parent and key < self._task[1]:
            _log.warning(
                "%s: round %d of %s is over here, and not begun again", self.id, message.round, parent
            )
            return []
        if self._phase in (_Phase.GATHERING, _Phase.JOINING):
            self._next = (parent, message)
            return []
        self._task, self._answer = (parent, key), None
        return self._begin(message.payload)

    def _begin(self, task: Payload | None) -> list[Outgoing]:
        self.round += 1
        self._retry = None
        self._line = self._line.model_copy(update={"round": self.round, "began_s": self._clock.now_s()})
        try:
            self.strategy.receive(self.round, task)
        except MessageError as fault:
            _log.warning("%s: the task of round %d is refused: %s", self.id, self.round, fault)
            self.round -= 1
            return []
        return self._gather(0)

    def _gather(self, part: int) -> list[Outgoing]:
        """Give the children their tasks; without children, or after the last part, learn and answer."""
        if self.parent is None and not self.children:
            raise ColledgeError(f"all children of {self.id!r} have left.", fix="let nodes join it.")
        if part == self.strategy.parts or not self.children:
            return self._learn()
        now_s = self._clock.now_s()
        limit_s = self._settings.deadline_for(self.children, self._answer_s)
        self._gathering = Gathering(part, now_s, now_s + limit_s, set(self.children))
        self._phase = _Phase.GATHERING
        self._due_s = now_s + limit_s
        return [self._task_for(child) for child in sorted(self.children)]

    def _task_for(self, child: NodeId) -> Outgoing:
        """Return a child's task; asking a strategy twice could give another one."""
        gathering = self._gathering
        assert gathering is not None
        if child not in gathering.tasks:
            gathering.tasks[child] = self.strategy.task(child)
        return Outgoing(child, Message(Kind.TASK, self.round, gathering.part, gathering.tasks[child]))

    def _take_answer(self, child: NodeId, message: Message) -> list[Outgoing]:
        if child not in self.children:
            _log.warning("%s: an answer of %s, which is not its child, was dropped", self.id, child)
            return []
        gathering, key = self._gathering, (message.round, message.part)
        current = gathering is not None and key == (self.round, gathering.part)
        if key <= max(self._taken.get(child, (0, 0)), self._merged):
            return []  # sent twice
        if message.round > self.round:
            return []  # to a task of a round that this node lost and will begin again
        self._taken[child] = key
        payload: Payload | None = None
        try:
            wrapped = message.payload.parse(_Answer)
            self.records += wrapped.records
            if wrapped.answer is not None:
                payload = Payload(wrapped.answer, message.payload.tensors)
                self.strategy.check(child, payload)
        except MessageError as fault:
            _log.warning("%s: the answer of %s in round %d is refused: %s", self.id, child, self.round, fault)
            self._note("refused", child)
            payload = None
        if payload is None:
            if gathering is None or not current:
                return []
            gathering.waiting.discard(child)
            return self._end_gathering()
        if gathering is None or not current:
            self._note("late", child)
            if self.strategy.takes_late:
                self._late[child] = payload
            return []
        took_s = self._clock.now_s() - gathering.began_s
        before_s = self._answer_s.get(child, took_s)
        self._answer_s[child] = 0.5 * (before_s + took_s)
        gathering.answers[child] = payload
        gathering.waiting.discard(child)
        return self._end_gathering()

    def _end_gathering(self, timed_out: bool = False) -> list[Outgoing]:
        """End the part under way if it can: all answered, or the deadline passed and a quorum answered."""
        gathering = self._gathering
        assert gathering is not None
        enough = len(gathering.answers) >= self._settings.quorum_of(len(self.children))
        if self.children and not gathering.is_over(self._clock.now_s(), enough):
            if timed_out:
                self._due_s = gathering.last_s
            return []
        self._gathering, self._phase, self._due_s = None, _Phase.IDLE, None
        for child in sorted(self.children - gathering.answers.keys()):
            self._note("missing", child)
        if not enough:
            return self._fail()
        self._failed = 0
        answers = {**self._late, **gathering.answers}
        self._late = {}
        self.strategy.merge({child: answers[child] for child in sorted(answers) if child in self.children})
        if gathering.part + 1 < self.strategy.parts:
            self._save(gathering.part + 1)
        return self._gather(gathering.part + 1)

    def _fail(self) -> list[Outgoing]:
        """Give a round up for which too few children answered."""
        self._failed += 1
        if self._failed == self._settings.failed_rounds:
            raise ColledgeError(
                f"{self.id!r}: {self._failed} rounds in a row had answers of fewer than "
                f"{self._settings.quorum_of(len(self.children))} of {len(self.children)} children.",
                fix="look at the children, raise rounds.deadline or lower rounds.quorum.",
            )
        _log.warning("%s: round %d had too few answers and is given up", self.id, self.round)
        self._end_line(failed=True)
        if self.parent is None:
            return self._next_round()
        self._keep_answer(None)
        return [self._answer_message(), *self._follow()]

    def _learn(self) -> list[Outgoing]:
        self.strategy.learn()
        answer = self.strategy.answer() if self.parent is not None else None
        self._end_line()
        if answer is not None:
            self._keep_answer(answer)
        self._save()
        if self.parent is None:
            return self._next_round()
        return [self._answer_message(), *self._follow()]

    def _keep_answer(self, answer: Payload | None) -> None:
        """Keep what the parent gets for its task; None for a round that was given up."""
        records, self.records = tuple(self.records), []
        fields = None if answer is None else dict(answer.fields)
        wrapped = _Answer(answer=fields, records=records).model_dump(mode="json")
        self._answer = Payload(wrapped, {} if answer is None else answer.tensors)

    def _answer_message(self) -> Outgoing:
        assert self.parent is not None
        assert self._task is not None
        assert self._answer is not None
        self._wait_for_parent()
        return Outgoing(self.parent, Message(Kind.ANSWER, *self._task[1], self._answer))

    def _follow(self) -> list[Outgoing]:
        """Begin the task that came meanwhile."""
        if self._next is None:
            return []
        (parent, message), self._next = self._next, None
        return self._take_task(parent, message) if parent == self.parent else []

    def _finish(self) -> list[Outgoing]:
        """End: take leave, and tell the children; who is away has until `first_deadline` to ask."""
        self._phase, self._retry, self._unstopped = _Phase.FINISHED, None, set(self.children)
        self._gathering = None
        self._save()
        self._due_in(self._settings.first_deadline_s)
        leave = [Outgoing(self.parent, Message(Kind.LEAVE))] if self.parent is not None else []
        return leave + [Outgoing(child, Message(Kind.STOP)) for child in sorted(self.children)]

    # -- time, records, state ------------------------------------------------------------------------------------

    def _due_in(self, seconds: float) -> None:
        self._due_s = self._clock.now_s() + seconds

    def _wait_for_parent(self) -> None:
        """Wait for the next task, and say from time to time that this node is there."""
        if self._phase is _Phase.IDLE:
            self._due_in(self._settings.heartbeat_s)

    def _count(self, neighbour: NodeId, sent: int = 0, received: int = 0) -> None:
        self._line = self._line.with_traffic(neighbour, sent, received)

    def _note(self, what: str, child: NodeId) -> None:
        self._line = self._line.model_copy(update={what: (*getattr(self._line, what), child)})

    def _end_line(self, failed: bool = False) -> None:
        """Close this round's record; what is sent and received from now on counts in the next."""
        work, accuracy = self._trainer.take_work(), None
        if self._judge is not None and not failed:
            with self._trainer.unmetered():
                accuracy = self._judge(self.strategy, self.round)
        line = self._line.model_copy(
            update={
                "ended_s": self._clock.now_s(),
                "compute_s": work.compute_s,
                "flops": work.flops,
                "compute_joules": work.joules,
                "plan": work.plan,
                "loss": self.strategy.loss,
                "figures": dict(self.strategy.figures),
                "accuracy": accuracy,
                "failed": failed,
            }
        )
        self.records.append(line)
        if self._store is not None:
            self._store.note([line])
        self._line = NodeRound(node=self.id, round=self.round)

    def _save(self, part: int | None = None) -> None:
        """Keep the state, at a round's end or before one of its parts."""
        if self._store is None:
            return
        state = NodeState(
            terms=self._terms,
            round=self.round,
            part=part,
            finished=self._phase is _Phase.FINISHED,
            task=None if self._task is None else (self._task[0], *self._task[1]),
            children=tuple(sorted(self.children)),
        )
        self._store.save(state.to_message(self.strategy.state(), self._answer))

    def _keep_left(self) -> None:
        """Add to the state that was kept which children left; the rest stays as it was then."""
        if self._store is None:
            return
        kept, answer = self._store.load(), None
        if kept is None:
            state, strategy = NodeState(terms=self._terms), Payload()
        else:
            state, strategy, answer = NodeState.from_message(kept)
        state = state.model_copy(update={"left": tuple(sorted(self._left))})
        self._store.save(state.to_message(strategy, answer))

    def _restore(self, kept: Message) -> NodeState:
        """Take a state up, and return it.

        Raises:
            ConfigError: It is of another federation.
        """
        why: str | None
        try:
            state, strategy, self._answer = NodeState.from_message(kept)
            why = difference(state.terms, self._terms)
        except MessageError as fault:
            why = fault.message.rstrip(".")
        if why is not None:
            raise ConfigError(
                f"the state that {self.id!r} kept is of another federation or node: {why}.",
                fix="bring federation.yaml back to what it was, or give another output.",
            )
        self._left = set(state.left)
        if self.parent is None and self._left >= (set(state.children) if state.round else self._expected):
            self._left = set()  # a root that all have left waits for them, so that nodes can join it
        self._expected -= self._left
        if state.round:
            self.strategy.restore(strategy)
            for child in sorted(self._left):
                self.strategy.forget(child)
        self.round, self.children = state.round, set(state.children) - self._left
        self._task = None if state.task is None else (state.task[0], (state.task[1], state.task[2]))
        self._merged = (state.round, self.strategy.parts if state.part is None else state.part - 1)
        self._line = NodeRound(node=self.id, round=self.round, began_s=self._clock.now_s())
        return state
