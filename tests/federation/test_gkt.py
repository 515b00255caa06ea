"""FedGKT: the path through the tree learns more than its leaf, samples are told by their ids, nobody stalls a round."""

from __future__ import annotations

import bisect
import heapq
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from colledge.data.labelled import Labelled
from colledge.errors import ColledgeError, ConfigError
from colledge.federation.build import Federation
from colledge.federation.clock import VirtualClock
from colledge.federation.compression import Compression, compress, decompress
from colledge.federation.config import FederationConfig
from colledge.federation.learning import LocalSettings, mixture
from colledge.federation.message import MessageError, Payload
from colledge.federation.node import Node
from colledge.federation.record import NodeRound
from colledge.federation.rounds import RoundSettings
from colledge.federation.simulation import Link, RoundHook, Simulated, Simulation
from colledge.federation.strategies.gkt import GKT, GKTSettings
from colledge.federation.strategy import Self
from colledge.federation.trainer import DeviceTrainer, Speed
from colledge.launch.federate import make_simulation
from colledge.models import SequentialModel, initial_weights
from colledge.models.generator import generator_of
from colledge.models.losses import LOSSES
from colledge.settings import OptimizerSettings
from tests.federation.toy import Memory

DEVICE = {"device": "raspberry-pi-5", "bandwidth": "20 Mbit/s", "latency": "5 ms"}
TWO_TIERS = [
    {"id": "cloud", "model": "large"},
    {"id": "a", "parent": "cloud", "model": "small"},
    {"id": "b", "parent": "cloud", "model": "small"},
    {"id": "c", "parent": "cloud", "model": "small"},
]
THREE_TIERS = [
    {"id": "cloud", "model": "large"},
    {"id": "edge-0", "parent": "cloud", "model": "middle"},
    {"id": "edge-1", "parent": "cloud", "model": "middle"},
    {"id": "a", "parent": "edge-0", "model": "small"},
    {"id": "b", "parent": "edge-0", "model": "small"},
    {"id": "c", "parent": "edge-1", "model": "small"},
    {"id": "d", "parent": "cloud", "model": "middle"},  # a leaf beside edges
]


def federation(
    nodes: list[dict[str, str]] = TWO_TIERS,
    strategy: Mapping[str, object] | None = None,
    rounds: Mapping[str, object] | None = None,
    **changes: Any,
) -> Federation:
    values = {
        "strategy": {"name": "gkt", "cuts": [2, 1] if nodes is THREE_TIERS else [1], **(strategy or {})},
        "rounds": {"count": 2, **(rounds or {})},
        "data": {"source": "digits", "split": {"dirichlet": 1.0}, "limit": 240, "test_limit": 100},
        "models": {
            "small": {"architecture": "cnn", "channels": [8]},
            "middle": {"architecture": "cnn", "channels": [8, 12]},
            "large": {"architecture": "cnn", "channels": [8, 12, 32]},
        },
        "local": {
            "batch_size": 16,
            "optimizer": {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9},
        },
        "nodes": [{**DEVICE, **node} for node in nodes],
        **changes,
    }
    return Federation(FederationConfig.model_validate(values))


