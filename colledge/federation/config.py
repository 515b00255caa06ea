"""federation.yaml: what the user chooses of a federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from colledge.data.images import ImageSettings
from colledge.data.partition import SplitSettings
from colledge.data.text.source import TextSettings
from colledge.errors import ConfigError
from colledge.federation.learning import LocalSettings
from colledge.federation.rounds import RoundSettings
from colledge.federation.strategies import StrategySettings
from colledge.federation.transport import NodeId
from colledge.federation.tree import Tier, Tree
from colledge.records import Record
from colledge.settings import Objective
from colledge.units import Bytes, BytesPerSecond, Seconds

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]


class DataConfig(Record):
    """One data set of which every leaf gets a part: a name that colledge knows, or a path.

    `public` is the share of the training rows that all may see, and that the root holds; `split` deals the others to
    the leaves. `limit` takes that many training rows only, `test_limit` test rows. Without `source` every leaf has
    `data` of its own and nobody's accuracy is known; then, or where some nodes do not have the common data, `images`
    says what all must look like. Without a mean and a deviation there, pixels are scaled by those of the source's
    training split, without a source from -1 to 1. With `text` the data are text, not images.
    """

    source: str | None = Field(default=None, min_length=1)
    images: ImageSettings | None = None
    text: TextSettings | None = None
    public: float = Field(default=0.0, ge=0, lt=1)
    split: SplitSettings = SplitSettings(iid=True)
    limit: int | None = Field(default=None, ge=1, strict=True)
    test_limit: int | None = Field(default=None, ge=1, strict=True)


class NodeConfig(Record):
    """A node, or `count` alike ones called id-0, id-1, ...; several parents of one name share such children out.

    `trainer` is `device`, or a pool.yaml to train on, whose devices no other node has, planned for
    the least of `objective`. `device` is an entry of the
    catalog, whose speed and power the node has in a simulation; in a real federation only its power counts.
    `bandwidth` and `latency` are of its way to its parent, for a simulation. `address` is where an inner node listens.
    `data` is a path of its own instead of a part of the common data set. `may_move_to` are parents that it may
    change to.
    """

    id: Name
    count: int | None = Field(default=None, ge=1, le=100_000, strict=True)
    parent: Name | None = None
    tier: Tier | None = None
    model: str
    trainer: str = "device"
    objective: Objective = "energy"
    device: str | None = None
    data: Path | None = None
    address: str | None = None
    may_move_to: tuple[Name, ...] = ()
    bandwidth_bytes_per_s: BytesPerSecond | None = Field(default=None, alias="bandwidth", gt=0)
    latency_s: Seconds = Field(default=0.0, alias="latency", ge=0)


class FederationConfig(Record):
    """federation.yaml.

    `models` are configurations by name, of which nodes name one: an architecture and its sizes, without classes and
    image, or vocabulary, which follow from the data. `evaluate_every` counts rounds between looks at the root's
    accuracy; after the last round every node is looked at. `message_limit` is the most bytes of one message.
    """

    schema_tag: Literal["colledge/federation/1"] = Field(default="colledge/federation/1", alias="schema")
    strategy: StrategySettings
    rounds: RoundSettings
    data: DataConfig
    models: dict[str, dict[str, JsonValue]]
    local: LocalSettings = LocalSettings()
    nodes: tuple[NodeConfig, ...] = Field(min_length=2)
    evaluate_every: int = Field(default=1, ge=1, strict=True)
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    message_limit_bytes: Bytes = Field(default=2 * 1024**3, alias="message_limit", gt=0)
    output: Path = Path("federation")

    @model_validator(mode="after")
    def _check(self) -> FederationConfig:
        for index, node in enumerate(self.nodes):
            if node.model not in self.models:
                known = ", ".join(self.models)
                raise ValueError(f"nodes[{index}].model: {node.model!r} is not among models ({known})")
            if node.model != self.nodes[0].model and self.strategy.one_model:
                raise ValueError(
                    f"nodes[{index}].model: saw {node.model!r} and {self.nodes[0].model!r}, wanted one model for all "
                    f"nodes with {self.strategy.name}"
                )
            if node.objective != "energy" and node.trainer == "device":
                raise ValueError(f"nodes[{index}].objective: it is for a node whose trainer is a pool.yaml")
        data = self.data
        if data.source is None and data.images is None and data.text is None:
            raise ValueError("data: give source, or images or text where every node has data of its own")
        if data.images is not None and data.text is not None:
            raise ValueError("data: give images or text, not both")
        return self


def expand(nodes: tuple[NodeConfig, ...]) -> dict[NodeId, NodeConfig]:
    """Return every single node by its id; those with a count become as many.

    Of parents that share such children out, each child may move to the others only.

    Raises:
        ConfigError: Two have one id.
    """
    groups = {node.id: _names(node) for node in nodes}
    found: dict[NodeId, NodeConfig] = {}
    for node in nodes:
        for index, id in enumerate(groups[node.id]):
            if id in found:
                raise ConfigError(f"nodes: {id!r} is there twice.", fix="give every node an id of its own.")
            parents = groups.get(node.parent, (node.parent,)) if node.parent is not None else (None,)
            parent = parents[index % len(parents)]
            moves = tuple(other for other in node.may_move_to if len(parents) == 1 or other != parent)
            found[id] = node.model_copy(
                update={"id": id, "count": None, "parent": parent, "may_move_to": moves}
            )
    return found


def _names(node: NodeConfig) -> tuple[str, ...]:
    return (node.id,) if node.count is None else tuple(f"{node.id}-{i}" for i in range(node.count))


def tree_of(nodes: Mapping[NodeId, NodeConfig]) -> Tree:
    """Return the tree of some nodes.

    Raises:
        ConfigError: They are no tree, a node is of another tier than it says, or may move where nothing is to move to.
    """
    tree = Tree({id: node.parent for id, node in nodes.items()})
    for id, node in nodes.items():
        if node.tier is not None and node.tier != tree.tier(id):
            raise ConfigError(
                f"nodes: {id!r} says tier {node.tier}, and stands where {tree.tier(id)} is.",
                fix="the root is cloud, leaves are end, all between are edge.",
            )
        for parent in node.may_move_to:
            if parent not in nodes:
                what = f"unknown node {parent!r}"
            elif parent == node.parent:
                what = f"{parent!r}, which is its parent already"
            elif parent == id or id in tree.path(parent):
                what = f"{parent!r}, which is itself or below it"
            elif not tree.children(parent):
                what = f"{parent!r}, which has no children and takes none"
            else:
                continue
            raise ConfigError(
                f"nodes: {id!r} may move to {what}.", fix="name other inner nodes in may_move_to."
            )
    return tree
