"""ECLM: sub-models that fit, merged module by module; nothing fetched twice; signs of failure are seen."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colledge.data.images import load_images
from colledge.data.labelled import Labelled
from colledge.data.partition import SplitSettings, deal
from colledge.errors import ColledgeError, ConfigError
from colledge.federation.build import TestSet as Accuracy
from colledge.federation.clock import VirtualClock
from colledge.federation.learning import LocalSettings
from colledge.federation.message import Message, MessageError, Payload, encode
from colledge.federation.node import Kind, Node
from colledge.federation.offline import (
    OfflineSettings,
    assignment,
    gate_targets,
    imbalance,
    loads,
    subtasks_of,
    train_offline,
)
from colledge.federation.record import NodeRound
from colledge.federation.rounds import RoundSettings
from colledge.federation.simulation import Link, Simulated, Simulation
from colledge.federation.strategies.eclm import ECLM, Budget, ECLMSettings
from colledge.federation.strategy import Device, Self
from colledge.federation.trainer import DeviceTrainer, forward_flops
from colledge.federation.tree import Tree
from colledge.models import SequentialModel, initial_weights
from colledge.models.modular import Modular, gate_weights, module_of
from colledge.models.selector import Selector
from colledge.settings import OptimizerSettings
from tests.federation.toy import Memory

CNN = {"architecture": "cnn", "channels": [8, 16], "image": [1, 8, 8], "classes": 10}
LLAMA = {
    "architecture": "llama",
    "vocabulary": 128,
    "hidden": 32,
    "intermediate": 64,
    "heads": 4,
    "kv_heads": 2,
    "blocks": 2,
}
TREE = {"cloud": None, "edge-0": "cloud", "edge-1": "cloud"} | {f"end-{i}": f"edge-{i % 2}" for i in range(4)}
STAR = {"cloud": None, "a": "cloud", "b": "cloud"}
OFFLINE = OfflineSettings(epochs=6, enhance_epochs=2, batch_size=32, learning_rate=3e-3)
SETTINGS = ECLMSettings(modules=6, width=0.25, offline=OFFLINE, budget=Budget(share=0.6))
LOCAL = LocalSettings(
    epochs=1, batch_size=16, optimizer=OptimizerSettings(name="sgd", learning_rate=0.02, momentum=0.9)
)


@cache
def digits() -> tuple[Labelled, tuple[Labelled, ...], Labelled]:
    """Return public rows, four parts of two or three classes each, and the test set."""
    train = load_images("digits", "train")
    rest = torch.arange(400, train.num_rows)
    dealt = deal(train.labels[rest], 4, SplitSettings(classes=3), seed=0)
    return (
        train.take(torch.arange(400)),
        tuple(train.take(rest[p]) for p in dealt),
        load_images("digits", "test"),
    )


def of_classes(*classes: int) -> Labelled:
    """Return 120 rows of some classes that are not public."""
    train = load_images("digits", "train")
    rows = torch.arange(400, train.num_rows)
    return train.take(rows[torch.isin(train.labels[rows], torch.tensor(classes))][:120])


@dataclass
class World:
    """A simulated federation of ECLM on one tree."""

    parents: Mapping[str, str | None]
    data: Mapping[str, Labelled]
    public: Labelled
    base: Mapping[str, Any] = field(default_factory=lambda: CNN)
    settings: ECLMSettings = SETTINGS
    local: LocalSettings = LOCAL
    rounds: int = 4
    row_shape: tuple[int, ...] = (1, 8, 8)
    test: Labelled | None = None
    devices: Mapping[str, Device] = field(default_factory=dict)
    on_round: Any = None

    def __post_init__(self) -> None:
        self.tree = Tree(self.parents)
        self.stores = {id: Memory() for id in self.parents}
        self.clocks = {id: VirtualClock() for id in self.parents}
        places = {id: Simulated(self.make(id), self.clocks[id], Link(0.01)) for id in self.parents}
        self.simulation = Simulation(self.tree.root, places, [] if self.on_round is None else [self.on_round])

    def strategy_of(self, id: str, trainer: DeviceTrainer) -> ECLM:
        model, parent = SequentialModel(self.base), self.parents[id]
        own = Self(
            id=id,
            depth=0 if parent is None else 1,
            trainer=trainer,
            model=model,
            weights=initial_weights(model.spec, 0),
            data=self.data.get(id),
            public=self.public if parent is None else None,
            row_shape=self.row_shape,
            num_classes=self.public.num_classes,
            seed=0,
            device=self.devices.get(id, Device()),
        )
        return ECLM(own, self.settings, self.local)

    def make(self, id: str) -> Node:
        trainer = DeviceTrainer(self.local.optimizer, self.local.precision, self.clocks[id])
        judge = None if self.test is None else Accuracy(self.test, None, self.rounds)
        limits = RoundSettings(count=self.rounds, deadline=1e6, first_deadline=1e6)
        return Node(
            id,
            self.parents[id],
            self.tree.children(id),
            self.strategy_of(id, trainer),
            trainer,
            limits,
            self.clocks[id],
            {},
            {},
            self.stores[id],
            judge,
        )

    def run(self) -> list[NodeRound]:
        return self.simulation.run()

    def strategy(self, id: str) -> ECLM:
        found = self.simulation.nodes[id].node.strategy
        assert isinstance(found, ECLM)
        return found

    def weights(self, id: str = "cloud") -> dict[str, Tensor]:
        state = self.strategy(id).state()
        return {n.removeprefix("model/"): t for n, t in state.tensors.items() if n.startswith("model/")}

    def held(self, id: str) -> list[list[int]]:
        held = self.strategy(id).state().fields["held"]
        assert isinstance(held, list)
        return held


def digits_world(**more: Any) -> World:
    public, parts, _ = digits()
    return World(TREE, {f"end-{i}": part for i, part in enumerate(parts)}, public, **more)


# -- a whole run -------------------------------------------------------------------------------------------------


@cache
def run_of_digits() -> tuple[World, list[NodeRound], list[list[float]]]:
    """Return a run, and in each of its rounds how much of each device's own classes the cloud's model gets right."""
    seen: list[list[float]] = []

    def look(simulation: Simulation, round_index: int) -> None:
        seen.append([on_own_classes(simulation, "cloud", i) for i in range(4)])

    world = digits_world(on_round=look)
    return world, world.run(), seen


def on_own_classes(simulation: Simulation, judged: str, leaf: int) -> float:
    _, parts, test = digits()
    rows = torch.isin(test.labels, parts[leaf].labels.unique()).nonzero()[:, 0]
    predicted = simulation.nodes[judged].node.strategy.predict(test.take(rows).inputs).argmax(-1)
    return float((predicted == test.labels[rows]).double().mean())


def test_devices_hold_what_fits_and_know_their_classes() -> None:
    world, records, cloud = run_of_digits()
    last = {record.node: record for record in records if record.round == 4}
    assert last["cloud"].figures["held"] == 1
    own = [on_own_classes(world.simulation, f"end-{i}", i) for i in range(4)]
    assert min(own) > 0.85
    assert sum(own) > sum(cloud[0]) + 0.2  # than the cloud's model before there were rounds
    for id in TREE:
        if id != "cloud":
            assert 0 < last[id].figures["held"] <= 0.6
    for i in range(4):
        leaf, edge = world.held(f"end-{i}"), world.held(f"edge-{i % 2}")
        assert all(some and set(some) <= set(of) for some, of in zip(leaf, edge, strict=True))
        losses = [r.loss for r in records if r.node == f"end-{i}"]
        assert losses[0] is None  # the first round brings the selector alone
        assert losses[1] > losses[-1]
    assert len({str(world.held(f"end-{i}")) for i in range(4)}) > 1  # each fits its own data


def test_no_tensor_moves_but_of_modules_that_some_device_trained() -> None:
    world, _, _ = run_of_digits()
    trained = {(b, m) for i in range(4) for b, some in enumerate(world.held(f"end-{i}")) for m in some}
    public, _, _ = digits()
    modular = Modular.model_validate(
        {"architecture": "modular", "base": CNN, "modules": 6, "top_k": 2, "width": 0.25}
    )
    model = SequentialModel(modular.model_dump())
    begun = train_offline(
        model, initial_weights(model.spec, 0), Selector(modular, 32, 0), 2, public, OFFLINE, 0
    )
    assert len(trained) < 12
    for name, tensor in world.weights().items():
        moved = not torch.equal(tensor, begun[name])
        assert moved == (module_of(name) is None or module_of(name) in trained), name


CHAIN = {"cloud": None, "edge": "cloud", "a": "edge", "b": "edge"}


def small_world(parents: Mapping[str, str | None]) -> World:
    """Return a federation whose cloud begins with hardly any training."""
    offline = OFFLINE.model_copy(update={"epochs": 1, "enhance_epochs": 1})
    settings = SETTINGS.model_copy(update={"offline": offline})
    return World(parents, {"a": of_classes(0, 1), "b": of_classes(7)}, digits()[0], settings=settings)


def test_a_run_is_the_same_whoever_dies_and_comes_back() -> None:
    undisturbed = small_world(CHAIN)
    records = undisturbed.run()
    assert undisturbed.strategy("cloud").loss is None
    moments = {r.round: r.ended_s for r in records if r.node == "cloud"}
    for id in ("a", "edge", "cloud"):
        world = small_world(CHAIN)
        simulation = world.simulation
        simulation.at(moments[2] + 1e-4, lambda simulation=simulation, id=id: simulation.kill(id))
        simulation.at(1e3, lambda world=world, id=id: world.simulation.restart(id, world.make(id)))
        assert max(r.ended_s for r in world.run()) > 1e3
        for node in CHAIN:
            seen, wanted = world.weights(node), undisturbed.weights(node)
            assert seen.keys() == wanted.keys()
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in seen.items())


# -- merging -----------------------------------------------------------------------------------------------------


def report(importance: np.ndarray[Any, Any] | None, samples: int = 10, holds: bool = True) -> dict[str, Any]:
    rows = None if importance is None else importance.tolist()
    return {"samples": samples, "holds": holds, "limits": [None, None, 9000.0], "importance": rows}


def rooted() -> tuple[World, ECLM]:
    """Return a cloud that has trained its modules, and knows two children's importance."""
    world = small_world(STAR)
    root = world.strategy("cloud")
    root.receive(1, None)
    return world, root


