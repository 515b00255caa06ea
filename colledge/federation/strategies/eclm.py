"""ECLM (arXiv 2311.11083), also called Nebula: a cloud model cut into modules, a fitting sub-model for every device.

    parent ── selector ──────────────────────────▶ child     once
           ◀── importance of modules, limits ─────           from its own data; a node's is the mean of its children's
           ── modules that it lacks ─────────────▶           a sub-model that fits: the most important modules
           ◀── what it trained, importance ───────           merged module by module, weighted by importance

The cloud trains modules and selector on public data first (`offline`). The selector stays as it is from then on (ours),
so that gates travel with the rows and a sub-model trains anywhere. Every node of the tree derives its children's
sub-models from its own. What all sub-models share is averaged by samples, as in FedAvg (ours).

What a child lacks are tensors whose values are not those that it has. So when its data shift, it gets the modules that
it had not, and of the others those that neighbours changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from math import inf
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from colledge.arrays import Array
from colledge.data.labelled import Labelled
from colledge.errors import ConfigError, ModelError
from colledge.federation.derivation import RESOURCES, Costs, derive, module_costs
from colledge.federation.learning import LocalSettings, local_batches, weighted_mean
from colledge.federation.message import MessageError, Payload
from colledge.federation.offline import OfflineSettings, train_offline
from colledge.federation.strategy import Self, Strategy
from colledge.federation.trainer import forward_flops, module_flops
from colledge.federation.transport import NodeId
from colledge.models import SequentialModel, initial_weights
from colledge.models.layered import DTYPES
from colledge.models.modular import GATES, Held, Modular, module_of
from colledge.models.selector import Selector
from colledge.records import Record
from colledge.units import Bytes, Seconds

_MODEL, _SELECTOR = "model/", "selector/"  # of tensors' names
_PASSES = 3  # a training step is as much work as three forwards


class Budget(Record):
    """What a node's sub-model may take; it keeps to all that is given, and to its device's memory.

    `share` is of what the whole model takes: of memory, of computing, and of being sent. `memory` is what training
    takes, `flops` a row's forward, `transfer` the sub-model's bytes. In `round` seconds its device must be able to
    train a round, and its link to fetch the sub-model, as far as their speeds are known.
    """

    share: float | None = Field(default=None, gt=0, le=1)
    memory_bytes: Bytes | None = Field(default=None, alias="memory", gt=0)
    flops: float | None = Field(default=None, gt=0)
    transfer_bytes: Bytes | None = Field(default=None, alias="transfer", gt=0)
    round_s: Seconds | None = Field(default=None, alias="round", gt=0)


class ECLMSettings(Record):
    """How the cloud's model is cut, how it and its selector begin, and what nodes may hold.

    The `modules`, of `width` times the channels, of which a row uses `top_k`, are those of `models.modular`;
    `selector_width` is that of the selector. `budget` is of every node below the root, `budgets` of nodes by their id,
    or by the name that a `count` of them has in common.
    """

    modules: int = Field(default=16, ge=2, strict=True)
    top_k: int = Field(default=2, ge=1, strict=True)
    width: float = Field(default=0.125, gt=0, le=1)
    selector_width: int = Field(default=32, ge=1, strict=True)
    offline: OfflineSettings = OfflineSettings()
    budget: Budget = Budget(share=0.5)
    budgets: dict[str, Budget] = Field(default_factory=dict)

    def budget_of(self, id: NodeId) -> Budget:
        """Return a node's budget."""
        return self.budgets.get(id) or self.budgets.get(re.sub(r"-\d+$", "", id)) or self.budget


_Share = Annotated[float, Field(ge=0, le=1)]


class _Task(Record):
    held: Held | None


class _Report(Record):
    """What a child says of itself: `importance` is None without a selector, `holds` whether it has its sub-model."""

    samples: int = Field(ge=0)
    holds: bool
    limits: tuple[Annotated[float, Field(ge=0)] | None, ...] = Field(
        min_length=len(RESOURCES), max_length=len(RESOURCES)
    )
    importance: tuple[tuple[_Share, ...], ...] | None


class _Child(Record):
    """What a node knows of a child: its last report, and what it was given."""

    report: _Report
    held: Held | None = None


class _State(Record):
    held: Held | None
    children: dict[NodeId, _Child]
    has: dict[NodeId, frozenset[str]]


