"""federation.yaml and its commands: what they refuse, in one line each; averaging; the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.exceptions import TyperException

from colledge.data.images import load_images
from colledge.errors import ColledgeError, ConfigError
from colledge.federation.build import Federation
from colledge.federation.clock import RealClock, VirtualClock
from colledge.federation.message import (
    DEFAULT_LIMIT_BYTES,
    Kind,
    Message,
    MessageError,
    Payload,
    decode,
    encode,
)
from colledge.federation.node import Node
from colledge.federation.report import read_report
from colledge.federation.serve import NodeFolder, NodeStatus
from colledge.federation.simulation import Migration, Simulated
from colledge.federation.transport import TransportError
from colledge.launch import federate
from colledge.launch.cli import app
from tests.federation.test_fedeec import federation

NODES = [
    {"id": "cloud", "model": "small"},
    {"id": "edge", "parent": "cloud", "model": "small"},
    {"id": "end", "count": 2, "parent": "edge", "model": "small"},
]

TEXT = {"tokenizer": "bytes", "sequence_length": 16, "test_split": 0.2}
DIGITS = {"shape": [1, 8, 8], "classes": 10}
LOW = [{"id": "low", "parent": "edge", "model": "small"}, {"id": "end", "parent": "low", "model": "small"}]


def moving(to: str) -> list[dict[str, Any]]:
    """Return nodes whose ends may move to another one."""
    return [{**node, "may_move_to": [to]} if node["id"] == "end" else node for node in NODES]


def change(folder: Path, **changes: Any) -> None:
    federation(folder, **{"strategy": {"name": "fedavg"}, "nodes": NODES, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": [*NODES, {"id": "other", "model": "small"}]}, "wanted one root.*saw cloud, other"),
        ({"nodes": [{**n, "parent": "end-0"} if n["id"] == "edge" else n for n in NODES]}, "is a cycle"),
        ({"nodes": [*NODES, {"id": "x", "parent": "nobody", "model": "small"}]}, "unknown parent 'nobody'"),
        ({"nodes": [*NODES, {"id": "edge", "parent": "cloud", "model": "small"}]}, "'edge' is there twice"),
        ({"nodes": [{**n, "tier": "end"} if n["id"] == "edge" else n for n in NODES]}, "says tier end.*edge"),
        ({"nodes": [{**n, "model": "none"} for n in NODES]}, "'none' is not among models"),
        (
            {"strategy": {"name": "fedbest"}},
            "strategy.name is 'fedbest', wanted one of fedavg, hierfavg, .*eclm",
        ),
        ({"strategy": {"edge_rounds": 2}}, "key 'strategy.name' is missing.*Fix: add that value"),
        ({"data": {"text": TEXT}}, "models.small: such data are for llama, saw architecture cnn"),
        (
            {"nodes": [NODES[0], {"id": "x", "parent": "cloud"}]},
            r"'nodes\[1\].model' is missing.*Fix: add that value",
        ),
        ({"data": {"images": {**DIGITS, "classes": []}}}, r"wanted how many classes there are.*\(saw \[\]\)"),
        ({"data": {"images": {**DIGITS, "classes": [1, 2]}}}, r"wanted how many classes.*\(saw \[1, 2\]\)"),
        ({"data": {"images": {**DIGITS, "classes": 0}}}, r"wanted how many classes there are.*\(saw 0\)"),
        (
            {"data": {"images": {**DIGITS, "shape": [8, 8]}}},
            r"data.images.shape: wanted channels, height and width, such as .*\(saw \[8, 8\]\)",
        ),
        ({"output": "federation.yaml"}, r"output: \S+federation.yaml is a file, wanted a folder"),
        ({"output": "federation.yaml/in"}, r"output: \S+federation.yaml is a file, wanted a folder"),
        (
            {"nodes": [NODES[0], {**NODES[1], "model": "large"}]},
            "'large' and 'small', wanted one model.*fedavg",
        ),
        ({"nodes": [NODES[0], {**NODES[1], "objective": "time"}]}, r"nodes\[1\].objective.*pool.yaml"),
        ({"nodes": [NODES[0], {**NODES[1], "count": 10**9}]}, "count"),
        ({"strategy": {"name": "fedavg", "temperature": 3}}, "temperature.*Fix: take that key out"),
        ({"rounds": {"count": 2, "quorm": 0.5}}, "unknown key 'rounds.quorm'.*did you mean 'quorum'"),
        ({"data": {"source": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"data": {"source": "digits", "split": {"dirichlet": 0.5, "classes": 2}}}, "split"),
        (
            {"data": {"source": "digits", "images": {"shape": [1, 8, 8], "classes": 7}}},
            r"digits: label [789] in the \w+ split, wanted 0 to 6 as data\.images says",
        ),
        ({"models": {"small": {"architecture": "cnn", "channels": [4] * 9}}}, "cannot be halved 9 times"),
        ({"nodes": [{**n, "device": "abacus"} for n in NODES]}, "abacus"),
        (
            {"data": {"source": "digits", "images": {**DIGITS, "classes": list("abcdefghij")}}},
            r"digits: classes with numbers in the \w+ split, wanted names \(a, b.*such as 10",
        ),
        (
            {"data": {"source": "digits", "images": {**DIGITS, "mean": [78], "deviation": [100]}}},
            "data.images: mean is 78, wanted that of pixels from 0 to 1",
        ),
        (
            {"data": {"source": "digits", "images": {**DIGITS, "mean": [0.3], "deviation": [100]}}},
            "data.images: deviation is 100, wanted that of pixels from 0 to 1",
        ),
        ({"nodes": moving("nobody")}, "'end-0' may move to unknown node 'nobody'"),
        ({"nodes": moving("edge")}, "'end-0' may move to 'edge', which is its parent already"),
        ({"nodes": moving("end-0")}, "'end-0' may move to 'end-0', which is itself or below it"),
        ({"nodes": moving("end-1")}, "'end-0' may move to 'end-1', which has no children"),
        (
            {"nodes": [NODES[0], {**NODES[1], "may_move_to": ["low"]}, *LOW]},
            "'edge' may move to 'low', which is itself or below it",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    def use() -> None:
        change(tmp_path, **changes)
        loaded = federate.read_federation(tmp_path / "federation.yaml")
        federate.make_simulation(loaded)
        loaded.facts(simulated=True)

    with pytest.raises(ConfigError, match=said) as found:
        use()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--migrate", "0.5"], "no leaf has another parent to move to.*leave --migrate out"),
        (["--migrate", "0.1"], "a share of 0.1 moves none of 2 leaves.*0.5 or more"),
        (["message_limit=1 kB"], r"sends .* a message of .* kB, the limit is 1 kB. Fix: raise message_limit"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    change(tmp_path, rounds={"count": 1})
    with pytest.raises(ConfigError, match=said) as found:
        app(["federate", "simulate", str(tmp_path / "federation.yaml"), *arguments], standalone_mode=False)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["join", "--node", "cloud"], "'cloud' is the root, which joins nobody. Fix: run it with serve"),
        (
            ["join", "--node", "nobody"],
            "there is no node 'nobody'. Fix: use one of cloud, edge, end-0, end-1",
        ),
        (["join", "--node", "edge"], "trainer of 'edge': .*pool.yaml: no such file"),
        (["simulate"], "trainer of 'edge': .*pool.yaml: no such file"),
        (["provision", "--valid-days", "0"], "greater than or equal to 1"),
        (["provision", "--valid-days", "1e9"], "less than or equal to 3650"),
    ],
)
def test_what_a_node_cannot_be_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    change(tmp_path, nodes=[NODES[0], {**NODES[1], "trainer": "./pool.yaml"}, NODES[2]])
    command, *options = arguments
    with pytest.raises((ConfigError, TyperException), match=said) as found:
        app(["federate", command, str(tmp_path / "federation.yaml"), *options], standalone_mode=False)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("ran_under", "above", "told"),
    [
        (None, "edge-0", []),
        (None, "edge-1", [("edge-0", "h:1")]),
        ("edge-1", "edge-1", []),
        ("edge-1", "edge-0", [("edge-1", "h:2")]),
        ("gone", "edge-0", []),
    ],
)
@pytest.mark.parametrize("is_away", [False, True])
def test_a_node_that_moves_tells_the_parent_of_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ran_under: str | None,
    above: str,
    told: list[tuple[str, str]],
    is_away: bool,
) -> None:
    sent: list[tuple[str, str]] = []

    class Recorder:
        def __init__(self, id: str, credentials: Path, parent: tuple[str, str]) -> None:
            self.parent = parent

        def send(self, target: str, message: Message, timeout_s: float) -> int:
            assert (target, message.kind) == (self.parent[0], Kind.LEAVE)
            sent.append(self.parent)
            if is_away:
                raise TransportError("not connected.")
            return 1

        def close(self) -> None:
            pass

    monkeypatch.setattr("colledge.federation.cellnet.CellNetTransport", Recorder)
    edges = [
        {"id": f"edge-{i}", "parent": "cloud", "model": "small", "address": f"h:{i + 1}"} for i in range(2)
    ]
    end = {"id": "end", "count": 2, "parent": "edge-0", "model": "small"}
    other = {"id": "other", "parent": "edge-1", "model": "small"}
    change(tmp_path, nodes=[NODES[0], *edges, {**end, "may_move_to": ["edge-1"]}, other])
    loaded, folder = federate.read_federation(tmp_path / "federation.yaml"), NodeFolder(tmp_path / "end-0")
    if ran_under is not None:
        status = NodeStatus(
            node="end-0", parent=ran_under, children=(), phase="idle", round=1, pid=1, updated_s=0.0
        )
        (folder.path / "status.json").write_text(status.to_json())
    federate._leave_old_parent(loaded, "end-0", tmp_path, folder, above)
    assert sent == told


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"node": 1}'])
def test_a_damaged_status_is_said_and_left_out(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "status.json").write_bytes(damage)
    assert NodeFolder(tmp_path).parent is None
    assert [str(tmp_path / "status.json") in line for line in caplog.messages] == [True]


LLAMA = {
    "architecture": "llama",
    "hidden": 8,
    "intermediate": 8,
    "heads": 2,
    "kv_heads": 2,
    "blocks": 2,
}


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (
            {"strategy": {"name": "fedeec", "autoencoder": {"embedding_channels": 4}}},
            {"strategy": {"name": "fedeec", "autoencoder": {"embedding_channels": 2}}},
            "strategy.autoencoder.embedding_channels was 4, is 2",
        ),
        ({}, {"strategy": {"name": "hierfavg"}}, "strategy.*was"),
        ({}, {"seed": 1}, "seed was 0, is 1"),
        (
            {"models": {"small": LLAMA}},
            {"models": {"small": {**LLAMA, "blocks": 1}}},
            r"model.config.blocks was 2, is 1",
        ),
    ],
)
def test_a_state_of_another_federation_is_refused_in_one_line(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], why: str
) -> None:
    (tmp_path / "words.jsonl").write_text('{"text": "some words, again and again"}\n' * 20)
    text = {"data": {"source": str(tmp_path / "words.jsonl"), "text": TEXT, "split": {"successive": True}}}

    def node(changes: dict[str, Any]) -> Node:
        change(tmp_path, **(text if "models" in changes else {}), **changes)
        loaded, clock = federate.read_federation(tmp_path / "federation.yaml"), VirtualClock()
        store = NodeFolder(tmp_path / "end-0")
        return loaded.node("end-0", loaded.device_trainer("end-0", clock), clock, store)

    first = node(before)
    first.start()
    first.take("edge", Message(Kind.STOP))
    node(before).start()
    with pytest.raises(ConfigError, match=f"'end-0' kept is of another federation or node: {why}") as found:
        node({**before, **now}).start()
    assert "\n" not in str(found.value)


def test_one_round_without_devices_takes_a_time_that_is_not_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(tmp_path, rounds={"count": 1})
    app(["federate", "simulate", str(tmp_path / "federation.yaml")], standalone_mode=False)
    app(["federate", "report", str(tmp_path / "federation"), "--target", "0"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "fedavg: 1 round in unknown time (modelled)" in printed
    assert "in 1 round, " in printed
    page = (tmp_path / "federation" / "federation.html").read_text()
    assert "<b>unknown time</b>in all" in page
    for text in (printed, page.partition("<script>")[0]):
        assert "0 us" not in text
        assert "1 rounds" not in text


def test_children_that_parents_share_out_may_move_to_the_other_parents(tmp_path: Path) -> None:
    edges = {"id": "edge", "count": 2, "parent": "cloud", "model": "small"}
    ends = {"id": "end", "count": 2, "parent": "edge", "model": "small", "may_move_to": ["edge-0", "edge-1"]}
    change(tmp_path, nodes=[NODES[0], edges, ends])
    nodes = federate.read_federation(tmp_path / "federation.yaml").nodes
    assert [nodes[id].may_move_to for id in ("end-0", "end-1")] == [("edge-1",), ("edge-0",)]


def test_a_node_whose_data_are_missing_is_not_there_and_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [*NODES, {"id": "lost", "parent": "edge", "model": "small", "data": "gone"}]
    change(tmp_path, nodes=nodes, rounds={"count": 2, "quorum": 0.6})
    app(["federate", "simulate", str(tmp_path / "federation.yaml")], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "lost is not there" in printed
    assert "2 rounds" in printed
    why = r"lost is not there: \S+gone: no such folder. So 'edge' has 2 of 3 children, wanted 3; missing: lost.*quorum"
    elsewhere = [{"id": "other", "parent": "cloud", "model": "small"}]
    elsewhere += [{"id": f"far-{i}", "parent": "other", "model": "small"} for i in range(3)]
    change(tmp_path, nodes=[*nodes, *elsewhere], rounds={"count": 2, "quorum": 0.6})
    app(["federate", "simulate", str(tmp_path / "federation.yaml"), "--migrate", "1"], standalone_mode=False)
    assert "2 rounds" in capsys.readouterr().out
    change(tmp_path, nodes=nodes, rounds={"count": 2, "quorum": 0.6})
    with pytest.raises(ConfigError, match=why):
        app(
            ["federate", "simulate", str(tmp_path / "federation.yaml"), "rounds.quorum=1"],
            standalone_mode=False,
        )


# -- folders of nodes' own ------------------------------------------------------------------------------------------

ANIMALS = {"shape": [3, 4, 4], "classes": ["cat", "dog", "eel"]}


def picture(name: str) -> npt.NDArray[np.uint8]:
    """Return bytes that the name decides, [height, width, channels]."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def write_animals(folder: Path, *classes: str) -> Path:
    """Write three pictures of each class: pictures of one class are the same in every folder, bar one."""
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    for name in classes:
        (folder / "train" / name).mkdir(parents=True)
        for number, seed in enumerate((name, f"{name} again", str(folder))):
            image_module.fromarray(picture(seed)).save(folder / "train" / name / f"{number}.png")
    return folder