class World:
    """A simulation whose nodes can be made again."""

    def __init__(self, federation: Federation, *on_round: RoundHook) -> None:
        self.federation = federation
        self.clocks = {id: VirtualClock() for id in federation.nodes}
        self.stores = {id: Memory() for id in federation.nodes}
        places = {
            id: Simulated(self.make(id), self.clocks[id], Link(node.latency_s, node.bandwidth_bytes_per_s))
            for id, node in federation.nodes.items()
        }
        self.simulation = Simulation(federation.tree.root, places, on_round)

    def make(self, id: str) -> Node:
        trainer = self.federation.device_trainer(id, self.clocks[id])
        return self.federation.node(
            id, trainer, self.clocks[id], self.stores[id], entering=partial(self.entering, id)
        )

    def entering(self, id: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.simulation.entering(id, inputs)

    def run(self) -> list[NodeRound]:
        return self.simulation.run()

    def strategy(self, id: str) -> GKT:
        found = self.simulation.nodes[id].node.strategy
        assert isinstance(found, GKT)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return what all nodes know, by node and name."""
        return {
            f"{id} {name}": tensor
            for id in self.federation.nodes
            for name, tensor in self.strategy(id).state().tensors.items()
        }


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def accuracies(records: list[NodeRound]) -> dict[str, float]:
    """Return the last accuracy of each node."""
    return {record.node: record.accuracy for record in records if record.accuracy is not None}


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


# -- what is learnt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "dirichlet", "more"),
    [(TWO_TIERS, 0.5, 0.1), (THREE_TIERS, 2.0, 0.02)],
    ids=["two tiers", "three tiers"],
)
def test_the_path_to_the_cloud_is_better_than_the_edge_alone(
    nodes: list[dict[str, str]], dirichlet: float, more: float
) -> None:
    data = {"source": "digits", "split": {"dirichlet": dirichlet}}
    subject = federation(nodes, {"parent_epochs": 3}, {"count": 4}, data=data)
    found = accuracies(make_simulation(subject, Console()).run())
    edge_only = mean([found[leaf] for leaf in subject.tree.leaves])
    assert found["cloud"] > 0.9
    assert found["cloud"] > edge_only + more


def test_looking_at_accuracy_costs_and_changes_nothing() -> None:
    often, seldom = World(federation(evaluate_every=1)), World(federation(evaluate_every=2))
    lines = [[r.model_copy(update={"accuracy": None}) for r in world.run()] for world in (often, seldom)]
    assert lines[0] == lines[1]
    assert_same(often.state(), seldom.state())


def test_without_a_simulation_only_leaves_are_judged() -> None:
    subject = federation()
    clock = VirtualClock()
    node = subject.node("cloud", subject.device_trainer("cloud", clock), clock)
    assert subject.test is not None
    assert node.strategy.predict(subject.test.inputs) is None


def test_one_teacher_in_place_of_two_gives_their_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, one, two = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = torch.tensor([1.0, 0, 2, 0, 0.5, 1]).double(), torch.tensor([1.0, 1, 0, 0, 3, 1]).double()
    temperature, gradients = 3.0, []
    teacher, weight = mixture([(one, weights[0]), (two, weights[1])], temperature)
    targets = {
        "labels": torch.zeros(6, dtype=torch.int64),
        "teacher": teacher,
        "hard_weight": torch.zeros(6),
        "soft_weight": weight,
        "temperature": torch.full((6,), temperature),
    }
    z = student.clone().requires_grad_()
    LOSSES["distillation"].total(z, targets).backward()
    gradients.append(z.grad)
    z = student.clone().requires_grad_()
    for logits, by_row in zip((one, two), weights, strict=True):
        log_q, p = F.log_softmax(z / temperature, -1), F.softmax(logits / temperature, -1)
        torch.autograd.backward(
            temperature**2 * (by_row * F.kl_div(log_q, p, reduction="none").sum(-1)).sum()
        )
    gradients.append(z.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def text_nodes(models: Mapping[str, int], rounds: int) -> tuple[Simulation, Labelled]:
    """Return a tree of small Llamas, given how many blocks each node has, and text to be judged by."""
    source = b"".join(Path(module.__file__).read_bytes() for module in (textwrap, heapq, bisect))
    tokens = torch.tensor(list(source[: 320 * 32])).view(320, 32)
    text = Labelled({"input_ids": tokens}, tokens, 256).take(
        torch.randperm(320, generator=generator_of("text"))
    )
    adam = OptimizerSettings(name="adamw", learning_rate=3e-3)
    local = LocalSettings(batch_size=16, optimizer=adam)
    places = {}
    leaves = [id for id in models if id != "cloud"]
    for index, (id, blocks) in enumerate(models.items()):
        model = SequentialModel(
            {
                "architecture": "llama",
                "vocabulary": 256,
                "hidden": 32,
                "intermediate": 64,
                "heads": 4,
                "kv_heads": 2,
                "blocks": blocks,
            }
        )
        clock = VirtualClock()
        trainer = DeviceTrainer(adam, "float32", clock, Speed(1e9))
        is_root = id == "cloud"
        own = Self(
            id=id,
            depth=0 if is_root else 1,
            trainer=trainer,
            model=model,
            weights=initial_weights(model.spec, 0),
            data=None if is_root else text.take(torch.arange(64 * (index - 1), 64 * index)),
            public=None,
            row_shape=(32,),
            num_classes=256,
            seed=0,
        )
        strategy = GKT(own, GKTSettings(cuts=(2,), parent_epochs=4, features="int8"), local)
        settings = RoundSettings(count=rounds)
        parent, children = (None, leaves) if is_root else ("cloud", [])
        places[id] = Simulated(Node(id, parent, children, strategy, trainer, settings, clock, {}, {}), clock)
    return Simulation("cloud", places), text.take(torch.arange(256, 320))


def test_the_first_block_of_a_language_model_at_the_edge_and_the_rest_in_the_cloud() -> None:
    simulation, test = text_nodes({"cloud": 3, "a": 1, "b": 1, "c": 1, "d": 1}, rounds=4)
    losses = {}
    simulation.run()
    for id, place in simulation.nodes.items():
        logits = place.node.strategy.predict(simulation.entering(id, test.inputs))
        assert logits is not None
        targets = {"labels": test.labels}
        loss = LOSSES["causal_lm"]
        losses[id] = float(loss.total(logits, targets)) / loss.count(targets)
    edge_only = mean([losses[id] for id in "abcd"])
    assert losses["cloud"] < edge_only - 0.2
    assert edge_only < 4  # from log 256 = 5.5


# -- samples by their ids ----------------------------------------------------------------------------------------

Change = Callable[[Payload], Payload]


def reordered(payload: Payload, leaf: str, places: Tensor) -> Payload:
    """Return a payload whose rows of a leaf are in another order, or fewer."""
    tensors = {
        name: tensor[places] if name.endswith(f"/{leaf}") else tensor
        for name, tensor in payload.tensors.items()
    }
    return Payload(payload.fields, tensors)


def two_nodes(strategy: Mapping[str, object] | None = None) -> tuple[GKT, GKT]:
    """Return a parent and its child "a", before their first round."""
    world = World(federation(strategy=strategy))
    return world.strategy("cloud"), world.strategy("a")


def one_round(parent: GKT, child: GKT, round_index: int, task: Change, answer: Change) -> None:
    parent.receive(round_index, None)
    child.receive(round_index, task(parent.task("a")))
    child.learn()
    answered = answer(child.answer())
    parent.check("a", answered)
    parent.merge({"a": answered})
    parent.learn()


def as_sent(payload: Payload) -> Payload:
    return payload


def permuted(payload: Payload) -> Payload:
    if "index/a" not in payload.tensors:
        return payload
    return reordered(payload, "a", torch.randperm(len(payload.tensors["index/a"])))


def test_an_answer_and_a_task_in_any_order_are_the_same() -> None:
    ordered, shuffled = two_nodes(), two_nodes()
    for round_index in (1, 2, 3):
        one_round(*ordered, round_index, as_sent, as_sent)
        one_round(*shuffled, round_index, permuted, permuted)
    for one, other in zip(ordered, shuffled, strict=True):
        assert_same(one.state().tensors, other.state().tensors)


def test_a_child_learns_from_the_logits_of_its_samples_and_of_no_others() -> None:
    parent, child = two_nodes()
    one_round(parent, child, 1, as_sent, as_sent)
    task = reordered(parent.task("a"), "a", torch.tensor([5, 3]))
    logits = F.one_hot(torch.tensor([7, 2]), 10).float()  # sample 5 is a 7, sample 3 a 2
    child.receive(2, Payload(task.fields, {**task.tensors, "logits/a": logits}))
    own = child._samples["a"]["pixels"]
    told = {}
    for batch in child._batches():
        for row in torch.where(batch.targets["soft_weight"] > 0)[0]:
            sample = int((own == batch.inputs["pixels"][row]).flatten(1).all(1).nonzero()[0, 0])
            told[sample] = int(batch.targets["teacher"][row].argmax())
    assert told == {5: 7, 3: 2}


def test_partial_answers_come_together() -> None:
    (parent, child), (whole, other) = two_nodes(), two_nodes()
    for one in (child, other):
        one.receive(1, parent.task("a"))
        one.learn()
    answer = child.answer()
    order = torch.randperm(len(answer.tensors["index/a"]))
    for places in (order[:20], order[10:]):  # some twice
        part = reordered(answer, "a", places)
        parent.check("a", part)
        parent.merge({"a": part})
    whole.merge({"a": other.answer()})
    assert_same(parent.state().tensors, whole.state().tensors)


def test_labels_are_sent_once_and_features_in_every_round() -> None:
    parent, child = two_nodes()
    seen = []

    def note(payload: Payload) -> Payload:
        seen.append(payload.tensors)
        return payload

    for round_index in (1, 2):
        one_round(parent, child, round_index, as_sent, note)
    assert ["labels/a" in tensors for tensors in seen] == [True, False]
    assert not torch.equal(seen[0]["values/a"], seen[1]["values/a"])


def test_a_leaf_that_moves_is_held_once_by_its_ids() -> None:
    def move(simulation: Simulation, round_index: int) -> None:
        if round_index == 3:
            simulation.move("b", "edge-1")
            simulation.move("d", "edge-0")  # one deeper: cut elsewhere from now on

    world = World(federation(THREE_TIERS, rounds={"count": 4}), move)
    world.run()
    through = {id: world.strategy(id).state().fields["through"] for id in ("edge-0", "edge-1", "cloud")}
    assert through["edge-0"] == {"a": "a", "d": "d"}
    assert through["edge-1"] == {"b": "b", "c": "c"}
    assert through["cloud"] == {"a": "edge-0", "b": "edge-1", "c": "edge-1", "d": "edge-0"}


def test_a_leaf_that_a_child_names_no_more_is_dropped() -> None:
    parent, child = two_nodes()
    one_round(parent, child, 1, as_sent, as_sent)
    parent.merge({"a": Payload({"leaves": []})})
    parent.learn()
    assert not any(name.endswith("/a") for name in parent.state().tensors)


# -- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "allowed"), [("float32", 0.0), ("float16", 2.0**-11), ("int8", 1 / 255)])
def test_compression_is_as_exact_as_its_numbers(kind: Compression, allowed: float) -> None:
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5).view(
        -1, 1, 1, 1
    )
    x[2] = 1.25  # all the same
    error = (decompress(compress(x, kind)) - x).flatten(1).abs().amax(1)
    span = x.flatten(1).amax(1) - x.flatten(1).amin(1)
    scale = (
        x.flatten(1).abs().amax(1) if kind == "float16" else 0.5 * span + 1e-6 * x.flatten(1).abs().amax(1)
    )
    assert bool((error <= allowed * scale + (1e-6 if kind == "int8" else 0)).all())
    assert bool(torch.isfinite(compress(torch.full((1, 2), 1e30), "float16")["values"]).all())


def test_compressed_features_are_a_half_and_a_quarter_and_cost_little_accuracy() -> None:
    data = {"source": "digits", "split": {"dirichlet": 1.0}, "limit": 600}
    size, accuracy = {}, {}
    for kind in ("float32", "float16", "int8"):
        world = World(
            federation(strategy={"features": kind, "parent_epochs": 3}, rounds={"count": 3}, data=data)
        )
        accuracy[kind] = accuracies(world.run())["cloud"]
        features = {
            name: tensor
            for name, tensor in world.strategy("a").answer().tensors.items()
            if name.partition("/")[0] in ("values", "step", "zero")
        }
        size[kind] = sum(tensor.nbytes for tensor in features.values())
    assert size["float16"] == size["float32"] / 2
    assert size["int8"] == pytest.approx(size["float32"] / 4, rel=0.07)  # two numbers a row beside 128
    assert accuracy["float32"] > 0.8
    assert min(accuracy.values()) > accuracy["float32"] - 0.02


# -- who is slow, gone, or wrong ---------------------------------------------------------------------------------


def test_a_child_that_stops_stalls_no_round_and_comes_back() -> None:
    held: dict[int, object] = {}

    def hook(simulation: Simulation, round_index: int) -> None:
        held[round_index] = world.strategy("cloud").state().fields["through"]
        if round_index == 3:
            simulation.kill("b")
        if round_index == 7:
            simulation.restart("b", world.make("b"))

    world = World(federation(rounds={"count": 10, "deadline": "0.5 s", "quorum": 0.5}), hook)
    records = [record for record in world.run() if record.node == "cloud"]
    assert [record.missing for record in records[:6]] == [(), (), ("b",), ("b",), (), ()]
    times_s = [after.ended_s - before.ended_s for before, after in pairwise(records)]
    assert times_s[1] > 0.5  # the deadline, once; later rounds know
    assert max(times_s[0], *times_s[2:5]) < 0.2
    everyone, others = {"a": "a", "b": "b", "c": "c"}, {"a": "a", "c": "c"}
    assert held[5] == everyone  # what it sent in round 2 has been trained on in rounds 3 and 4
    assert held[6] == others  # not to be reached twice: it has left
    assert world.strategy("cloud").state().fields["through"] == everyone


def test_a_slow_childs_answer_is_taken_late() -> None:
    slow = [{**node, "bandwidth": "400 kbit/s"} if node["id"] == "b" else node for node in TWO_TIERS]
    world = World(federation(slow, rounds={"count": 8, "deadline": "0.3 s", "quorum": 0.5}))
    records = [record for record in world.run() if record.node == "cloud"]
    assert "b" in records[0].missing
    assert any("b" in record.late for record in records)
    assert world.strategy("cloud").state().fields["through"] == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize("id", ["cloud", "edge-0", "a"])
def test_a_node_that_dies_and_comes_back_changes_nothing(id: str) -> None:
    patient = {"count": 3, "deadline": "1000 s", "first_deadline": "1000 s"}
    undisturbed, world = (
        World(federation(THREE_TIERS, {"features": "int8"}, rounds=patient)) for _ in range(2)
    )
    records = undisturbed.run()
    middle_s = 0.5 * max(record.ended_s for record in records)
    world.simulation.at(middle_s, lambda: world.simulation.kill(id))
    world.simulation.at(middle_s + 5, lambda: world.simulation.restart(id, world.make(id)))
    world.run()
    assert_same(world.state(), undisturbed.state())


def test_a_parent_that_comes_back_trains_on_from_the_features_that_it_kept() -> None:
    (parent, child), (again, _) = two_nodes({"features": "int8"}), two_nodes({"features": "int8"})
    one_round(parent, child, 1, as_sent, as_sent)
    again.restore(parent.state())
    for one in (parent, again):  # nobody answers
        one.receive(2, None)
        one.merge({})
        one.learn()
    assert_same(again.state().tensors, parent.state().tensors)


def answered() -> tuple[GKT, Payload]:
    """Return a parent and the first answer of its child."""
    parent, child = two_nodes({"features": "int8"})
    child.receive(1, parent.task("a"))
    child.learn()
    return parent, child.answer()


Spoil = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda t: t.pop("labels/a"), "labels of 'a' are missing"),
        (lambda t: t.pop("values/a"), "tensor 'values/a' is missing"),
        (lambda t: t.pop("zero/a"), "tensor 'zero/a' is missing"),
        (lambda t: t.update({"labels/a": t["labels/a"] + 9}), "labels of 'a' are not within 10 classes"),
        (lambda t: t.update({"labels/a": t["labels/a"] - 1}), "labels of 'a' are not within 10 classes"),
        (
            lambda t: t.update({"index/a": t["index/a"] - 1}),
            "'index/a' holds no ids, a negative one or one tw",
        ),
        (
            lambda t: t.update({"index/a": t["index/a"] // 2}),
            "'index/a' holds no ids, a negative one or one tw",
        ),
        (
            lambda t: t.update({"index/a": t["index/a"][:0]}),
            "'index/a' holds no ids, a negative one or one tw",
        ),
        (lambda t: t.update({"index/a": t["index/a"][1:]}), "tensor 'values/a' is"),
        (lambda t: t.update({"logits/a": t["logits/a"][:, 1:]}), "tensor 'logits/a' is"),
        (lambda t: t.update({"logits/a": t["logits/a"] * float("nan")}), "holds NaN or infinity"),
        (lambda t: t.update({"values/a": t["values/a"].float()}), "tensor 'values/a' is"),
        (lambda t: t.update({"values/a": t["values/a"][:, 1:]}), "tensor 'values/a' is"),
    ],
)
def test_malformed_answers_are_refused(spoil: Spoil, refusal: str) -> None:
    parent, answer = answered()
    parent.check("a", answer)
    tensors = dict(answer.tensors)
    spoil(tensors)
    with pytest.raises(MessageError, match=refusal):
        parent.check("a", Payload(answer.fields, tensors))
    with pytest.raises(MessageError, match="leaves"):
        parent.check("a", Payload({"leaves": 3}, answer.tensors))


def test_malformed_tasks_are_refused() -> None:
    parent, child = two_nodes()
    one_round(parent, child, 1, as_sent, as_sent)
    task = parent.task("a")
    child.receive(2, task)
    for index, refusal in (
        (task.tensors["index/a"] + 1, "'a' has no sample"),
        (torch.zeros(2), "tensor 'index/a'"),
    ):
        with pytest.raises(MessageError, match=refusal):
            child.receive(2, Payload(task.fields, {**task.tensors, "index/a": index}))


def test_models_that_do_not_fit_are_named() -> None:
    models = {
        "small": {"architecture": "cnn", "channels": [6]},
        "large": {"architecture": "cnn", "channels": [8, 12]},
    }
    world = World(federation(models=models))
    with pytest.raises(
        ColledgeError,
        match=r"'a' trains layers 0 to 1 of its model, wanted a boundary of shape \[8, 4, 4\] before layer 1",
    ):
        world.run()
    with pytest.raises(
        ConfigError, match=r"strategy.cuts \[3\] names no layer for 'cloud', 0 below the root"
    ):
        World(federation(models=models, strategy={"cuts": [3]}))
    with pytest.raises(
        ConfigError, match=r"strategy.cuts \[2\] names no layer for 'edge-0', 1 below the root"
    ):
        World(federation(THREE_TIERS, {"cuts": [2]}))
    with pytest.raises(ValueError, match=r"\[1, 2\] must fall, root first, to at least 1"):
        federation(strategy={"cuts": [1, 2]})
