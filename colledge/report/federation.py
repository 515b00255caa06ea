"""A federation's report: what every node and link did, round by round, and what it took in joules and bytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from rich.table import Table

from colledge.records import Record
from colledge.report.charts import Chart, line_chart
from colledge.report.page import render_page
from colledge.report.tables import plain_table
from colledge.units import format_bytes, format_joules, format_seconds

FiguresSource = Literal["measured", "modelled"]


class NodeFigures(Record):
    """What one node did in all rounds.

    Joules are None where nothing is known of the device's power: idling over the whole run, and what computing and
    communicating drew beyond that. `missed` are rounds in which its parent did without its answer.
    """

    node: str
    tier: str
    model: str
    rounds: int = Field(ge=0)
    missed: int = Field(ge=0)
    compute_s: float = Field(ge=0)
    flops: float = Field(ge=0)
    idle_joules: float | None = None
    compute_joules: float | None = None
    communicate_joules: float | None = None
    sent_bytes: int = Field(ge=0)
    received_bytes: int = Field(ge=0)
    accuracy: float | None = None

    @property
    def joules(self) -> float | None:
        """All energy of the node."""
        if self.idle_joules is None or self.compute_joules is None:
            return None
        return self.idle_joules + self.compute_joules + (self.communicate_joules or 0.0)


class LinkFigures(Record):
    """Bytes between a node and its parent, over all rounds."""

    child: str
    parent: str
    up_bytes: int = Field(ge=0)
    down_bytes: int = Field(ge=0)


class RoundFigures(Record):
    """One round of the whole federation: bytes, and joules of the nodes of which they are known, of it alone."""

    round: int = Field(ge=1)
    seconds: float = Field(ge=0)
    num_bytes: int = Field(ge=0)
    joules: float = Field(ge=0)
    accuracy: float | None = None


class FederationReport(Record):
    """What a federation did.

    `source` tells whether seconds are a clock's or a simulation's; joules are watts of the catalog over those seconds.
    `discloses` says what leaves a node, `judged` what accuracies are shares of. `joules_to_target` and
    `rounds_to_target` are up to the first round in which the root reached `target`.
    """

    schema_tag: Literal["colledge/federation-report/1"] = Field(
        default="colledge/federation-report/1", alias="schema"
    )
    strategy: str
    source: FiguresSource
    discloses: str
    judged: str = "test images"
    seconds: float = Field(ge=0)
    nodes: tuple[NodeFigures, ...]
    links: tuple[LinkFigures, ...]
    rounds: tuple[RoundFigures, ...]
    target: float | None = None
    rounds_to_target: int | None = None
    joules_to_target: float | None = None

    @property
    def unknown_power(self) -> tuple[str, ...]:
        """The nodes of whose devices no power is known."""
        return tuple(node.node for node in self.nodes if node.joules is None)

    @property
    def accuracy_text(self) -> str:
        """What accuracy means here, as a sentence."""
        return f"Accuracy is the share of {self.judged} that a model predicts right."

    @property
    def busy_text(self) -> str:
        """Where busy seconds come from, as a sentence."""
        if self.source == "measured":
            return "Busy seconds are measured."
        return "Busy seconds are modelled from the speed of nodes' devices; those of pools are measured."

    @property
    def seconds_text(self) -> str:
        """How long it took, in words: unknown in a simulation without devices and links."""
        return format_seconds(self.seconds) if self.seconds else "unknown time"

    @property
    def joules_text(self) -> str:
        """All energy, in words: at least so much, where some nodes' is not known."""
        known = [node.joules for node in self.nodes if node.joules is not None]
        if not known:
            return "unknown"
        return f"{'at least ' if self.unknown_power else ''}{format_joules(sum(known))}"

    @property
    def num_bytes(self) -> int:
        """All bytes on all links."""
        return sum(link.up_bytes + link.down_bytes for link in self.links)

    @property
    def accuracy(self) -> float | None:
        """The root's last known accuracy."""
        return next((one.accuracy for one in reversed(self.rounds) if one.accuracy is not None), None)

    def tiers(self) -> list[tuple[str, list[NodeFigures]]]:
        """Return the nodes of each tier, from the cloud down."""
        names = ("cloud", "edge", "end")
        found = [(name, [node for node in self.nodes if node.tier == name]) for name in names]
        return [(name, nodes) for name, nodes in found if nodes]


def tier_table(report: FederationReport) -> Table:
    """Return what each tier did: counts, mean accuracy, busy time, joules and bytes a node."""
    table = plain_table("tier", ">nodes", ">accuracy", ">busy", ">energy", ">sent up", ">missed rounds")
    up = {link.child: link.up_bytes for link in report.links}
    for tier, nodes in report.tiers():
        accuracies = [node.accuracy for node in nodes if node.accuracy is not None]
        joules = [node.joules for node in nodes if node.joules is not None]
        busy_s = sum(node.compute_s for node in nodes)
        table.add_row(
            tier,
            str(len(nodes)),
            f"{sum(accuracies) / len(accuracies):.4f}" if accuracies else "-",
            format_seconds(busy_s / len(nodes)) if busy_s else "-",
            format_joules(sum(joules) / len(joules)) if joules else "unknown",
            format_bytes(sum(up.get(node.node, 0) for node in nodes) / len(nodes)),
            str(sum(node.missed for node in nodes)),
        )
    return table


def render(report: FederationReport) -> str:
    """Return the report as one offline HTML page."""
    known = [one for one in report.rounds if one.accuracy is not None]
    charts: dict[str, Chart] = {
        "accuracy": line_chart(
            [one.round for one in known], [float(one.accuracy or 0.0) for one in known], "round", "accuracy"
        ),
        "energy": line_chart(
            [one.round for one in report.rounds],
            _sums([one.joules for one in report.rounds]),
            "round",
            "joules",
        ),
        "bytes": line_chart(
            [one.round for one in report.rounds],
            _sums([float(one.num_bytes) for one in report.rounds]),
            "round",
            "bytes",
        ),
    }
    values: dict[str, Any] = {"report": report}
    return render_page("federation.html.jinja", charts, **values)


def _sums(values: list[float]) -> list[float]:
    """Return each value with all before it added."""
    total, found = 0.0, []
    for value in values:
        total += value
        found.append(total)
    return found
