"""All nodes of a federation in one process, in virtual time: deterministic, whatever the machine is doing.

    heap of events   (when, what)    a message arrives, or a node wakes for a deadline
    a node           busy from an event until its clock says; what arrives meanwhile waits
    a link           latency + bytes / bandwidth, to the parent and back; messages queue up on it

Every message is encoded and decoded, so nodes share nothing by reference and bytes are those of a real run.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from colledge.errors import ConfigError
from colledge.federation.clock import VirtualClock
from colledge.federation.message import DEFAULT_LIMIT_BYTES, Kind, decode, encode
from colledge.federation.node import Node, Outgoing
from colledge.federation.record import NodeRound
from colledge.federation.transport import NodeId
from colledge.federation.tree import Tree
from colledge.models.generator import generator_of
from colledge.units import format_bytes


class Event(Protocol):
    """Something that happens at a moment."""

    def __call__(self) -> None:
        """Let it happen."""


class Act(Protocol):
    """What a node does at an event."""

    def __call__(self) -> list[Outgoing]:
        """Do it; return what is to be sent."""


class RoundHook(Protocol):
    """Lets the world change: nodes move, die, or learn from other data."""

    def __call__(self, simulation: Simulation, round_index: int) -> None:
        """Change what changes in a round of the root, which has just begun."""


@dataclass(frozen=True)
class Link:
    """A node's way to its parent, as fast in both directions."""

    latency_s: float = 0.0
    bandwidth_bytes_per_s: float | None = None

    def transfer_s(self, num_bytes: int) -> float:
        """Return the seconds that bytes occupy the link."""
        return num_bytes / self.bandwidth_bytes_per_s if self.bandwidth_bytes_per_s else 0.0


@dataclass
class Simulated:
    """A node and its place in virtual time; `died_s` is when it last died."""

    node: Node
    clock: VirtualClock
    link: Link = Link()
    alive: bool = True
    died_s: float = -1.0