def with_folders(folder: Path, images: dict[str, Any], **data: Any) -> Federation:
    """Return a federation of two ends: a has pictures of cats and dogs, b of dogs and eels."""
    nodes = [{"id": "cloud", "model": "small"}]
    for id, classes in (("a", ("cat", "dog")), ("b", ("dog", "eel"))):
        path = folder / id
        if not path.exists():
            write_animals(path, *classes)
        nodes.append({"id": id, "model": "small", "parent": "cloud", "data": str(path)})
    models = {"small": {"architecture": "cnn", "channels": [4]}}
    return federation(
        folder,
        {"name": "fedavg"},
        nodes=nodes,
        models=models,
        rounds={"count": 2},
        data={"images": images, **data},
    )


def test_nodes_with_folders_of_their_own_number_and_scale_alike(tmp_path: Path) -> None:
    loaded = with_folders(tmp_path, ANIMALS)
    a, b = (loaded.data_of(id) for id in "ab")
    assert a is not None
    assert b is not None
    assert (a.labels.tolist(), b.labels.tolist()) == ([0] * 3 + [1] * 3, [1] * 3 + [2] * 3)
    assert a.num_classes == b.num_classes == 3
    dogs = a.inputs["pixels"][3:5], b.inputs["pixels"][:2]
    assert torch.equal(*dogs)
    dog = picture("dog").transpose(2, 0, 1) / 255
    torch.testing.assert_close(dogs[0][0].double(), torch.tensor(2 * dog - 1), rtol=0, atol=1e-6)
    records = federate.make_simulation(loaded).run()
    assert len([line for line in records if line.node == "cloud" and line.loss is None]) == 2

    given = with_folders(tmp_path, {**ANIMALS, "mean": [0.1, 0.2, 0.3], "deviation": [0.5, 1, 2]}).data_of(
        "a"
    )
    assert given is not None
    wanted = (dog - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([0.5, 1, 2])[:, None, None]
    torch.testing.assert_close(given.inputs["pixels"][3].double(), torch.tensor(wanted), rtol=0, atol=1e-6)


def test_folders_of_nodes_are_scaled_as_the_common_data_are(tmp_path: Path) -> None:
    source = write_animals(tmp_path / "common", "cat", "dog", "eel")
    own = load_images(str(source), "train").inputs["pixels"]
    loaded = with_folders(tmp_path, ANIMALS, source=str(source))
    data = loaded.data_of("a")
    assert data is not None
    assert torch.equal(data.inputs["pixels"][:2], own[:2])
    assert torch.equal(data.inputs["pixels"][3:5], own[3:5])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({**ANIMALS, "classes": ["cat", "dog"]}, r"/b: class 'eel' in the train split, wanted cat, dog as"),
        (
            {**ANIMALS, "classes": 3},
            r"/a: classes with names \(cat, dog\) in the train split, wanted 3 of numbers",
        ),
        (
            {**ANIMALS, "shape": [3, 8, 8]},
            r"/a: images of \[3, 4, 4\] in the train split, wanted \[3, 8, 8\]",
        ),
        ({**ANIMALS, "classes": ["cat", "cat"]}, "data.images: classes has a name twice"),
        ({**ANIMALS, "mean": [0.5, 0.5, 0.5]}, "data.images: give mean and deviation, or neither"),
        ({**ANIMALS, "mean": [0.5], "deviation": [1]}, r"mean has 1 number\(s\), the shape 3 channel\(s\)"),
        ({**ANIMALS, "mean": [0, 0, 0], "deviation": [1, 0, 1]}, r"deviation\[1\].*greater than 0"),
    ],
)
def test_a_folder_that_does_not_go_with_the_others_is_one_clear_line(
    tmp_path: Path, images: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as found:
        federate.make_simulation(with_folders(tmp_path, images))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"classes": ["cat", "dog", "eel", "fly"]}, "its number of classes is 4, that of 'cloud' is 3"),
        (
            {"classes": ["eel", "dog", "cat"]},
            r"its list of classes is \['eel', 'dog', 'cat'\], that of 'cloud'",
        ),
        (
            {"mean": [0, 0, 0], "deviation": [1, 1, 1]},
            r"its mean of pixels is \[0.0, 0.0, 0.0\], that of 'cloud'",
        ),
    ],
)
def test_nodes_that_disagree_about_images_are_refused_by_name(
    tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    simulation = federate.make_simulation(with_folders(tmp_path, ANIMALS))
    stranger, clock = with_folders(tmp_path, {**ANIMALS, **other}), VirtualClock()
    simulation.nodes["b"] = Simulated(stranger.node("b", stranger.device_trainer("b", clock), clock), clock)
    with pytest.raises(ColledgeError, match=f"'cloud' refuses 'b': {said}") as found:
        simulation.run()
    assert "\n" not in str(found.value)


def test_busy_seconds_are_the_catalog_s_in_virtual_time_and_a_clock_s_in_real(tmp_path: Path) -> None:
    loaded = federation(
        tmp_path,
        {"name": "fedavg"},
        nodes=[
            {"id": "cloud", "model": "small"},
            {"id": "end", "parent": "cloud", "model": "small", "device": "raspberry-pi-5"},
        ],
    )
    mode = loaded.power_of("end")
    assert mode is not None
    assert mode.achieved_flops_per_s is not None
    works = []
    for clock in (VirtualClock(), RealClock()):
        trainer = loaded.device_trainer("end", clock)
        with trainer.beside(mode.achieved_flops_per_s):  # a second of that device's
            time.sleep(0.05)
        works.append(trainer.take_work())
    assert works[0].compute_s == 1.0
    assert 0.05 <= works[1].compute_s < 1.0
    for work in works:
        assert work.joules == pytest.approx((mode.compute_w - mode.idle_w) * work.compute_s)


def test_who_moves_in_the_first_round_is_not_waited_for_where_it_was(tmp_path: Path) -> None:
    far = {
        "model": "small",
        "bandwidth": "20 Mbit/s",
        "latency": "5 ms",
    }  # joining takes longer than beginning
    loaded = federation(
        tmp_path,
        {"name": "fedavg"},
        rounds={"count": 2},
        nodes=[
            {"id": "cloud", "model": "small"},
            {"id": "edge", "count": 2, "parent": "cloud", "model": "small"},
            {"id": "end", "count": 4, "parent": "edge", **far},
        ],
    )
    simulation = federate.make_simulation(loaded)
    simulation.on_round.append(Migration(loaded.tree, 0.25, seed=0))
    records = simulation.run()
    now = {id: simulation.nodes[id].node.parent for id in loaded.tree.leaves}
    assert now != {id: loaded.tree.parents[id] for id in loaded.tree.leaves}
    assert not [record for record in records if record.missing or record.failed]


def test_averaging_is_the_mean_weighted_by_samples_whatever_the_tree(tmp_path: Path) -> None:
    flat = [{"id": "cloud", "model": "small"}, {"id": "end", "count": 4, "parent": "cloud", "model": "small"}]
    deep = [
        {"id": "cloud", "model": "small"},
        {"id": "edge", "count": 2, "parent": "cloud", "model": "small"},
        {"id": "end", "count": 4, "parent": "edge", "model": "small"},
    ]
    double = {"batch_size": 8, "precision": "float64", "optimizer": {"name": "sgd", "learning_rate": 0.01}}
    found = []
    for nodes in (flat, deep):
        loaded = federation(tmp_path, {"name": "fedavg"}, nodes=nodes, rounds={"count": 3}, local=double)
        simulation = federate.make_simulation(loaded)
        simulation.run()
        found.append(simulation.nodes["cloud"].node.strategy.state().tensors)
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, found[1][name], rtol=1e-10, atol=1e-12), name


