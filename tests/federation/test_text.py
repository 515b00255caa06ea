"""Federations whose data are text: the standard library's own source, by command and in every kind; what is refused."""

from __future__ import annotations

import argparse
import bisect
import calendar
import csv
import difflib
import gettext
import heapq
import json
import shlex
import string
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from colledge.data import ByteTokenizer, Labelled, load_tokenizer
from colledge.errors import ColledgeError, ConfigError
from colledge.federation import build
from colledge.federation.build import Federation
from colledge.federation.clock import VirtualClock
from colledge.federation.message import Kind, Message, MessageError, Payload
from colledge.federation.node import Node
from colledge.federation.record import NodeRound
from colledge.federation.simulation import Migration, Simulated, Simulation
from colledge.federation.strategies.fedeec import FedEEC
from colledge.launch import federate
from colledge.launch.cli import app
from colledge.models import initial_weights
from colledge.models.losses import IGNORED
from tests.federation.toy import Chain, Memory

MODULES = (argparse, bisect, calendar, csv, difflib, gettext, heapq, shlex, string, textwrap)
LLAMA = {"architecture": "llama", "hidden": 32, "intermediate": 64, "heads": 4, "kv_heads": 2, "blocks": 2}
DATA: dict[str, Any] = {
    "source": "text",
    "text": {"tokenizer": "bytes", "sequence_length": 32, "test_split": 0.2},
    "public": 0.15,
    "limit": 300,
    "test_limit": 40,
}
NODES = [
    {"id": "cloud", "model": "small", "device": "rtx-3060"},
    {"id": "edge", "parent": "cloud", "model": "small", "device": "raspberry-pi-5"},
    {"id": "end", "count": 3, "parent": "edge", "model": "small", "device": "raspberry-pi-5"},
]
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedeec": {},
    "gkt": {"cuts": [2, 1], "features": "float16"},
    "eclm": {
        "modules": 4,
        "offline": {"epochs": 1, "enhance_epochs": 1},
        "budget": {"share": 0.9},
    },
}


