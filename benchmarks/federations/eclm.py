"""ECLM against FedAvg and HeteroFL: accuracy over budgets, loads of modules, and what comes after a shift of the data.

    rounds 1 to 6    every device has rows of 2 classes
    rounds 7 and 8   every device has the rows of another one, whose classes it had not

What is pretrained begins with weights that learnt from the cloud's public rows, as often and as fast as ECLM's do in
its offline stage. Rates are those of four at which the cloud's and the devices' accuracy together were best (`search`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from colledge.data.labelled import Labelled
from colledge.federation.build import Federation
from colledge.federation.clock import Clock, VirtualClock
from colledge.federation.config import FederationConfig
from colledge.federation.learning import LocalSettings, local_batches
from colledge.federation.message import Payload
from colledge.federation.offline import OfflineSettings
from colledge.federation.report import make_report
from colledge.federation.simulation import Simulation
from colledge.federation.trainer import DeviceTrainer, Trainer
from colledge.federation.transport import NodeId
from colledge.launch.federate import make_simulation
from colledge.models import initial_weights
from colledge.records import parse_record, read_yaml_mapping
from colledge.settings import OptimizerSettings
from colledge.units import format_bytes, format_joules

SETTINGS = Path(__file__).parent / "eclm.yaml"
SHIFT = 7  # the round in which devices' data shift
SEARCHED, SEARCH_SEED = (0.001, 0.003, 0.01, 0.03), 1000


@dataclass(frozen=True)
class Row:
    """A row of the table: FedAvg, HeteroFL (`narrow`) or ECLM (`budget`), and the devices' learning rate."""

    name: str
    rate: float
    pretrained: bool = False
    narrow: bool = False
    budget: float | None = None


