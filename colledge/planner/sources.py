"""Where the figures behind a plan come from, and a warning for each that nobody measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from colledge.plan import Plan
from colledge.planner.cost import PoolCosts
from colledge.planner.request import PlanningRequest
from colledge.profiles import LinkProfile, SegmentProfile
from colledge.profiles.device import Source

Figures = Literal["times", "watts", "links", "layers"]

_NOISY_SPREAD = 0.1
_MOST_NAMES = 4


@dataclass(frozen=True)
class FigureSource:
    """Where some figures come from: the times or watts of a device, a link, or the bytes of the model's layers."""

    what: Figures
    name: str
    source: Source


def figure_sources(plan: Plan, request: PlanningRequest, costs: PoolCosts) -> list[FigureSource]:
    """Return the sources of everything that a plan was weighed by, also of devices that it leaves out.

    Devices that the request refuses count only where their idle watts do.
    """
    pool, model = costs.pool, costs.model
    modes = {place.shard.device: place.shard.mode for place in plan.places()}
    weighed = [device for device in pool.devices if device.id not in request.must_not_use]
    drawing = pool.devices if request.accounting == "whole-pool" else weighed
    found = [FigureSource("layers", model.name, model.provenance)]
    for device in weighed:
        mode = device.mode(modes.get(device.id)).name
        found.append(FigureSource("times", device.id, costs.time_source(device.kind, mode)))
    found += [FigureSource("watts", d.id, d.mode(modes.get(d.id)).source) for d in drawing]
    ids = {device.id for device in weighed}
    links: list[LinkProfile | SegmentProfile] = [*pool.links, *pool.segments]
    for link in links:
        if len(ids.intersection(_ends(link))) > 1:
            found.append(FigureSource("links", _link_name(link), link.provenance))
    return found


def _ends(link: LinkProfile | SegmentProfile) -> tuple[str, ...]:
    return link.devices if isinstance(link, SegmentProfile) else (link.source, link.target)


def _link_name(link: LinkProfile | SegmentProfile) -> str:
    return link.name if isinstance(link, SegmentProfile) else f"{link.source}->{link.target}"


def estimates(plan: Plan, request: PlanningRequest, costs: PoolCosts) -> list[str]:
    """Return a sentence for each kind of figure behind a plan that is not measured, or measured badly."""
    groups: dict[tuple[Figures, Source], list[str]] = {}
    for figure in figure_sources(plan, request, costs):
        if figure.source != "measured":
            groups.setdefault((figure.what, figure.source), []).append(figure.name)
    notes = [_sentence(what, source, names) for (what, source), names in groups.items()]
    kinds = {device.kind for device in costs.pool.devices if device.id not in request.must_not_use}
    timings = [row for row in costs.model.timings if row.device_kind in kinds]
    noisy = [row for row in timings if row.spread > _NOISY_SPREAD]
    if noisy:
        worst = max(noisy, key=lambda row: row.spread)
        notes.append(
            f"Estimate: {len(noisy)} of {len(timings)} timings are noisy; the worst is {worst.layer_kind!r} on "
            f"{worst.device_kind!r} with a spread of {100 * worst.spread:.0f} %."
        )
    layers = costs.model.layers
    if any(layer.saved_bytes_per_sample for layer in layers) and not any(
        layer.workspace_bytes_per_sample for layer in layers
    ):
        notes.append(
            f"Estimate: the profile of {costs.model.name} says nothing of workspace (workspace_bytes_per_sample), so "
            "devices may need more memory than planned; `colledge profile` counts it."
        )
    return notes


def _sentence(what: Figures, source: Source, names: Sequence[str]) -> str:
    match what:
        case "layers":
            return (
                f"Estimate: the bytes and FLOPs of {names[0]}'s layers are {source}, not counted on a device."
            )
        case "times":
            return (
                f"Estimate: the times of {enumerate_names(names)} come from {source} rates, not from timings."
            )
        case "watts":
            return f"Estimate: the watts of {enumerate_names(names)} are {source}, not measured."
        case "links":
            return f"Estimate: bandwidth and latency of {enumerate_names(names)} are {source}, not measured."


def basis(sources: Iterable[FigureSource]) -> str:
    """Return what a prediction rests on: `measured times, declared watts, measured links, modelled layers`."""
    kinds: dict[Figures, list[Source]] = {"times": [], "watts": [], "links": [], "layers": []}
    for figure in sources:
        if figure.source not in kinds[figure.what]:
            kinds[figure.what].append(figure.source)
    return ", ".join(f"{' and '.join(seen)} {what}" for what, seen in kinds.items() if seen)


def enumerate_names(names: Sequence[str]) -> str:
    """Return names for a sentence; of many only the first few, and how many more there are."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: _MOST_NAMES - 1])} and {len(names) - _MOST_NAMES + 1} more"