def write(
    folder: Path, strategy: str = "fedavg", settings: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write federation.yaml, and the beginnings of some modules as .txt beside it."""
    texts = folder / "text"
    texts.mkdir(exist_ok=True)
    for module in MODULES:
        (texts / f"{module.__name__}.txt").write_text(source_of(module))
    values = {
        "strategy": {"name": strategy, **(settings or STRATEGIES[strategy])},
        "rounds": {"count": 4},
        "data": DATA,
        "models": {"small": LLAMA},
        "local": {"batch_size": 16, "optimizer": {"name": "adamw", "learning_rate": 0.003}},
        "nodes": NODES,
        **changes,
    }
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def source_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")[:8000]


def text_federation(folder: Path, **changes: Any) -> Federation:
    return federate.read_federation(write(folder, **changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_learns_the_next_bytes_of_source_code(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, strategy)
    app(["federate", "simulate", str(path)], standalone_mode=False)
    output = tmp_path / "federation"
    lines = [
        NodeRound.model_validate_json(line) for line in (output / "federation.jsonl").read_text().splitlines()
    ]
    accuracies = [line.accuracy for line in lines if line.node == "cloud"]
    assert len(accuracies) == 4
    assert accuracies[0] is not None
    assert accuracies[-1] is not None
    assert accuracies[-1] > accuracies[0] + 0.01
    assert accuracies[-1] > 0.2  # a space everywhere is right less often
    ends = [line.accuracy for line in lines if line.node.startswith("end") and line.accuracy is not None]
    assert len(ends) == 3
    app(["federate", "report", str(output)], standalone_mode=False)
    printed = " ".join(capsys.readouterr().out.split())
    said = "Accuracy is the share of next tokens of test rows that a model predicts right."
    assert said in printed
    assert said in (output / "federation.html").read_text()
    assert json.loads((output / "federation-report.json").read_text())["judged"] == "next tokens of test rows"
    disclosed = {
        "gkt": "the labels of text are the text itself",
        "fedeec": "Logits on the root's public rows leave a node, no data of its own; those rows go to all nodes.",
    }
    assert disclosed.get(strategy, "no data and no labels") in printed


def test_accuracy_is_that_of_the_next_tokens_that_count() -> None:
    class Prophet(Chain):
        """Predicts some tokens."""

        def predict(self, inputs: Any) -> Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[1, 9, 3, 4], [9, 6, 9, 9]]), 10).float()

    labels = torch.tensor([[0, 1, 2, 3], [4, 5, 6, IGNORED]])  # next: 1 2 3 -, 5 6 - -
    data = Labelled({"input_ids": labels.clamp(min=0)}, labels, 10)
    assert build.TestSet(data, every=1, last=1)(Prophet("x"), 1) == 3 / 5


def test_rows_of_text_are_whole_documents_and_those_of_the_test_are_nobodys(tmp_path: Path) -> None:
    data = {**DATA, "public": 0.0, "limit": None, "test_limit": None, "split": {"successive": True}}
    loaded = text_federation(tmp_path, data=data)
    assert loaded.test is not None
    parts = [loaded.data_of(f"end-{index}") for index in range(3)]
    together = b""
    for part in parts:
        assert part is not None
        assert part.inputs["input_ids"].shape[1:] == part.labels.shape[1:] == (32,)
        assert part.num_classes == 257
        together += bytes(token for token in part.labels.flatten().tolist() if 0 <= token < 256)
    sources = {module.__name__: source_of(module).encode() for module in MODULES}
    whole = {name for name, source in sources.items() if source in together}
    assert len(whole) == 8  # in the order of their paths: of successive leaves each has some of its own
    held = bytes(token for token in loaded.test.labels.flatten().tolist() if 0 <= token < 256)
    assert {name for name, source in sources.items() if source in held} == sources.keys() - whole


def test_limits_and_public_rows_keep_the_order_of_successive_rows(tmp_path: Path) -> None:
    loaded = text_federation(tmp_path, data={**DATA, "split": {"successive": True}})
    everything = text_federation(tmp_path, data={**DATA, "limit": None, "public": 0.0})._train.labels.tolist()
    leaves = [loaded.data_of(f"end-{index}") for index in range(3)]
    assert loaded.public is not None
    assert loaded.public.num_rows == 45
    assert [leaf.num_rows for leaf in leaves if leaf is not None] == [85, 85, 85]
    left = iter(everything)
    assert all(row in left for leaf in leaves if leaf is not None for row in leaf.labels.tolist())


def test_nodes_have_texts_of_their_own_and_a_tokenizer_in_a_folder(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {
        word: index for index, word in enumerate(["<end>", "<unknown>", "def", "return", "(", ")", "self"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "words"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    (tmp_path / "a.txt").write_text("def f(self): return self")
    (tmp_path / "b.jsonl").write_text('{"text": "return (self)"}\n' * 9)
    nodes = [
        NODES[0],
        *(
            {"id": id, "parent": "cloud", "model": "small", "data": f"{id}.{kind}"}
            for id, kind in (("a", "txt"), ("b", "jsonl"))
        ),
    ]
    loaded = text_federation(
        tmp_path, data={"text": {"tokenizer": "words", "sequence_length": 4}}, nodes=nodes
    )
    own = loaded.data_of("a")
    assert own is not None
    end, unknown = 0, 1
    tokens = [2, unknown, 4, 6, unknown, 3, 6, end]
    assert own.labels.flatten().tolist() == tokens
    assert loaded.model_of("a").spec.config["vocabulary"] == 7
    records = federate.make_simulation(loaded).run()
    assert {line.accuracy for line in records} == {None}  # there is nothing to judge by
    assert [line.loss is not None for line in records if line.node == "b"] == [True] * 4

    simulation = federate.make_simulation(loaded)
    for text, said in (
        (
            {"tokenizer": "bytes", "sequence_length": 4},
            "its size of the vocabulary is 257, that of 'cloud' is 7",
        ),
        (
            {"tokenizer": "words", "sequence_length": 8},
            "its number of tokens a row is 8, that of 'cloud' is 4",
        ),
    ):
        other, clock = text_federation(tmp_path, data={"text": text}, nodes=nodes), VirtualClock()
        simulation.nodes["b"] = Simulated(other.node("b", other.device_trainer("b", clock), clock), clock)
        with pytest.raises(ColledgeError, match=f"'cloud' refuses 'b': {said}"):
            simulation.run()
        simulation = federate.make_simulation(loaded)
    words["me"] = words.pop("self")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(
        tmp_path / "others"
    )
    greetings = [
        text_federation(tmp_path, data={"text": {"tokenizer": name}}, nodes=nodes).greeting
        for name in ("words", "others")
    ]
    assert {key for key in greetings[0] if greetings[0][key] != greetings[1][key]} == {"vocabulary (digest)"}
    assert len(load_tokenizer(tmp_path / "others")) == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {**DATA, "split": {"dirichlet": 0.5}}}, "rows of text have no class.*successive: true"),
        ({"data": {**DATA, "split": {"classes": 2}}}, "rows of text have no class"),
        ({"data": {**DATA, "text": {"tokenizer": "nowhere"}}}, "nowhere: no usable tokenizer there"),
        ({"data": {**DATA, "source": "nowhere.txt"}}, r"nowhere\.txt: no such file"),
        (
            {"data": {**DATA, "source": "text/csv.txt"}},
            r"csv\.txt: 1 example\(s\) cannot be split.*more documents",
        ),
        ({"data": {**DATA, "images": {"shape": [1, 8, 8], "classes": 2}}}, "give images or text, not both"),
        (
            {"data": {**DATA, "text": {"tokeniser": "bytes"}}},
            "unknown key 'data.text.tokeniser'.*'tokenizer'",
        ),
        ({"models": {"small": {"architecture": "cnn", "channels": [4]}}}, "models.small: .*are for llama"),
        (
            {"models": {"small": {**LLAMA, "vocabulary": 300}}},
            "models.small: vocabulary.*follows from the data",
        ),
        ({"data": {"source": "digits"}}, "models.small: .*are for cnn or mlp or resnet"),
    ],
)
def test_what_does_not_go_with_text_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        federate.make_simulation(text_federation(tmp_path, **changes))
    assert "\n" not in str(found.value)


def test_bytes_are_tokens_and_come_back() -> None:
    tokenizer = ByteTokenizer()
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template) == (257, 256, None)
    (ids,) = tokenizer(["é\n\ud800"])["input_ids"]
    assert ids == [*"é\n".encode(), 0xED, 0xA0, 0x80]
    assert tokenizer.decode([*"né".encode(), 256, 0xFF]) == "né\\xff"


# -- FedEEC --------------------------------------------------------------------------------------------------------


class Ears:
    """Hears every message of a simulation."""

    def __init__(self, simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[tuple[str, str, Message]] = []
        send = simulation._send

        def listen(sender: str, node: Any, outgoing: Any) -> None:
            self.heard.append((sender, outgoing.target, outgoing.message))
            send(sender, node, outgoing)

        monkeypatch.setattr(simulation, "_send", listen)

    def payloads(self, kind: Kind) -> list[tuple[str, str, int, Payload]]:
        return [(sender, to, m.round, m.payload) for sender, to, m in self.heard if m.kind is kind]


def test_of_text_only_public_rows_go_down_and_only_logits_on_them_go_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = text_federation(tmp_path, strategy="fedeec", rounds={"count": 3})
    simulation = federate.make_simulation(loaded)
    ears = Ears(simulation, monkeypatch)
    simulation.run()
    public = loaded.public
    assert public is not None
    answers, tasks = ears.payloads(Kind.ANSWER), ears.payloads(Kind.TASK)
    assert len({(sender, number) for sender, _, number, _ in answers}) == 3 * 4
    assert len({(to, number) for _, to, number, _ in tasks}) == 3 * 4
    for _, _, _, payload in answers:
        assert {name: tuple(tensor.shape) for name, tensor in payload.tensors.items()} == {
            "logits/cloud": (public.num_rows, 32, 257)
        }
    for _, _, round_index, payload in tasks:
        names = {"logits/cloud", "rows/cloud", "labels/cloud"} if round_index == 1 else {"logits/cloud"}
        assert payload.tensors.keys() == names
        if round_index == 1:
            assert torch.equal(payload.tensors["rows/cloud"], public.inputs["input_ids"])
            assert torch.equal(payload.tensors["labels/cloud"], public.labels)


def test_a_node_learns_by_the_losses_of_the_paper_from_tokens(tmp_path: Path) -> None:
    """A leaf's whole batch: CE and beta KL of public rows, gamma CE of its own, each a mean over its tokens."""
    loaded = text_federation(
        tmp_path,
        strategy="fedeec",
        settings={"gamma": 0.75, "beta_leaf": 2.0, "temperature": 2.0, "rectify": False},
        local={
            "batch_size": 10_000,
            "precision": "float64",
            "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.0},
        },
        data={**DATA, "limit": 40, "public": 0.25},
    )
    assert loaded.public is not None
    loaded.public.labels[0, 5:] = IGNORED  # halves of unequal numbers of targets
    places = federate.make_simulation(loaded).nodes
    cloud, end = places["cloud"].node.strategy, places["end-0"].node.strategy
    task = cloud.task("end-0")
    before = loaded.device_trainer("end-0", VirtualClock())
    model = loaded.model_of("end-0")
    before.load(model, initial_weights(model.spec, 0))
    end.receive(1, task)
    end.learn()
    public, own = loaded.public, loaded.data_of("end-0")
    assert public is not None
    assert own is not None
    assert public.num_rows == own.num_rows == 10

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    module, parameters = before._module, before._parameters
    student, real = (module(data.inputs["input_ids"], {}) for data in (public, own))
    counts = (public.labels[:, 1:] != IGNORED).flatten()
    teacher = task.tensors["logits/cloud"][:, :-1].flatten(0, 1)[counts].double()
    log_student = F.log_softmax(student[:, :-1].flatten(0, 1)[counts] / 2.0, -1)
    divergence = F.kl_div(log_student, (teacher / 2.0).softmax(-1), reduction="batchmean")
    loss = (
        cross_entropy(student, public.labels)
        + 2.0 * 4.0 * divergence
        + 0.75 * cross_entropy(real, own.labels)
    )
    torch.autograd.backward(loss)
    learnt = end._node.trainer.weights()
    for name, parameter in parameters.items():
        wanted = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(learnt[name], wanted, rtol=1e-6, atol=1e-8)  # weights are float32


def test_a_token_is_rectified_by_what_was_right_of_its_own_kind(tmp_path: Path) -> None:
    loaded = text_federation(tmp_path, strategy="fedeec", data={**DATA, "limit": 60})
    strategy = federate.make_simulation(loaded).nodes["cloud"].node.strategy
    assert isinstance(strategy, FedEEC)
    assert loaded.public is not None
    labels = loaded.public.labels[:, 1:]
    space = labels == ord(" ")
    plain = strategy.predict(loaded.public.inputs)
    strategy._rectifier.restore({str(ord(" ")): torch.tensor([0.25, 0.75])})
    told = strategy.task("edge").tensors["logits/cloud"]
    changed = ((told != plain).any(-1))[:, :-1]
    wrong = (plain.argmax(-1)[:, :-1] != labels) & space
    assert wrong.any()
    assert torch.equal(changed, wrong)  # no other token has a queue; no position without a next token
    shares = (told / 3.0).softmax(-1)[:, :-1][wrong]
    assert torch.allclose(shares[:, ord(" ")], torch.full((int(wrong.sum()),), 0.5), atol=1e-5)
    assert torch.equal(told[:, -1], plain[:, -1])


def test_several_children_teach_as_the_mean_of_their_distributions(tmp_path: Path) -> None:
    loaded = text_federation(tmp_path, strategy="fedeec")
    strategy = federate.make_simulation(loaded).nodes["edge"].node.strategy
    assert isinstance(strategy, FedEEC)
    logits = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) * 4 for seed in range(3)]
    wanted = sum((one / 3.0).softmax(-1) for one in logits) / 3
    torch.testing.assert_close((strategy._as_one(logits) / 3.0).softmax(-1), wanted)


