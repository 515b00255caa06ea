"""From federation.yaml to nodes: who holds which data, which model, and where it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from colledge.data.labelled import Labelled
from colledge.data.partition import deal
from colledge.errors import DataError, ModelError
from colledge.federation.clock import Clock, VirtualClock
from colledge.federation.config import FederationConfig, NodeConfig, expand, tree_of
from colledge.federation.modality import ImageModality, Modality, TextModality
from colledge.federation.node import Judge, Node, Store
from colledge.federation.record import FederationFacts, NodeFacts
from colledge.federation.strategies import discloses, make_strategy, strategy_class
from colledge.federation.strategy import Device, Self, Strategy
from colledge.federation.trainer import DeviceTrainer, Speed, Trainer
from colledge.federation.transport import NodeId
from colledge.federation.tree import Tree
from colledge.models import LayeredModel, SequentialModel, initial_weights
from colledge.models.generator import generator_of
from colledge.models.losses import IGNORED, aligned
from colledge.models.sequential import ARCHITECTURES
from colledge.profiles.catalog import catalog_device
from colledge.profiles.device import DeviceProfile, PowerMode


class Entrance(Protocol):
    """Tells what some rows of data are where they enter a node's model."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return it."""


def as_they_are(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the rows."""
    return inputs


@dataclass(frozen=True)
class TestSet:
    """A `Judge`: the share of some examples, or of their next tokens, that a model gets right, every few rounds.

    A model that takes children's features is judged only where `entering` gives them, as a simulation does.

    Args:
        data: The examples.
        every: Rounds between looks; None looks after the last one only.
        last: The last round.
        entering: What the node's model is given.
    """

    data: Labelled
    every: int | None
    last: int
    entering: Entrance = as_they_are

    def __call__(self, strategy: Strategy, round_index: int) -> float | None:
        """Return the accuracy, or None in a round without a look, without labels, or where rows alone do not do."""
        if round_index != self.last and (self.every is None or round_index % self.every):
            return None
        logits = strategy.predict(self.entering(self.data.inputs))
        if logits is None:
            return None
        labels = aligned(self.data.labels)
        right = (logits.argmax(-1) == labels)[labels != IGNORED]
        return float(right.double().mean()) if len(right) else None


class Federation:
    """A federation as its file describes it; the data are read once.

    Args:
        config: The file.
        idle_w: Watts that the pools of nodes draw while they idle, as far as they are known.

    Raises:
        ConfigError: The nodes are no tree, or the data cannot be read or dealt out.
    """

    def __init__(self, config: FederationConfig, idle_w: Mapping[NodeId, float] | None = None) -> None:
        self.config, self._idle_w = config, idle_w or {}
        self.nodes: dict[NodeId, NodeConfig] = expand(config.nodes)
        self.tree: Tree = tree_of(self.nodes)

    @cached_property
    def test(self) -> Labelled | None:
        """The common test set; None without common data."""
        data = self.config.data
        if data.source is None:
            return None
        return self._some(self.modality.common("test"), data.test_limit)

    @cached_property
    def modality(self) -> Modality:
        """What examples are, and look like everywhere."""
        data = self.config.data
        if data.text is not None:
            return TextModality(data.source, data.text, self.config.seed)
        return ImageModality(data.source, data.images)

    @cached_property
    def _train(self) -> Labelled:
        return self._some(self.modality.common("train"), self.config.data.limit)

    def _some(self, data: Labelled, limit: int | None) -> Labelled:
        if limit is None or limit >= data.num_rows:
            return data
        order = torch.randperm(data.num_rows, generator=generator_of("limit", self.config.seed))
        return data.take(self._in_order(order[:limit]))

    def _in_order(self, rows: Tensor) -> Tensor:
        """Return rows as they follow each other in the data where they are dealt so, else as they are."""
        return rows.sort().values if self.config.data.split.successive else rows

    @cached_property
    def _parts(self) -> dict[NodeId, Tensor]:
        """The rows of every leaf without data of its own, and of the root those that are public."""
        config, labels = self.config, self._train.labels
        order = torch.randperm(len(labels), generator=generator_of("public", config.seed))
        num_public = round(config.data.public * len(labels))
        rest = self._in_order(order[num_public:])
        leaves = [leaf for leaf in self.tree.leaves if self.nodes[leaf].data is None]
        dealt = deal(labels[rest], len(leaves), config.data.split, config.seed) if leaves else []
        parts = {leaf: rest[indices] for leaf, indices in zip(leaves, dealt, strict=True)}
        return {self.tree.root: order[:num_public], **parts}

    def data_of(self, id: NodeId) -> Labelled | None:
        """Return what a node learns from by itself: data of its own, a leaf else its part of the common data.

        Raises:
            DataError: The data are missing, damaged, or look otherwise than they should.
        """
        own = self.nodes[id].data
        if own is not None:
            return self.modality.own(own)
        if id not in self.tree.leaves:
            return None
        if self.config.data.source is None:
            raise DataError(f"{id!r} has no data.", fix="give it data, or give data.source.")
        return self._train.take(self._parts[id])

    @cached_property
    def public(self) -> Labelled | None:
        """The rows that all may see."""
        if self.config.data.source is None or not self.config.data.public:
            return None
        return self._train.take(self._parts[self.tree.root])

    def model_of(self, id: NodeId) -> LayeredModel:
        """Return a node's model.

        Raises:
            ModelError: Its configuration is not known, or not one for such data.
        """
        name, sizes = self.nodes[id].model, self.modality.model_sizes
        values = self.config.models[name]
        for key in sizes.keys() & values.keys():
            raise ModelError(f"models.{name}: {key} is there, and follows from the data.", fix="take it out.")
        try:
            return SequentialModel({**sizes, **values})
        except ModelError as fault:
            architecture, takers = str(values.get("architecture")), self.modality.takers
            if architecture in ARCHITECTURES and architecture not in takers:
                raise ModelError(
                    f"models.{name}: such data are for {' or '.join(takers)}, saw architecture {architecture}.",
                    fix="name another architecture.",
                ) from None
            raise ModelError(f"models.{name}: {fault.message}", fix=fault.fix or "mend it.") from None

    def profile_of(self, id: NodeId) -> DeviceProfile | None:
        """Return what the catalog knows of a node's device; None where it names none.

        Raises:
            ConfigError: The catalog has no such device.
        """
        device = self.nodes[id].device
        return None if device is None else catalog_device(device).profile(id, None)

    def power_of(self, id: NodeId) -> PowerMode | None:
        """Return what is known of the power and speed of a node's device.

        Raises:
            ConfigError: The catalog has no such device.
        """
        profile = self.profile_of(id)
        return None if profile is None else profile.modes[0]

    def _device_of(self, id: NodeId) -> Device:
        profile, bandwidth = self.profile_of(id), self.nodes[id].bandwidth_bytes_per_s
        if profile is None:
            return Device(bandwidth_bytes_per_s=bandwidth)
        return Device(profile.room_bytes, profile.modes[0].achieved_flops_per_s, bandwidth)

    @property
    def greeting(self) -> Mapping[str, JsonValue]:
        """What all nodes must agree on."""
        return {
            "strategy": self.config.strategy.model_dump(mode="json"),
            **self.modality.greeting,
            "seed": self.config.seed,
        }

    def facts(self, simulated: bool) -> FederationFacts:
        """Return who is in the federation."""
        nodes = []
        for id, node in self.nodes.items():
            power = self.power_of(id)
            idle_w = self._idle_w.get(id, None if power is None else power.idle_w)
            nodes.append(
                NodeFacts(
                    id=id,
                    parent=node.parent,
                    tier=self.tree.tier(id),
                    model=node.model,
                    idle_w=idle_w,
                    communicate_w=None if power is None else power.communicate_w,
                    bandwidth_bytes_per_s=node.bandwidth_bytes_per_s,
                )
            )
        strategy = self.config.strategy
        return FederationFacts(
            strategy=strategy.name,
            discloses=discloses(strategy, of_text=self.config.data.text is not None),
            judged=self.modality.judged,
            simulated=simulated,
            nodes=tuple(nodes),
        )

    def largest_batch(self, id: NodeId) -> int:
        """Return the most rows that a step of a node has."""
        has_data = self.nodes[id].data is not None or id in self.tree.leaves
        kind = strategy_class(self.config.strategy)
        return kind.largest_batch(self.config.local.batch_size, has_data)

    def device_trainer(self, id: NodeId, clock: Clock) -> Trainer:
        """Return the trainer of a node on one device; its speed is the catalog's in virtual time, its own in real."""
        mode, local, speed = self.power_of(id), self.config.local, Speed()
        if mode is not None:
            flops_per_s = mode.achieved_flops_per_s if isinstance(clock, VirtualClock) else None
            speed = Speed(flops_per_s, mode.compute_w - mode.idle_w)
        return DeviceTrainer(local.optimizer, local.precision, clock, speed)

    def node(
        self,
        id: NodeId,
        trainer: Trainer,
        clock: Clock,
        store: Store | None = None,
        parent: NodeId | None = None,
        entering: Entrance = as_they_are,
    ) -> Node:
        """Return a node that can start.

        Args:
            id: Its name.
            trainer: Where it trains.
            clock: Its time.
            store: Where its state is kept.
            parent: Another one than the file says, after a move.
            entering: What its model is given of the test set.

        Raises:
            DataError: Its data cannot be read.
        """
        config, model = self.config, self.model_of(id)
        is_root = id == self.tree.root
        own = Self(
            id=id,
            depth=self.tree.depth(id),
            trainer=trainer,
            model=model,
            weights=initial_weights(model.spec, config.seed),
            data=self.data_of(id),
            public=self.public if is_root else None,
            row_shape=self.modality.row_shape,
            num_classes=self.modality.num_classes,
            seed=config.seed,
            device=self._device_of(id),
        )
        return Node(
            id,
            parent or self.tree.parents[id],
            self.tree.children(id),
            make_strategy(config.strategy, own, config.local),
            trainer,
            config.rounds,
            clock,
            self.greeting,
            model.spec.model_dump(mode="json"),
            store,
            self._judge(is_root, entering),
        )

    def _judge(self, is_root: bool, entering: Entrance) -> Judge | None:
        if self.test is None:
            return None
        every = self.config.evaluate_every if is_root else None
        return TestSet(self.test, every, self.config.rounds.count, entering)