def scores(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).dirichlet(np.ones(6), 2)


def test_modules_are_averaged_by_importance_and_the_rest_by_samples() -> None:
    _, root = rooted()
    importance = {"a": scores(1), "b": scores(2)}
    samples = {"a": 30, "b": 10}
    root.merge({c: Payload(report(importance[c], samples[c], holds=False)) for c in "ab"})
    root.receive(2, None)
    tasks = {c: root.task(c) for c in "ab"}
    before = {n: t.clone() for n, t in root.state().tensors.items()}
    generator = torch.Generator().manual_seed(0)
    sent = {
        c: {n: t + torch.randn(t.shape, generator=generator) for n, t in tasks[c].tensors.items()}
        for c in "ab"
    }
    answers = {c: Payload(report(importance[c], samples[c]), sent[c]) for c in "ab"}
    for child, answer in answers.items():
        root.check(child, answer)
    root.merge(answers)
    kinds = set()
    for name, after in root.state().tensors.items():
        if not name.startswith("model/"):
            continue
        holders = [c for c in "ab" if name in sent[c]]
        of = module_of(name.removeprefix("model/"))
        kinds.add((of is None, len(holders)))
        weights = [samples[c] if of is None else importance[c][of] for c in holders]
        expected = before[name].double()
        if holders:
            expected = sum(w * sent[c][name].double() for w, c in zip(weights, holders, strict=True)) / sum(
                weights
            )
        torch.testing.assert_close(after.double(), expected, rtol=1e-6, atol=1e-6)
    assert kinds >= {(True, 2), (False, 0), (False, 1), (False, 2)}
    assert root.figures["largest_update"] > 1