def test_malformed_messages_about_text_are_refused(tmp_path: Path) -> None:
    loaded = text_federation(tmp_path, strategy="fedeec", data={**DATA, "limit": 60})
    places = federate.make_simulation(loaded).nodes
    cloud, edge = (places[id].node.strategy for id in ("cloud", "edge"))
    task = cloud.task("edge")
    for name, bad in (
        ("rows/cloud", task.tensors["rows/cloud"] + 257),
        ("rows/cloud", task.tensors["rows/cloud"][:, :5]),
        ("rows/cloud", None),
        ("labels/cloud", task.tensors["labels/cloud"] - 1000),
        ("logits/cloud", task.tensors["logits/cloud"][:, :, :5]),
    ):
        stranger = federate.make_simulation(loaded).nodes["edge"].node.strategy
        tensors = {key: bad if key == name else t for key, t in task.tensors.items()}
        with pytest.raises(MessageError, match="a malformed payload"):
            stranger.receive(1, Payload(task.fields, {k: t for k, t in tensors.items() if t is not None}))
    edge.receive(1, task)
    answer = edge.answer()
    cloud.check("edge", answer)
    logits = answer.tensors["logits/cloud"]
    for fields, tensors, said in (
        ({"leaves": {"cloud": 8}}, {"logits/cloud": logits[:8]}, "no bridge samples of 'cloud'"),
        ({"leaves": {"end-0": 9}}, {"logits/end-0": logits}, "no bridge samples of 'end-0'"),
        (answer.fields, {"logits/cloud": logits * float("nan")}, "logits/cloud"),
        (
            answer.fields,
            {**answer.tensors, "labels/cloud": task.tensors["labels/cloud"]},
            "only logits go up",
        ),
    ):
        with pytest.raises(MessageError, match=said):
            cloud.check("edge", Payload(fields, tensors))