def test_a_report_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [{**n, "device": "raspberry-pi-5", "bandwidth": "20 Mbit/s", "latency": "5 ms"} for n in NODES]
    change(tmp_path, nodes=nodes, evaluate_every=1, rounds={"count": 5})
    app(["federate", "simulate", str(tmp_path / "federation.yaml")], standalone_mode=False)
    output = tmp_path / "federation"
    app(["federate", "report", str(output), "--target", "0.5", "--json"], standalone_mode=False)
    value = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    report = read_report(output, target=0.5)
    assert value["strategy"] == report.strategy == "fedavg"
    lines = [json.loads(line) for line in (output / "federation.jsonl").read_text().splitlines()]
    assert report.num_bytes == sum(
        t["sent_bytes"] + t["received_bytes"]
        for line in lines
        for neighbour, t in line["links"].items()
        if (line["node"], neighbour) in {("cloud", "edge"), ("edge", "end-0"), ("edge", "end-1")}
    )
    assert report.seconds == pytest.approx(sum(one.seconds for one in report.rounds))
    known = sum(node.joules or 0.0 for node in report.nodes)
    assert known == pytest.approx(sum(one.joules for one in report.rounds), rel=0.02)
    assert report.source == "modelled"
    assert report.rounds_to_target is not None
    assert report.joules_to_target is not None
    assert report.joules_to_target <= known
    page = (output / "federation.html").read_text()
    assert "fedavg, 4 nodes, 5 rounds" in page
    assert "Weights leave a node" in page


def test_what_is_no_message_is_refused() -> None:
    message = Message(Kind.TASK, 3, 1, Payload({"a": [1, 2]}, {"x": torch.arange(6.0).reshape(2, 3)}))
    data = encode(message)
    again = decode(data)
    assert (again.kind, again.round, again.part, dict(again.payload.fields)) == (
        Kind.TASK,
        3,
        1,
        {"a": [1, 2]},
    )
    assert torch.equal(again.payload.tensors["x"], message.payload.tensors["x"])
    for bad in (
        b"",
        data[:5],
        data[:30],
        data[:-1],
        data + b"x",
        b"x" * 100,
        data[:4] + b"\xff" * 8 + data[12:],
    ):
        with pytest.raises(MessageError):
            decode(bad, DEFAULT_LIMIT_BYTES)
    with pytest.raises(MessageError, match="the limit is"):
        decode(data, len(data) - 1)