def test_what_a_child_has_is_not_sent_again() -> None:
    _, root = rooted()
    importance = {"a": scores(1), "b": scores(2)}
    root.merge({c: Payload(report(importance[c], holds=False)) for c in "ab"})
    root.receive(2, None)
    first = {c: root.task(c).tensors for c in "ab"}
    root.merge({c: Payload(report(importance[c]), {n: t + 1 for n, t in first[c].items()}) for c in "ab"})
    root.receive(3, None)
    second = {c: root.task(c).tensors for c in "ab"}
    for child, other in ("ab", "ba"):
        assert second[child].keys() == first[child].keys() & first[other].keys()  # b changed what a has
    root.merge({"a": Payload(report(importance["a"]), {n: t + 1 for n, t in first["a"].items()})})
    root.receive(4, None)
    assert not root.task("a").tensors  # a alone trained: it has all as it is
    assert root.task("b").tensors.keys() == first["b"].keys()  # it did not answer, and may have anything
    root.receive(5, None)  # after a round that was given up
    assert root.task("a").tensors.keys() == first["a"].keys()


def test_a_child_that_lost_its_state_gets_everything_again() -> None:
    _, root = rooted()
    root.merge({"a": Payload(report(scores(1), holds=False))})
    root.receive(2, None)
    whole = root.task("a").tensors
    root.merge({"a": Payload(report(scores(1)), whole)})
    root.receive(3, None)
    assert not root.task("a").tensors
    root.merge({"a": Payload(report(scores(1), holds=False))})
    root.receive(4, None)
    assert root.task("a").tensors.keys() == whole.keys()
    root.merge({"a": Payload(report(None, holds=False))})
    root.receive(5, None)
    assert all(name.startswith("selector/") for name in root.task("a").tensors)