class Simulation:
    """Runs nodes to their end.

    Args:
        root: The root's id.
        nodes: By id; each node's clock is its own.
        on_round: Called in each of the root's rounds.
        limit_bytes: A larger message ends the run.
    """

    def __init__(
        self,
        root: NodeId,
        nodes: Mapping[NodeId, Simulated],
        on_round: Sequence[RoundHook] = (),
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        self.nodes = dict(nodes)
        self.records: list[NodeRound] = []
        self.now_s = 0.0
        self._root, self.on_round, self._limit_bytes = root, list(on_round), limit_bytes
        self._events: list[tuple[float, int, Event]] = []
        self._count = count()
        self._free_at_s: dict[tuple[NodeId, NodeId], float] = {}
        self._round = 0

    def run(self) -> list[NodeRound]:
        """Run until nobody has anything to do; return what all nodes did.

        Raises:
            ColledgeError: The federation cannot go on.
        """
        for id, place in self.nodes.items():
            self._act(id, place.node, place.node.start)
        while self._events and not self._is_over():
            self.now_s, _, event = heapq.heappop(self._events)
            event()
        return self.records

    def entering(self, id: NodeId, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what some rows are where they enter a node's model: rows are dealt evenly to its children.

        So every row takes one path from a leaf up to the node.
        """
        children = [place.node for place in self.nodes.values() if place.node.parent == id]
        if not children:
            return inputs
        dealt = {name: tensor.tensor_split(len(children)) for name, tensor in inputs.items()}
        found = []
        for index, child in enumerate(children):
            part = {name: tensors[index] for name, tensors in dealt.items()}
            if len(next(iter(part.values()))):
                found.append(child.strategy.features(self.entering(child.id, part)))
        return {name: torch.cat([features[name] for features in found]) for name in found[0]}

    def at(self, moment_s: float, event: Event) -> None:
        """Let something happen at a moment."""
        heapq.heappush(self._events, (moment_s, next(self._count), event))

    def kill(self, id: NodeId) -> None:
        """Let a node die now: what it has not sent is lost, and what waits for it."""
        place = self.nodes[id]
        place.alive, place.died_s = False, self.now_s

    def restart(self, id: NodeId, node: Node) -> None:
        """Let a node that died come back, as a new one that finds its state."""
        place = self.nodes[id]
        place.node, place.alive = node, True
        place.clock.reach(self.now_s)
        self._act(id, node, node.start)

    def move(self, id: NodeId, parent: NodeId) -> None:
        """Let a node change its parent as soon as it is not busy."""
        node = self.nodes[id].node
        self._act(id, node, lambda: node.move(parent))

    def _is_over(self) -> bool:
        """Return whether nobody has anything left to do; heartbeats alone would go on for ever."""
        return all(place.node.is_finished or not place.alive for place in self.nodes.values())

    def _act(self, id: NodeId, node: Node, act: Act) -> None:
        """Let a node do something when it is not busy, unless it died, and send what comes of it."""
        place = self.nodes[id]
        if place.node is not node or not place.alive:
            return
        if place.clock.now_s() > self.now_s:
            self.at(place.clock.now_s(), lambda: self._act(id, node, act))
            return
        place.clock.reach(self.now_s)
        for outgoing in act():
            self._send(id, node, outgoing)
        self._wake_later(id, node)
        if id == self._root:
            self._follow_root(node)

    def _wake_later(self, id: NodeId, node: Node) -> None:
        """Wake a node when it wants to be, if it still does then."""
        wanted_s = node.wake_at_s
        if wanted_s is None:
            return

        def wake() -> None:
            if node.wake_at_s == wanted_s:
                self._act(id, node, node.wake)

        self.at(max(wanted_s, self.now_s), wake)

    def _send(self, sender: NodeId, node: Node, outgoing: Outgoing) -> None:
        """Let a message travel from the moment when its sender is done; it arrives, or its sender learns that not."""
        data, target, leaves_s = encode(outgoing.message), outgoing.target, self.nodes[sender].clock.now_s()
        if len(data) > self._limit_bytes:
            raise ConfigError(
                f"{sender!r} sends {target!r} a message of {format_bytes(len(data))}, the limit is "
                f"{format_bytes(self._limit_bytes)}.",
                fix="raise message_limit.",
            )
        to = self.nodes.get(target)
        if to is None or not to.alive or to.node.is_finished:
            self.at(leaves_s, lambda: self._act(sender, node, lambda: node.undelivered(outgoing)))
            return
        node.delivered(outgoing, len(data))
        is_down = outgoing.message.kind in (Kind.TASK, Kind.STOP)
        link = (to if is_down else self.nodes[sender]).link  # the child's, also to a parent that it leaves
        begin_s = max(leaves_s, self._free_at_s.get((sender, target), 0.0))
        end_s = begin_s + link.transfer_s(len(data))
        self._free_at_s[sender, target] = end_s

        def arrive() -> None:
            if (self.nodes[sender].node is node and self.nodes[sender].alive) or self.nodes[
                sender
            ].died_s > end_s:
                receiver, message = to.node, decode(data, self._limit_bytes)
                self._act(target, receiver, lambda: receiver.take(sender, message, len(data)))

        self.at(end_s + link.latency_s, arrive)

    def _follow_root(self, root: Node) -> None:
        """Take what the root has written down; in a new round, let the world change."""
        self.records += root.records
        root.records = []
        if root.round > self._round and not root.is_finished:
            self._round = root.round
            for hook in self.on_round:
                hook(self, root.round)


class Migration:
    """A `RoundHook`: in every round a share of the leaves moves to other nodes of their parent's depth.

    Args:
        tree: Where the leaves begin.
        share: Of the leaves, in a round.
        seed: Decides who moves where.

    Raises:
        ConfigError: Nobody would move: the share is of less than a leaf, or no parent of leaves has another beside it.
    """

    def __init__(self, tree: Tree, share: float, seed: int) -> None:
        self._leaves, self._count, self._seed = tree.leaves, round(share * len(tree.leaves)), seed
        self._depth = {id: tree.depth(id) for id in tree.parents}
        self._inner = [id for id in tree.parents if tree.children(id)]
        if not self._count:
            raise ConfigError(
                f"a share of {share:g} moves none of {len(self._leaves)} leaves.",
                fix=f"give --migrate {1 / len(self._leaves):.2g} or more.",
            )
        if not any(self._others(tree.parents[leaf]) for leaf in self._leaves):
            raise ConfigError(
                "no leaf has another parent to move to: no other node with children is as deep as its own.",
                fix="leave --migrate out, or add such a node.",
            )

    def __call__(self, simulation: Simulation, round_index: int) -> None:
        """Let leaves move, in the middle of the round if they are at work."""
        generator = generator_of("migration", self._seed, round_index)
        for index in torch.randperm(len(self._leaves), generator=generator)[: self._count].tolist():
            leaf = self._leaves[index]
            if leaf not in simulation.nodes:  # its data are missing
                continue
            others = self._others(simulation.nodes[leaf].node.parent)
            if others:
                pick = int(torch.randint(len(others), (), generator=generator))
                simulation.move(leaf, others[pick])

    def _others(self, parent: NodeId | None) -> list[NodeId]:
        """Return the inner nodes as deep as a parent."""
        assert parent is not None
        return [id for id in self._inner if id != parent and self._depth[id] == self._depth[parent]]
