"""A federation that learns nothing and remembers everything: what a node's number is tells all that it took part in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from colledge.federation.clock import VirtualClock
from colledge.federation.message import Message, Payload, decode, encode
from colledge.federation.node import Node
from colledge.federation.record import NodeRound
from colledge.federation.rounds import RoundSettings
from colledge.federation.simulation import Link, Simulated, Simulation
from colledge.federation.strategy import Strategy
from colledge.federation.trainer import Work
from colledge.federation.tree import Tree


class Chain(Strategy):
    """A node whose digest goes on with everything that it receives, merges and learns."""

    def __init__(self, id: str, parts: int = 1, takes_late: bool = False) -> None:
        self.id, self.parts, self.takes_late = id, parts, takes_late
        self.digest, self.merged = id, []  # type: tuple[str, list[tuple[int, tuple[str, ...]]]]
        self.forgotten: list[str] = []
        self.round = 0

    def _add(self, *words: object) -> None:
        self.digest = hashlib.sha256(repr((self.digest, *words)).encode()).hexdigest()[:16]

    def receive(self, round_index: int, task: Payload | None) -> None:
        self.round = round_index
        self._add("receive", None if task is None else task.fields["digest"])

    def task(self, child: str) -> Payload:
        self._add("task", child)  # a second asking would show
        return Payload({"digest": self.digest}, {"x": torch.ones(3)})

    def check(self, child: str, answer: Payload) -> None:
        answer.tensor("x", (3,))

    def merge(self, answers: Mapping[str, Payload]) -> None:
        self.merged.append((self.round, tuple(answers)))
        self._add("merge", [(child, answer.fields["digest"]) for child, answer in answers.items()])

    def learn(self) -> None:
        self._add("learn")

    def answer(self) -> Payload:
        return Payload({"digest": self.digest}, {"x": torch.ones(3)})

    def forget(self, child: str) -> None:
        self.forgotten.append(child)
        self._add("forget", child)

    def state(self) -> Payload:
        return Payload({"digest": self.digest}, {"x": torch.ones(3)})

    def restore(self, state: Payload) -> None:
        self.digest = str(state.fields["digest"])

    def predict(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return next(iter(inputs.values()))


class Sleeper:
    """A trainer that is only busy: so many seconds a round."""

    def __init__(self, clock: VirtualClock, busy_s: float) -> None:
        self.clock, self.busy_s = clock, busy_s

    def take_work(self) -> Work:
        self.clock.spend(self.busy_s)
        return Work(compute_s=self.busy_s)

    @contextmanager
    def unmetered(self) -> Iterator[None]:
        yield


class Memory:
    """A store that outlives its node."""

    def __init__(self) -> None:
        self.kept: bytes | None = None

    def save(self, state: Message) -> None:
        self.kept = encode(state)

    def load(self) -> Message | None:
        return None if self.kept is None else decode(self.kept)

    def note(self, lines: Sequence[NodeRound]) -> None:
        self.lines = lines


class World:
    """A simulation of a tree of toys, whose nodes can be made again."""

    def __init__(
        self,
        parents: Mapping[str, str | None],
        settings: RoundSettings,
        *,
        busy_s: Mapping[str, float] | None = None,
        parts: int = 1,
        takes_late: bool = False,
        latency_s: float = 0.01,
    ) -> None:
        self.tree, self.settings = Tree(parents), settings
        self.busy_s, self.parts, self.takes_late = busy_s or {}, parts, takes_late
        self.stores = {id: Memory() for id in parents}
        self.clocks = {id: VirtualClock() for id in parents}
        places = {id: Simulated(self.make(id), self.clocks[id], Link(latency_s)) for id in parents}
        self.simulation = Simulation(self.tree.root, places)

    def make(self, id: str) -> Node:
        clock = self.clocks[id]
        parts = self.parts if self.tree.children(id) else 1
        return Node(
            id,
            self.tree.parents[id],
            self.tree.children(id),
            Chain(id, parts, self.takes_late),
            Sleeper(clock, self.busy_s.get(id, 1.0)),
            self.settings,
            clock,
            {"toy": True},
            {},
            self.stores[id],
        )

    def run(self) -> list[NodeRound]:
        return self.simulation.run()

    def die(self, id: str, at_s: float, for_s: float) -> None:
        self.simulation.at(at_s, lambda: self.simulation.kill(id))
        self.simulation.at(at_s + for_s, lambda: self.simulation.restart(id, self.make(id)))

    def strategy(self, id: str) -> Chain:
        found = self.simulation.nodes[id].node.strategy
        assert isinstance(found, Chain)
        return found

    def digests(self, ids: Sequence[str] | None = None) -> dict[str, str]:
        return {id: self.strategy(id).digest for id in ids or self.tree.parents}