def test_a_new_process_without_its_state_says_so() -> None:
    world, root = rooted()
    root.merge({"a": Payload(report(scores(1), holds=False))})
    root.receive(2, None)
    task = root.task("a")
    leaf = world.strategy("a")
    leaf.receive(1, task)  # a model, and no selector
    assert leaf.answer().fields["importance"] is None
    with pytest.raises(MessageError, match="modules in every block"):
        leaf.receive(1, Payload({"held": [[0]]}))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"importance": [[1.0] * 6]}, "importance of 1 blocks"),
        ({"importance": [[2.0] * 6, [0.0] * 6]}, "importance"),
        ({"samples": -1}, "samples"),
        ({"limits": [None]}, "limits"),
    ],
)
def test_malformed_reports_are_refused(change: dict[str, Any], refusal: str) -> None:
    _, root = rooted()
    with pytest.raises(MessageError, match=refusal):
        root.check("a", Payload({**report(scores(1)), **change}))


def test_tensors_of_other_modules_are_refused() -> None:
    _, root = rooted()
    root.merge({"a": Payload(report(scores(1), holds=False))})
    root.receive(2, None)
    given = dict(root.task("a").tensors)
    foreign = next(n for n in root.state().tensors if n.startswith("model/") and n not in given)
    for tensors in ({foreign: root.state().tensors[foreign]}, {next(iter(given)): torch.zeros(1)}):
        with pytest.raises(MessageError, match="malformed"):
            root.check("a", Payload(report(scores(1)), tensors))


# -- data that shift ---------------------------------------------------------------------------------------------


def test_a_shift_brings_the_modules_that_are_lacking_and_no_others() -> None:
    sizes: dict[tuple[str, int], set[str]] = {}

    def change(simulation: Simulation, round_index: int) -> None:
        if round_index == 4:
            simulation.nodes["a"].node.strategy.shift(of_classes(6, 9))
        sizes["held", round_index] = {str(simulation.nodes["a"].node.strategy.state().fields["held"])}

    world = World(
        {"cloud": None, "a": "cloud"}, {"a": of_classes(0, 1)}, digits()[0], rounds=7, on_round=change
    )
    records = world.run()
    got = {r.round: r.links["cloud"].received_bytes for r in records if r.node == "a"}
    before, after = json.loads(sizes["held", 4].pop().replace("'", '"')), world.held("a")
    fetched = [set(new) - set(old) for old, new in zip(before, after, strict=True)]
    assert any(fetched)  # other data, other modules
    assert any(set(new) & set(old) for old, new in zip(before, after, strict=True))
    lacking = sum(
        t.nbytes
        for n, t in world.weights("a").items()
        if (of := module_of(n)) is not None and of[1] in fetched[of[0]]
    )
    whole = sum(t.nbytes for t in world.weights("a").values())
    empty = len(encode(Message(Kind.TASK, payload=Payload({"held": after}))))
    assert got[2] > whole
    assert abs(got[3] - empty) < 64  # what it trained alone is not sent back
    assert lacking < got[5] < lacking + empty + 4000  # names and shapes take some
    assert got[5] < 0.9 * got[2] < 0.9 * (whole + empty + 9000)
    assert abs(got[6] - empty) < 64


# -- budgets -----------------------------------------------------------------------------------------------------


def test_limits_are_the_least_of_budget_device_and_link() -> None:
    budgets = {"a": Budget(flops=5e4, round=2.0, share=0.9), "b": Budget(transfer=1500, memory="1 GB")}
    settings = SETTINGS.model_copy(update={"budgets": budgets})
    device = Device(memory_bytes=10**5, flops_per_s=1e6, bandwidth_bytes_per_s=3000.0)
    data = {"a": of_classes(0, 1), "b": of_classes(7)}
    world = World(STAR, data, digits()[0], settings=settings, devices={"a": device, "b": device})
    world.run()
    limits = {id: world.strategy(id).answer().fields["limits"] for id in "ab"}
    assert limits["a"] == [10**5, pytest.approx(2.0 * 1e6 / (3 * 120)), 6000.0]
    assert limits["b"] == [10**5, None, 1500.0]
    transfers = {id: sum(t.nbytes for t in world.weights(id).values()) for id in "ab"}
    assert transfers["a"] <= 6000
    assert 0 < transfers["b"] <= 1500 or not transfers["b"]