class ECLM(Strategy):
    """A node of ECLM.

    Args:
        node: Where this runs; its model is the one that is cut, the same at all nodes.
        settings: Of modules and budgets.
        local: How nodes train.

    Raises:
        ConfigError: The root has no public data, or the model cannot be cut so.
    """

    def __init__(self, node: Self, settings: ECLMSettings, local: LocalSettings) -> None:
        self._node, self._settings, self._local = node, settings, local
        if node.is_root and node.public is None:
            raise ConfigError(f"{node.id!r} has no data to train modules on.", fix="give data.public.")
        cut = {"modules": settings.modules, "top_k": settings.top_k, "width": settings.width}
        self._whole = SequentialModel({"architecture": "modular", "base": node.model.spec.config, **cut})
        self._modular = Modular.model_validate(self._whole.spec.config)
        self._round = 0
        self._loss: float | None = None
        self._selector: Selector | None = None
        self._importance: Array | None = None
        self._samples = 0
        self._held: Held | None = None
        self._weights: dict[str, Tensor] = {}
        self._holds = False  # what the parent wants held, in this round
        self._updated: frozenset[str] = frozenset()  # tensors that this round's training changed
        self._children: dict[NodeId, _Child] = {}
        self._has: dict[
            NodeId, frozenset[str]
        ] = {}  # tensors that children have as they are here, in this round
        self._has_next: dict[
            NodeId, frozenset[str]
        ] = {}  # and in the next, which a round without merging empties
        self._largest_update = 0.0
        self._misfits: set[NodeId] = set()  # children whose limits no sub-model keeps

    def shift(self, data: Labelled) -> None:
        """Take other local examples: they are scored in the next round, and bring another sub-model."""
        self._node = replace(self._node, data=data)

    # -- a round -------------------------------------------------------------------------------------------------

    def receive(self, round_index: int, task: Payload | None) -> None:
        """Take the selector, and the modules that are lacking; score the own data."""
        self._round, self._updated, self._largest_update = round_index, frozenset(), 0.0
        self._misfits = set()
        self._has, self._has_next = self._has_next, {}
        if task is None:
            self._holds = True
            if self._selector is None:
                self._begin()
            return
        held = task.parse(_Task).held
        if any(name.startswith(_SELECTOR) for name in task.tensors):
            self._selector = self._received_selector(task)
        self._holds = held is not None and self._take(held, task)
        data = self._node.data
        if data is not None and self._selector is not None:
            gates = self._gates(data.inputs)
            self._importance = gates.softmax(-1).double().mean(0).numpy()
            self._samples = data.num_rows

    def task(self, child: NodeId) -> Payload:
        """Return a child's sub-model as far as it lacks it; to a new child, the selector."""
        known = self._children.get(child)
        if known is None:
            selector = {} if self._selector is None else self._selector.state_dict()
            return Payload({"held": None}, {_SELECTOR + name: t for name, t in selector.items()})
        held = self._derived(known.report) if self._holds else None
        if self._holds and held is None:
            self._misfits.add(child)
        self._children[child] = known.model_copy(update={"held": held})
        lacking = set() if held is None else self._shapes(held).keys() - self._has.get(child, frozenset())
        fields = _Task(held=held).model_dump(mode="json")
        return Payload(fields, {_MODEL + name: self._weights[name] for name in sorted(lacking)})

    def check(self, child: NodeId, answer: Payload) -> None:
        """Check the report, and that tensors are of the sub-model that the child was given."""
        importance = answer.parse(_Report).importance
        wanted = (self._settings.modules,) * self._modular.num_blocks
        if importance is not None and tuple(map(len, importance)) != wanted:
            raise MessageError(f"a malformed payload: importance of {len(importance)} blocks' modules.")
        known = self._children.get(child)
        shapes = {} if known is None or known.held is None else self._shapes(known.held)
        for name in answer.tensors:
            shape = shapes.get(name.removeprefix(_MODEL))
            if shape is None:
                raise MessageError(f"a malformed payload: {name!r} is not of the sub-model that was given.")
            answer.tensor(name, shape)

    def merge(self, answers: Mapping[NodeId, Payload]) -> None:
        """Average every module over the children that hold it, weighted by its importance to each."""
        reports = {child: answer.parse(_Report) for child, answer in answers.items()}
        trained: dict[str, dict[NodeId, float]] = {}  # whose values of a tensor came, and what they weigh
        for child, answer in answers.items():
            for name in answer.tensors:
                weight = self._weight(reports[child], name.removeprefix(_MODEL))
                trained.setdefault(name.removeprefix(_MODEL), {})[child] = weight
        merged = {
            name: weighted_mean(
                [(weight, answers[child].tensors[_MODEL + name]) for child, weight in weights.items()]
            )
            for name, weights in trained.items()
            if sum(weights.values()) > 0
        }
        self._note_update(answers)
        if merged:
            assert self._held is not None
            self._set(self._held, {**self._weights, **merged})
        self._updated = frozenset(merged)
        self._note_children(reports, trained)

    def _weight(self, report: _Report, name: str) -> float:
        """Return what a child's values of a tensor weigh: its module's importance; samples for what is shared."""
        module = module_of(name)
        if module is None or report.importance is None:
            return float(report.samples)
        return report.importance[module[0]][module[1]]

    def _note_children(
        self, reports: Mapping[NodeId, _Report], trained: Mapping[str, Mapping[NodeId, float]]
    ) -> None:
        """Keep what children said, and which tensors they have as they are here now.

        These are what a child alone trained, and what it has and nobody trained. Who did not answer may have anything.
        """
        for child, report in reports.items():
            known = self._children.pop(child, None)
            if report.importance is None:
                continue
            held = None if known is None else known.held
            names = self._shapes(held) if report.holds and held is not None else {}
            has = {n for n in names if all(c == child and w > 0 for c, w in trained.get(n, {}).items())}
            self._children[child] = _Child(report=report, held=held)
            self._has_next[child] = frozenset(has)
        scored = [report for report in reports.values() if report.importance is not None and report.samples]
        self._samples = sum(report.samples for report in scored)
        if scored:
            weights = [report.samples for report in scored]
            mean: Array = np.average([report.importance for report in scored], axis=0, weights=weights)
            self._importance = mean.clip(0, 1)

    def learn(self) -> None:
        """Train the sub-model on the own data."""
        data = self._node.data
        if data is None or not self._holds:
            return
        gated = Labelled({**data.inputs, GATES: self._gates(data.inputs)}, data.labels, data.num_classes)
        names = (self._node.seed, self._node.id, self._round)
        self._loss = self._node.trainer.train(local_batches(gated, self._local, names)).loss
        self._weights = self._node.trainer.weights()
        self._updated = frozenset(self._weights)

    def answer(self) -> Payload:
        """Return what training changed, and what this node's modules are worth to it."""
        report = _Report(
            samples=self._samples,
            holds=self._holds,
            limits=tuple(None if limit == inf else float(limit) for limit in self._limits()),
            importance=None if self._importance is None else tuple(map(tuple, self._importance.tolist())),
        )
        tensors = {_MODEL + name: self._weights[name] for name in sorted(self._updated)}
        return Payload(report.model_dump(mode="json"), tensors)

    def forget(self, child: NodeId) -> None:
        """Drop what is known of a child."""
        self._children.pop(child, None)

    def _gates(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the selector's logits for some rows."""
        assert self._selector is not None
        x = inputs[self._selector.input_name]
        with self._node.trainer.beside(len(x) * module_flops(self._selector, x[:1])):
            return self._selector.gates(inputs)

    # -- sub-models ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """At the root, before the first round: train all modules and their selector on the public data."""
        node, settings = self._node, self._settings
        assert node.public is not None
        self._selector = Selector(self._modular, settings.selector_width, node.seed)
        weights = initial_weights(self._whole.spec, node.seed)
        with node.trainer.beside(self._offline_flops(node.public)):
            weights = train_offline(
                self._whole, weights, self._selector, settings.top_k, node.public, settings.offline, node.seed
            )
        self._set(self._all_modules(), weights)

    def _offline_flops(self, public: Labelled) -> float:
        """Return the operations of both stages at the cloud."""
        rows = {name: tuple(tensor.shape[1:]) for name, tensor in public.inputs.items()}
        rows[GATES] = (self._modular.num_blocks, self._modular.modules)
        layers = (0, len(self._whole.layer_names))
        a_row = forward_flops(self._whole.spec.to_json(), layers, tuple(sorted(rows.items())))
        epochs = self._settings.offline.epochs + self._settings.offline.enhance_epochs
        assert self._selector is not None
        a_row += module_flops(self._selector, public.inputs[self._modular.input_name][:1])
        return 3.0 * epochs * public.num_rows * a_row

    def _all_modules(self) -> Held:
        return (tuple(range(self._settings.modules)),) * self._modular.num_blocks

    def _set(self, held: Held, weights: dict[str, Tensor]) -> None:
        self._held, self._weights = held, weights
        config = {**self._whole.spec.config, "held": held}
        self._node.trainer.load(SequentialModel(config), weights)

    def _take(self, held: Held, task: Payload) -> bool:
        """Take a sub-model; return False where neither the task nor this node has all of it."""
        if len(held) != self._modular.num_blocks or not all(held):
            raise MessageError("a malformed payload: a sub-model has modules in every block.")
        shapes = self._shapes(held)
        new = {n: task.tensor(_MODEL + n, shape) for n, shape in shapes.items() if _MODEL + n in task.tensors}
        weights = {**self._weights, **new}
        if not shapes.keys() <= weights.keys():
            return False
        try:
            self._set(held, {name: weights[name] for name in shapes})
        except ModelError as fault:
            raise MessageError(f"a malformed payload: {fault.message}") from None
        self._has = {child: names - new.keys() for child, names in self._has.items()}
        return True

    @cached_property
    def _whole_shapes(self) -> dict[str, tuple[int, ...]]:
        layers = (self._whole.layer_parameters(index) for index in range(len(self._whole.layer_names)))
        return {name: shape for layer in layers for name, shape in layer.items()}

    def _shapes(self, held: Held) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a sub-model's tensors, by name."""
        return {
            name: shape
            for name, shape in self._whole_shapes.items()
            if (module := module_of(name)) is None or module[1] in held[module[0]]
        }

    def _received_selector(self, task: Payload) -> Selector:
        selector = Selector(self._modular, self._settings.selector_width, self._node.seed)
        shapes = {name: tuple(tensor.shape) for name, tensor in selector.state_dict().items()}
        selector.load_state_dict(
            {name: task.tensor(_SELECTOR + name, shape) for name, shape in shapes.items()}
        )
        return selector.requires_grad_(False)

    @cached_property
    def _costs(self) -> Costs:
        optimizer = self._local.optimizer
        num_states = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
        return module_costs(
            self._modular,
            self._node.row_shape,
            self._local.batch_size,
            DTYPES[self._local.precision],
            2 + num_states,
        )

    def _derived(self, report: _Report) -> Held | None:
        """Return the modules of a child's sub-model; None where nothing fits."""
        assert self._held is not None
        limits = np.array([inf if limit is None else limit for limit in report.limits])
        return derive(np.array(report.importance), self._costs, limits, self._held)

    def _limits(self) -> Array:
        """Return what this node's sub-model may take, in the order of `RESOURCES`."""
        budget, device = self._settings.budget_of(self._node.id), self._node.device
        limits = np.array([budget.memory_bytes or inf, budget.flops or inf, budget.transfer_bytes or inf])
        known = np.array([device.memory_bytes or inf, inf, inf])
        if budget.round_s is not None:
            num_rows = 0 if self._node.data is None else self._node.data.num_rows * self._local.epochs
            if device.flops_per_s is not None and num_rows:
                known[1] = budget.round_s * device.flops_per_s / (_PASSES * num_rows)
            if device.bandwidth_bytes_per_s is not None:
                known[2] = budget.round_s * device.bandwidth_bytes_per_s
        share = inf if budget.share is None else budget.share
        least: Array = np.minimum(np.minimum(limits, known), share * self._costs.whole)
        return least

    # -- what is seen of it, and kept ----------------------------------------------------------------------------

    def _note_update(self, answers: Mapping[NodeId, Payload]) -> None:
        """Note the largest of children's updates, in norms of what they began with: it grows where they diverge."""
        largest = 0.0
        for answer in answers.values():
            pairs = [(self._weights[name.removeprefix(_MODEL)], t) for name, t in answer.tensors.items()]
            norm = sum(float(before.double().square().sum()) for before, _ in pairs)
            moved = sum(float((after - before).double().square().sum()) for before, after in pairs)
            largest = max(largest, (moved / norm) ** 0.5 if norm else 0.0)
        self._largest_update = largest

    @property
    def figures(self) -> Mapping[str, float]:
        """The largest module's load in every block, the share that is held, children's updates and misfits.

        `load.N` is 1 where one module of block N takes all (collapse) and 1 / modules where all share alike;
        `held` is of the whole model's bytes; `largest_update` of a child is relative to what it began with;
        `over_budget` counts children whose limits no sub-model keeps, and which so have none.
        """
        figures: dict[str, float] = {}
        if self._children:
            figures = {"largest_update": self._largest_update, "over_budget": len(self._misfits)}
        if self._importance is not None:
            figures |= {f"load.{block}": float(load.max()) for block, load in enumerate(self._importance)}
        if self._held is not None:
            figures["held"] = float((self._costs.of(self._held) / self._costs.whole)[-1])
        return figures

    def state(self) -> Payload:
        """Return the model, the selector, and what is known of children."""
        tensors = {_MODEL + name: tensor for name, tensor in self._weights.items()}
        if self._selector is not None:
            tensors |= {_SELECTOR + name: tensor for name, tensor in self._selector.state_dict().items()}
        state = _State(held=self._held, children=self._children, has=self._has_next)
        return Payload(state.model_dump(mode="json"), tensors)

    def restore(self, state: Payload) -> None:
        """Go on from such a state."""
        kept = state.parse(_State)
        self._children, self._has_next = dict(kept.children), dict(kept.has)
        if any(name.startswith(_SELECTOR) for name in state.tensors):
            self._selector = self._received_selector(state)
        if kept.held is not None:
            weights = {n.removeprefix(_MODEL): t for n, t in state.tensors.items() if n.startswith(_MODEL)}
            self._set(kept.held, weights)

    def predict(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Return the logits of this node's sub-model for some rows; None as long as it holds none."""
        if self._selector is None or self._held is None:
            return None
        return self._node.trainer.predict({**inputs, GATES: self._gates(inputs)})

    @property
    def loss(self) -> float | None:
        """The mean loss of the last local training."""
        return self._loss
