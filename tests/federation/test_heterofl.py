"""HeteroFL: slices of one model, averaged element by element, at any depth and after restarts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colledge.errors import ConfigError
from colledge.federation.build import Federation
from colledge.federation.learning import LocalSettings
from colledge.federation.message import MessageError, Payload
from colledge.federation.simulation import Simulation
from colledge.federation.strategies.heterofl import HeteroFL, overlapping_mean, shapes_of
from colledge.launch import federate
from tests.federation.test_fedeec import federation
from tests.federation.toy import Memory

HETEROFL = {"name": "heterofl"}
DOUBLE = {
    "batch_size": 8,
    "precision": "float64",
    "optimizer": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9},
}
FLAT = [{"id": "cloud", "model": "large"}] + [
    {"id": f"end-{i}", "parent": "cloud", "model": model}
    for i, model in enumerate(["large", "middle", "middle", "small"])
]
DEEP = [
    {"id": "cloud", "model": "large"},
    {"id": "edge-0", "parent": "cloud", "model": "large"},
    {"id": "edge-1", "parent": "cloud", "model": "middle"},
    *({**node, "parent": f"edge-{i // 3}"} for i, node in enumerate(FLAT[1:])),
]


def made(folder: Path, strategy: dict[str, Any], nodes: list[dict[str, Any]], **changes: Any) -> Federation:
    data = {"source": "digits", "split": {"dirichlet": 1.0}, "limit": 300}
    return federation(
        folder, strategy, **{"nodes": nodes, "data": data, "rounds": {"count": 3}, "local": DOUBLE, **changes}
    )


def run(loaded: Federation) -> Simulation:
    simulation = federate.make_simulation(loaded)
    simulation.run()
    return simulation


def weights(simulation: Simulation, id: str = "cloud") -> dict[str, Tensor]:
    return dict(simulation.nodes[id].node.strategy.state().tensors)


def strategy(simulation: Simulation, id: str) -> HeteroFL:
    found = simulation.nodes[id].node.strategy
    assert isinstance(found, HeteroFL)
    return found


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_models_of_one_size_come_to_fedavg_bit_for_bit(tmp_path: Path, precision: str) -> None:
    nodes = [{**node, "model": "middle"} for node in DEEP]
    found = [
        weights(run(made(tmp_path, {"name": name}, nodes, local={**DOUBLE, "precision": precision})))
        for name in ("fedavg", "heterofl")
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def by_element(whole: Tensor, parts: list[tuple[Tensor, int]]) -> Tensor:
    """Return what the paper defines, an element at a time."""
    mean = whole.clone()
    for place in torch.cartesian_prod(*map(torch.arange, whole.shape)).view(-1, whole.dim()).tolist():
        held = [
            (t[tuple(place)], n) for t, n in parts if all(i < s for i, s in zip(place, t.shape, strict=True))
        ]
        if total := sum(n for _, n in held):
            mean[tuple(place)] = sum(value * (n / total) for value, n in held)
    return mean


@pytest.mark.parametrize("shapes", [[(4, 3, 2), (2, 3, 2), (2, 1, 2)], [(2, 3, 2), (4, 1, 2)], [(3, 3, 1)]])
def test_an_element_is_averaged_over_those_that_hold_it(shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand((4, 3, 2), generator=generator, dtype=torch.float64)
    parts = [
        (torch.rand(shape, generator=generator, dtype=torch.float64), 3 + i) for i, shape in enumerate(shapes)
    ]
    merged = overlapping_mean(whole, [(t, [(n, tuple(t.shape))]) for t, n in parts])
    torch.testing.assert_close(merged, by_element(whole, parts), rtol=1e-14, atol=1e-14)
    assert torch.equal(merged[3, 2, 1], whole[3, 2, 1]) == all(
        s[0] < 4 or s[1] < 3 or s[2] < 2 for s in shapes
    )


def test_a_tree_comes_to_what_one_parent_of_all_leaves_would(tmp_path: Path) -> None:
    flat, deep = run(made(tmp_path, HETEROFL, FLAT)), run(made(tmp_path, HETEROFL, DEEP))
    for name, tensor in weights(flat).items():
        assert torch.allclose(tensor, weights(deep)[name], rtol=1e-10, atol=1e-12), name


def test_a_narrow_child_gets_and_sends_its_slice_alone(tmp_path: Path) -> None:
    nodes = [FLAT[0], *({**node, "model": "small"} for node in FLAT[1:])]
    simulation = federate.make_simulation(made(tmp_path, HETEROFL, nodes))
    before = weights(simulation)
    records = simulation.run()
    after, small = weights(simulation), shapes_of(weights(simulation, "end-0"))
    got = [r.links["cloud"].received_bytes for r in records if r.node == "end-0"]
    sent = sum(8 * t.numel() for t in weights(simulation, "end-0").values())
    assert got[0] > sum(
        4 * t.numel() for t in after.values()
    )  # first comes the whole model, as it began: in float32
    assert sent < got[1] < sent + 2000
    for name, tensor in after.items():
        outside = torch.ones(tensor.shape, dtype=torch.bool)
        outside[tuple(map(slice, small[name]))] = False
        assert torch.equal(tensor[outside], before[name][outside]), name
        assert not torch.equal(tensor[~outside], before[name][~outside]), name
    assert small["block.0.conv.weight"] == (4, 1, 3, 3)
    assert small["head.linear.weight"] == (10, 8 * 2 * 2)


def test_a_run_is_the_same_whoever_dies_and_comes_back(tmp_path: Path) -> None:
    nodes = [{**node, "device": "raspberry-pi-5"} for node in DEEP]
    loaded = made(tmp_path, HETEROFL, nodes, rounds={"count": 3, "deadline": 1e6, "first_deadline": 1e6})
    undisturbed = run(loaded)
    moments = {r.round: r.ended_s for r in undisturbed.records if r.node == "cloud"}
    for id in ("end-3", "edge-0", "cloud"):
        simulation = federate.make_simulation(loaded)
        stores = {one: Memory() for one in simulation.nodes}
        for one, place in simulation.nodes.items():
            place.node = loaded.node(one, loaded.device_trainer(one, place.clock), place.clock, stores[one])

        def back(simulation: Simulation = simulation, id: str = id, stores: Any = stores) -> None:
            clock = simulation.nodes[id].clock
            simulation.restart(id, loaded.node(id, loaded.device_trainer(id, clock), clock, stores[id]))

        simulation.at((moments[1] + moments[2]) / 2, lambda simulation=simulation, id=id: simulation.kill(id))
        simulation.at(100.0, back)
        simulation.run()
        assert max(r.ended_s for r in simulation.records) > 100
        for node in simulation.nodes:
            wanted = weights(undisturbed, node)
            assert all(torch.equal(t, wanted[name]) for name, t in weights(simulation, node).items())
        assert strategy(simulation, "cloud").state().fields == strategy(undisturbed, "cloud").state().fields


@pytest.mark.parametrize(
    ("child", "said"),
    [
        (
            "large",
            r"'end': 'block.0.conv.weight' is \[16, 1, 3, 3\] here and \[8, 1, 3, 3\] at its parent's.*Fix",
        ),
        ("mlp", r"'end': 'block.0.conv.weight' is missing here and \[8, 1, 3, 3\] at its parent's"),
        ("short", r"'end': 'block.1.conv.weight' is missing here"),
    ],
)
def test_a_child_that_is_no_slice_is_refused_in_one_line(tmp_path: Path, child: str, said: str) -> None:
    models = {
        "middle": {"architecture": "cnn", "channels": [8, 16]},
        "large": {"architecture": "cnn", "channels": [16, 32]},
        "short": {"architecture": "cnn", "channels": [8]},
        "mlp": {"architecture": "mlp", "hidden": [8]},
    }
    nodes = [{"id": "cloud", "model": "middle"}, {"id": "end", "parent": "cloud", "model": child}]
    with pytest.raises(ConfigError, match=said) as found:
        run(made(tmp_path, HETEROFL, nodes, models=models))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "fits"), [(2, 1, True), (1, 1, False), (4, 2, False), (2, 2, False)]
)
def test_a_slice_does_not_cut_into_heads(tmp_path: Path, heads: int, kv_heads: int, fits: bool) -> None:
    llama = {
        "architecture": "llama",
        "hidden": 32,
        "intermediate": 16,
        "heads": 4,
        "kv_heads": 2,
        "blocks": 1,
    }
    narrow = {**llama, "hidden": 16, "intermediate": 8, "heads": heads, "kv_heads": kv_heads}
    for index, text in enumerate(Path(__file__).read_text(encoding="utf-8")[:2400].split("\n\n")):
        (tmp_path / f"{index}.txt").write_text(text)
    loaded = made(
        tmp_path,
        HETEROFL,
        [{"id": "cloud", "model": "wide"}, {"id": "end", "parent": "cloud", "model": "narrow"}],
        models={"wide": llama, "narrow": narrow},
        data={"source": str(tmp_path), "text": {"sequence_length": 16}, "limit": 40},
        rounds={"count": 1},
    )
    if fits:
        assert run(loaded).records[-1].node == "cloud"
        return
    with pytest.raises(ConfigError, match=r"'end': attention heads are .* and 8 with 2 at its parent's"):
        run(loaded)


def test_answers_that_are_no_slice_are_refused(tmp_path: Path) -> None:
    simulation = run(made(tmp_path, HETEROFL, FLAT))
    root, good = strategy(simulation, "cloud"), strategy(simulation, "end-1").answer()
    root.check("end-1", good)
    name = "head.linear.weight"
    trained = good.fields["trained"]
    assert isinstance(trained, list)
    slice_ = trained[0]
    too_much = {**slice_, "shapes": {**slice_["shapes"], name: [10, 128]}}
    for answer in (
        Payload(good.fields, {**good.tensors, name: torch.zeros(11, 4, dtype=torch.float64)}),
        Payload(good.fields, {**good.tensors, name: torch.full((10, 64), torch.nan, dtype=torch.float64)}),
        Payload(good.fields, {**good.tensors, name: torch.zeros(10, 64, dtype=torch.int8)}),
        Payload(good.fields, {**good.tensors, name: torch.zeros(10, 64).to(torch.float8_e4m3fn)}),
        Payload(good.fields, {**good.tensors, "more": torch.zeros(1)}),
        Payload(good.fields, {n: t for n, t in good.tensors.items() if n != name}),
        Payload({"trained": [too_much]}, good.tensors),
        Payload({"trained": [{**slice_, "shapes": {}}]}, good.tensors),
        Payload({"trained": [{**slice_, "samples": -1}]}, good.tensors),
        Payload({}, good.tensors),
    ):
        with pytest.raises(MessageError, match="malformed"):
            root.check("end-1", answer)


def test_a_parent_knows_its_children_until_they_leave(tmp_path: Path) -> None:
    root = strategy(run(made(tmp_path, HETEROFL, FLAT)), "cloud")
    small, whole = shapes_of(root.task("end-3").tensors), shapes_of(root.task("new").tensors)
    restarted = HeteroFL(root._node, LocalSettings())
    restarted.restore(root.state())
    assert shapes_of(restarted.task("end-3").tensors) == small
    assert small["head.linear.bias"] == whole["head.linear.bias"] == (10,)
    assert small["block.0.norm.weight"] == (4,)
    root.forget("end-3")
    assert shapes_of(root.task("end-3").tensors) == whole