def test_fedeec_on_text_goes_on_after_deaths_and_moves(tmp_path: Path) -> None:
    nodes = [
        {"id": "cloud", "model": "small", "device": "rtx-3060"},
        {"id": "edge", "count": 2, "parent": "cloud", "model": "small", "device": "raspberry-pi-5"},
        {"id": "end", "count": 4, "parent": "edge", "model": "small", "device": "raspberry-pi-5"},
    ]
    loaded = text_federation(
        tmp_path, strategy="fedeec", nodes=nodes, data={**DATA, "limit": 80, "test_limit": 20}
    )

    def run(dies: str | None = None, migrate: float = 0.0) -> dict[str, dict[str, Tensor]]:
        clocks, stores = ({id: kind() for id in loaded.nodes} for kind in (VirtualClock, Memory))

        def make(id: str) -> Node:
            return loaded.node(id, loaded.device_trainer(id, clocks[id]), clocks[id], stores[id])

        simulation = Simulation("cloud", {id: Simulated(make(id), clocks[id]) for id in loaded.nodes})
        if dies is not None:
            simulation.at(0.02, lambda: simulation.kill(dies))
            simulation.at(5.0, lambda: simulation.restart(dies, make(dies)))
        if migrate:
            simulation.on_round.append(Migration(loaded.tree, migrate, 0))
        records = simulation.run()
        assert len([line for line in records if line.node == "cloud" and not line.failed]) == 4
        assert (max(line.ended_s for line in records) > 5.0) == (dies is not None)  # it died at work
        return {id: dict(place.node.strategy.state().tensors) for id, place in simulation.nodes.items()}

    still = run()
    for id in ("edge-0", "end-3"):
        again = run(dies=id)
        for node, tensors in still.items():
            for name, tensor in tensors.items():
                assert torch.equal(again[node][name], tensor), (id, node, name)
    moved = run(migrate=0.5)
    assert any(not torch.equal(moved["cloud"][name], tensor) for name, tensor in still["cloud"].items())