ROWS = (
    Row("FedAvg", 0.001),
    Row("FedAvg, pretrained", 0.001, pretrained=True),
    Row("HeteroFL", 0.001, narrow=True),
    Row("HeteroFL, pretrained", 0.003, pretrained=True, narrow=True),
    Row("ECLM, budget 0.17", 0.003, pretrained=True, budget=0.17),
    Row("ECLM, budget 0.25", 0.003, pretrained=True, budget=0.25),
    Row("ECLM, budget 0.5", 0.003, pretrained=True, budget=0.5),
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    `begun` and `accuracy` are the cloud's on all classes before the rounds and before the shift, `own` the mean of the
    devices' then, on the classes that each has; bytes, joules and virtual seconds are those until then. `new` is `own`
    on the classes that data shift to, before that and after every round that follows; `fetched_bytes` are what devices
    got in those rounds, `model_bytes` what their models take at the same moments as `new`. `loads` are the least and
    the largest of modules by block.
    """

    name: str
    seed: int
    begun: float
    accuracy: float
    own: float
    num_bytes: int
    joules: float
    seconds: float
    new: tuple[float, ...]
    fetched_bytes: tuple[int, ...]
    model_bytes: tuple[int, ...]
    loads: tuple[tuple[float, float], ...]
    largest_update: float
    over_budget: int


def eclm(seed: int) -> list[Outcome]:
    """Return what every row came to."""
    return [run(row, seed) for row in ROWS]


def search(seed: int) -> list[Outcome]:
    """Return what rows come to at every learning rate, on data of other seeds than the table's; ECLM at one budget."""
    others = [row for row in ROWS if row.budget in (None, 0.25)]
    rows = [replace(row, name=f"{row.name}, {rate:g}", rate=rate) for row in others for rate in SEARCHED]
    return [run(row, SEARCH_SEED + seed) for row in rows]


def run(row: Row, seed: int) -> Outcome:
    """Simulate a row's federation, and return what came of it."""
    federation = _federation(row, seed)
    trainers: dict[NodeId, Trainer] = {}

    def trainer_for(id: NodeId, clock: Clock) -> Trainer:
        trainers[id] = federation.device_trainer(id, clock)
        return trainers[id]

    simulation = make_simulation(federation, trainer_for=trainer_for)
    if row.pretrained:
        root = simulation.nodes[federation.tree.root].node.strategy
        root.restore(
            Payload(root.state().fields, _pretrained(seed)) if row.budget is None else _offline(seed)
        )
    looks = Looks(federation, trainers)
    simulation.on_round.append(looks)
    records = simulation.run()
    looks.look(simulation)  # at the last round, which no other follows
    rounds = make_report(federation.facts(simulated=True), records).rounds
    before = [one for one in rounds if one.round < SHIFT]
    of_cloud = [record for record in records if record.node == federation.tree.root]
    fetched = [sum(link.sent_bytes for link in one.links.values()) for one in of_cloud if one.round >= SHIFT]
    return Outcome(
        name=row.name,
        seed=seed,
        begun=looks.begun,
        accuracy=looks.accuracy,
        own=looks.own,
        num_bytes=sum(one.num_bytes for one in before),
        joules=sum(one.joules for one in before),
        seconds=sum(one.seconds for one in before),
        new=tuple(looks.new),
        fetched_bytes=tuple(fetched),
        model_bytes=tuple(looks.model_bytes),
        loads=looks.loads,
        largest_update=max(one.figures.get("largest_update", 0.0) for one in of_cloud),
        over_budget=max(int(one.figures.get("over_budget", 0)) for one in of_cloud),
    )


class Looks:
    """A `RoundHook` that looks at models from the round on in which it shifts the devices' data."""

    def __init__(self, federation: Federation, trainers: Mapping[NodeId, Trainer]) -> None:
        self._root, self._ends, self._trainers = federation.tree.root, federation.tree.leaves, trainers
        assert federation.test is not None
        self._test = federation.test
        self._data = {end: _rows(federation, end) for end in self._ends}
        self._next = {end: self._other(index) for index, end in enumerate(self._ends)}
        self.begun, self.accuracy, self.own = 0.0, 0.0, 0.0
        self.loads: tuple[tuple[float, float], ...] = ()
        self.new: list[float] = []
        self.model_bytes: list[int] = []

    def __call__(self, simulation: Simulation, round_index: int) -> None:
        """Look at what the round before came to."""
        strategies = {id: place.node.strategy for id, place in simulation.nodes.items()}
        every = range(self._test.num_classes)
        if round_index == 1:
            self.begun = self._right(simulation, self._root, every)
        if round_index == SHIFT:
            self.accuracy = self._right(simulation, self._root, every)
            self.own = mean(self._right(simulation, end, _classes(self._data[end])) for end in self._ends)
            importance = strategies[self._root].answer().fields.get("importance") or ()
            self.loads = tuple((min(block), max(block)) for block in importance)
            for end in self._ends:
                strategies[end].shift(self._next[end])
        if round_index >= SHIFT:
            self.look(simulation)

    def look(self, simulation: Simulation) -> None:
        """Note how much of the classes to which data shift devices get right, and what their models take."""
        self.new.append(mean(self._right(simulation, end, _classes(self._next[end])) for end in self._ends))
        weights = [self._trainers[end].weights() for end in self._ends]
        self.model_bytes.append(sum(tensor.nbytes for one in weights for tensor in one.values()))

    def _other(self, index: int) -> Labelled:
        """Return the data of the next device that has none of this one's classes."""
        own = _classes(self._data[self._ends[index]])
        others = (self._data[end] for end in (*self._ends[index + 1 :], *self._ends))
        return next(data for data in others if not own & _classes(data))

    def _right(self, simulation: Simulation, id: NodeId, classes: Collection[int]) -> float:
        """Return the share of the test rows of some classes that a node's model gets right."""
        rows = self._test.take(torch.isin(self._test.labels, torch.tensor(list(classes))).nonzero()[:, 0])
        with self._trainers[id].unmetered():
            logits = simulation.nodes[id].node.strategy.predict(rows.inputs)
        assert logits is not None, f"{id} has no model"
        return float((logits.argmax(-1) == rows.labels).double().mean())


def _classes(data: Labelled) -> set[int]:
    return set(data.labels.unique().tolist())


def _rows(federation: Federation, end: NodeId) -> Labelled:
    data = federation.data_of(end)
    assert data is not None
    return data


def _federation(row: Row, seed: int) -> Federation:
    values = read_yaml_mapping(SETTINGS)
    local = values["local"]
    local = {**local, "optimizer": {**local["optimizer"], "learning_rate": row.rate}}
    strategy = {**values["strategy"], "budget": {"share": row.budget}}
    if row.budget is None:
        strategy = {"name": "heterofl" if row.narrow else "fedavg"}
    nodes = values["nodes"]
    if row.narrow:
        cloud, ends = nodes
        half = ends["count"] // 2
        nodes = [cloud] + [
            {**ends, "id": model, "count": count, "model": model}
            for model, count in (("half", half), ("quarter", ends["count"] - half))
        ]
    values = {**values, "seed": seed, "local": local, "strategy": strategy, "nodes": nodes}
    return Federation(parse_record(FederationConfig, values, str(SETTINGS)))


@lru_cache(maxsize=1)
def _offline(seed: int) -> Payload:
    """Return a cloud of ECLM after its offline stage, which no budget changes."""
    federation = _federation(ROWS[-1], seed)
    clock = VirtualClock()
    root = federation.node(
        federation.tree.root, federation.device_trainer(federation.tree.root, clock), clock
    )
    root.strategy.receive(1, None)
    return root.strategy.state()


@lru_cache(maxsize=1)
def _pretrained(seed: int) -> dict[str, Tensor]:
    """Return the whole net's weights after as many passes over the public rows as ECLM's offline stage makes."""
    federation = _federation(ROWS[0], seed)
    offline = OfflineSettings.model_validate(read_yaml_mapping(SETTINGS)["strategy"]["offline"])
    model = federation.model_of(federation.tree.root)
    adam = OptimizerSettings(name="adamw", learning_rate=offline.learning_rate, weight_decay=0)
    trainer = DeviceTrainer(adam, "float32", VirtualClock())
    trainer.load(model, initial_weights(model.spec, seed))
    passes = LocalSettings(epochs=offline.epochs + offline.enhance_epochs, batch_size=offline.batch_size)
    assert federation.public is not None
    trainer.train(local_batches(federation.public, passes, ("pretraining", seed)))
    return trainer.weights()


def table(outcomes: Sequence[Outcome]) -> str:
    """Return three tables as Markdown: accuracy and bytes, with the spread over seeds; loads; the shift."""
    names = list(dict.fromkeys(one.name for one in outcomes))
    rows = {name: [one for one in outcomes if one.name == name] for name in names}
    whole = mean(one.num_bytes for one in rows[names[0]])
    lines = [
        "| | cloud, before | cloud, all classes | devices, own classes | bytes | of FedAvg's | joules | virtual time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, same in rows.items():
        num_bytes = mean(one.num_bytes for one in same)
        cells = [
            _percent([one.begun for one in same]),
            _percent([one.accuracy for one in same]),
            _percent([one.own for one in same]),
            format_bytes(num_bytes),
            f"{num_bytes / whole:.2f}",
            format_joules(mean(one.joules for one in same)),
            f"{mean(one.seconds for one in same):.1f} s",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cut = {name: same for name, same in rows.items() if same[0].loads}
    lines += ["", "| | modules' loads by block | largest update | over budget |", "|---|---|---|---|"]
    for name, same in cut.items():
        blocks = [zip(*one, strict=True) for one in zip(*(one.loads for one in same), strict=True)]
        loads = ", ".join(f"{min(low):.3f} to {max(high):.3f}" for low, high in blocks)
        update = max(one.largest_update for one in same)
        lines.append(f"| {name} | {loads} | {update:.2f} | {max(one.over_budget for one in same)} |")
    lines += [
        "",
        "| after the shift | devices, new classes | fetched | of their models |",
        "|---|---|---|---|",
    ]
    for name, same in rows.items():
        accuracy = " → ".join(
            f"{100 * mean(each):.1f}" for each in zip(*(one.new for one in same), strict=True)
        )
        fetched = [mean(each) for each in zip(*(one.fetched_bytes for one in same), strict=True)]
        models = [mean(each) for each in zip(*(one.model_bytes[1:] for one in same), strict=True)]
        shares = ", ".join(f"{100 * got / all:.0f} %" for got, all in zip(fetched, models, strict=True))
        lines.append(f"| {name} | {accuracy} % | {', '.join(map(format_bytes, fetched))} | {shares} |")
    return "\n".join(lines)


def _percent(values: Sequence[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    return f"{100 * mean(values):.1f} % ({low:.1f} to {high:.1f})"