def test_groups_of_nodes_have_one_budget() -> None:
    small, one = Budget(share=0.1), Budget(share=0.2)
    settings = ECLMSettings(budgets={"end": small, "end-3": one})
    assert settings.budget_of("end-2") is small
    assert settings.budget_of("end-3") is one
    assert settings.budget_of("edge-0") == Budget(share=0.5)


def test_a_device_that_no_sub_model_fits_is_reported_and_has_none() -> None:
    settings = SETTINGS.model_copy(update={"budgets": {"b": Budget(memory="1 kB")}})
    data = {"a": of_classes(0, 1), "b": of_classes(7)}
    world = World(STAR, data, digits()[0], settings=settings, rounds=3, test=digits()[2])
    records = world.run()
    cloud = [r.figures["over_budget"] for r in records if r.node == "cloud"]
    assert cloud == [0, 1, 1]
    assert all(r.loss is None for r in records if r.node == "b")
    assert not world.weights("b")
    assert {r.node for r in records if r.round == 3 and r.accuracy is not None} == {"cloud", "a"}
    assert [r.loss is None for r in records if r.node == "a"] == [True, False, False]


# -- the offline stage -------------------------------------------------------------------------------------------


@cache
def cut(balance: float, enhance: float | None = None) -> tuple[Selector, Labelled]:
    public, _, _ = digits()
    modular = Modular.model_validate(
        {"architecture": "modular", "base": CNN, "modules": 6, "top_k": 2, "width": 0.25}
    )
    model, selector = SequentialModel(modular.model_dump()), Selector(modular, 32, 0)
    settings = OFFLINE.model_copy(
        update={
            "balance": balance,
            "noise": 0.0,
            "enhance": enhance or 0.0,
            "enhance_epochs": 0 if enhance is None else 6,
        }
    )
    with torch.no_grad():
        selector.head.bias.view(2, 6)[:, :2] += 3.0  # it begins collapsed: two modules of six take all
    train_offline(model, initial_weights(model.spec, 0), selector, 2, public, settings, 0)
    return selector, public


def test_selector_and_offline_stage_count_as_work() -> None:
    public, parts, _ = digits()
    world = World(STAR, {"a": parts[0], "b": parts[1]}, public, rounds=1)
    flops = {one.node: one.flops for one in world.simulation.run()}
    gates = 2 * (64 * 32 + 32 * 2 * 6)  # pixels to hidden, hidden to the modules of two blocks
    assert [flops[id] for id in "ab"] == [part.num_rows * gates for part in parts[:2]]  # in the first round
    whole = SequentialModel({"architecture": "modular", "base": CNN, "modules": 6, "top_k": 2, "width": 0.25})
    rows = (("gates", (2, 6)), ("pixels", (1, 8, 8)))
    a_row = forward_flops(whole.spec.to_json(), (0, len(whole.layer_names)), rows)
    assert flops["cloud"] == 3 * (6 + 2) * public.num_rows * (a_row + gates)


def test_balance_mends_a_collapse_that_is_seen_without_it() -> None:
    found = {}
    for balance in (0.0, 1.0):
        selector, public = cut(balance)
        gates = selector.gates(public.inputs)
        found[balance] = float(imbalance(gate_weights(gates, 2))), float(gates.softmax(-1).mean(0).max())
    assert found[0.0][0] > 1
    assert found[1.0][0] < 0.4
    assert found[0.0][1] > found[1.0][1]


def test_enhancing_moves_gates_to_what_sub_tasks_were_given() -> None:
    begun, public = cut(1.0)
    subtasks = subtasks_of(public, begun, 10, 0)
    targets = gate_targets(loads(begun.gates(public.inputs), subtasks, 2), OFFLINE)[subtasks].log()

    def divergence(selector: Selector) -> float:
        gates = selector.gates(public.inputs).log_softmax(-1)
        return float((gates.exp() * (gates - targets)).sum(-1).mean())

    without, enhanced = (divergence(cut(1.0, enhance)[0]) for enhance in (0.0, 1.0))
    assert enhanced < 0.5 * without


def test_modules_are_assigned_within_their_limits() -> None:
    generator = torch.Generator().manual_seed(3)
    load = torch.rand((10, 6), generator=generator, dtype=torch.float64).softmax(-1)
    limits = OFFLINE.model_copy(update={"modules_per_subtask": 2, "capacity": 1.0})
    mask = assignment(load.numpy(), limits)
    assert mask.sum(1).max() <= 2
    assert (mask * load.numpy()).sum(0).max() <= float(load.sum()) / 6 + 1e-9
    loose = assignment(load.numpy(), limits.model_copy(update={"capacity": 100.0}))
    best = load.topk(2, dim=-1).indices
    assert torch.equal(torch.tensor(loose).nonzero()[:, 1].view(10, 2), best.sort(-1).values)
    targets = gate_targets(load[:, None].expand(10, 3, 6).float(), limits)
    torch.testing.assert_close(targets.sum(-1), torch.ones(10, 3))


def test_sub_tasks_are_groups_of_classes_or_clusters_of_rows() -> None:
    selector, public = cut(1.0)
    assert torch.equal(subtasks_of(public, selector, 10, 0), public.labels)
    assert torch.equal(subtasks_of(public, selector, 5, 0), public.labels // 2)
    modular = Modular.model_validate({"architecture": "modular", "base": LLAMA, "modules": 4, "top_k": 2})
    for seed in range(10):
        draw = torch.Generator().manual_seed(seed)
        parts = [torch.randint(low, low + 2, (6, 12), generator=draw) for low in (0, 100)]
        rows = torch.cat(parts)
        found = subtasks_of(Labelled({"input_ids": rows}, rows, 128), Selector(modular, 16, 0), 2, 0)
        assert set(found[:6].tolist()) != set(found[6:].tolist())
        assert len(set(found[:6].tolist())) == len(set(found[6:].tolist())) == 1


def test_a_root_without_public_data_is_refused() -> None:
    public, _, _ = digits()
    world = World({"cloud": None, "a": "cloud"}, {"a": of_classes(0)}, public)
    node = world.strategy("cloud")._node
    with pytest.raises(ConfigError, match=r"no data to train modules on. Fix: give data.public"):
        ECLM(Self(**{**vars(node), "public": None}), SETTINGS, LOCAL)
    with pytest.raises(ColledgeError, match="cannot be cut"):
        ECLM(Self(**{**vars(node), "model": SequentialModel(LLAMA)}), ECLMSettings(modules=65), LOCAL)


# -- language models ---------------------------------------------------------------------------------------------


def source(*modules: Any) -> Labelled:
    """Return rows of 32 bytes of the standard library's own source."""
    text = "".join(inspect.getsource(module) for module in modules).encode("ascii", "replace")[: 32 * 96]
    rows = torch.tensor(list(text)).view(-1, 32)
    return Labelled({"input_ids": rows}, rows, 128)


def test_a_language_model_learns_in_parts() -> None:
    import argparse
    import heapq
    import textwrap

    offline = OFFLINE.model_copy(update={"epochs": 2, "enhance_epochs": 1, "subtasks": 3})
    budget = Budget(share=0.8)
    settings = ECLMSettings(modules=4, selector_width=8, offline=offline, budget=budget)
    adam = LocalSettings(batch_size=16, optimizer=OptimizerSettings(name="adamw", learning_rate=5e-3))
    data, held_out, seen = {"a": source(textwrap), "b": source(heapq)}, source(json), []

    def look(simulation: Simulation, round_index: int) -> None:
        logits = simulation.nodes["cloud"].node.strategy.predict(held_out.inputs)
        seen.append(float(F.cross_entropy(logits[:, :-1].flatten(0, 1), held_out.labels[:, 1:].flatten())))

    world = World(
        STAR,
        data,
        source(argparse),
        base=LLAMA,
        settings=settings,
        local=adam,
        rounds=8,
        row_shape=(32,),
        on_round=look,
    )
    records = world.run()
    for id in "ab":
        losses = [r.loss for r in records if r.node == id and r.loss is not None]
        assert losses[-1] < 0.8 * losses[0]
        assert 0 < next(r.figures["held"] for r in records if r.node == id and r.round == 8) <= 0.8
        assert any(len(some) < 4 for some in world.held(id))
    assert seen[-1] < seen[0] - 0.3  # on text that nobody trained on, by what devices learnt
