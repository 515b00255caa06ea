"""plan.md: the planning report as text, for a terminal, an issue or a repository. The same content as plan.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from colledge.report.planning import PlanReport
from colledge.report.record import FamilyFigures
from colledge.units import format_bytes, format_count, format_joules, format_seconds

_BAR_WIDTH = 20


def plan_markdown(report: PlanReport) -> str:
    """Return the planning report in Markdown; predictions are marked modelled, and what they rest on is said."""
    sections = [
        f"# {_text(report.model)}: the plan",
        _estimates(report),
        _head(report),
        _plan(report),
        _limits(report),
        _list("Why this plan", report.reasons),
        _families(report),
        _baselines(report),
        _frontier(report),
        _devices(report),
        _sources(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(report: PlanReport) -> str:
    plan, chosen = report.plan, report.chosen
    lines = [
        f"Chosen for {report.goal}: {_code(plan.describe())} ({plan.family}), "
        f"{format_count(plan.num_microbatches, 'micro-batch', 'es')} of {format_count(plan.microbatch_size, 'row')}.",
        "",
        f"- **{format_seconds(chosen.step_s)}** a step (modelled){_bound('LB-T', report.time_ratio)}",
        f"- **{format_joules(chosen.energy_joules_per_step)}** a step, "
        f"{'devices of the plan' if report.marginal else 'whole pool'} (modelled)"
        f"{_bound('LB-E', report.energy_ratio)}",
        f"- {format_joules(chosen.energy_joules_per_step / report.tokens_per_step)} a token (modelled)",
    ]
    running = report.running
    if running is not None:
        lines.append(f"- {running.text()} for {running.steps:,} steps (modelled)")
    return "\n".join([*lines, "", f"Predictions are simulated from {report.basis}."])


def _bound(name: str, ratio: float | None) -> str:
    return "" if ratio is None else f", {ratio:.2f} x the least possible ({name})"


def _estimates(report: PlanReport) -> str:
    if not report.estimates:
        return ""
    return "\n".join(["> **This plan rests on estimates.**", *(f"> - {_text(e)}" for e in report.estimates)])


def _plan(report: PlanReport) -> str:
    rows = []
    for place in report.plan.places():
        stage, shard = report.plan.stages[place.stage_index], place.shard
        again = ", computed again for backward" if report.plan.recomputes(place.stage_index) else ""
        share = report.memory_share(shard.device)
        rows.append(
            (
                str(place.stage_index),
                report.layers_text(stage) + again,
                shard.device + (f" ({shard.mode})" if shard.mode else ""),
                f"{stage.replicas[place.replica_index].samples} of {report.plan.microbatch_size}",
                f"{shard.fraction:.0%}",
                f"{report.share_of_step(report.figures(shard.device).compute_s):.0%}",
                f"{_bar(share)} {share:.0%} of {format_bytes(report.memory_bytes[shard.device])}",
            )
        )
    heads = ("stage", "layers", "device", "rows", "share", "computes", "memory")
    hops = " → ".join(format_bytes(size) for size in report.boundary_bytes)
    carried = f"\n\nA micro-batch carries {hops} from stage to stage." if hops else ""
    return f"## The plan (modelled)\n\n{_table(heads, rows)}{carried}"


def _limits(report: PlanReport) -> str:
    shares = report.shares
    rows = [
        (f"{shares.slowest_device} computes", f"{shares.computing:.0%}"),
        ("the pipeline fills, drains and waits", f"{shares.bubble:.0%}"),
        ("waiting for links", f"{shares.links:.0%}"),
    ]
    table = _table(("of the step", "share"), rows)
    return f"## What limits it (modelled)\n\n{_text(shares.headline)}\n\n{table}"


def _families(report: PlanReport) -> str:
    ranked = sorted(report.families.items(), key=lambda item: item[1].energy_joules_per_step)
    rows = [_plan_row(name, figures, report) for name, figures in ranked]
    return f"## The best plan found of each family (modelled)\n\n{_table(_PLAN_HEADS, rows)}"


def _baselines(report: PlanReport) -> str:
    if not report.baselines:
        return ""
    rows = []
    for one in report.baselines:
        if one.figures is not None:
            rows.append(_plan_row(one.name, one.figures, report))
        if one.why_not:
            rows.append((one.name, one.why_not, "", "", "", "", ""))
    return f"## What simpler planners would do (modelled)\n\n{_table(_PLAN_HEADS, rows)}"


_PLAN_HEADS = ("", "plan", "step", "x time", "energy a step", "x energy", "memory")


def _plan_row(name: str, figures: FamilyFigures, report: PlanReport) -> tuple[str, ...]:
    time, energy = report.times_chosen(figures)
    peak = figures.peak_memory_bytes
    chosen = figures == report.chosen
    return (
        f"{name} (chosen)" if chosen else name,
        figures.description,
        format_seconds(figures.step_s),
        "–" if time is None else f"{time:.2f}",
        format_joules(figures.energy_joules_per_step),
        "–" if energy is None else f"{energy:.2f}",
        "–" if peak is None else format_bytes(peak),
    )


def _frontier(report: PlanReport) -> str:
    rows = [
        (
            format_seconds(f.step_s),
            format_joules(f.energy_joules_per_step),
            f.description + (" (chosen)" if f == report.chosen else ""),
        )
        for f in report.frontier
    ]
    bounds = report.bounds
    if bounds.step_s is not None and bounds.energy_joules_per_step is not None:
        energy = format_joules(bounds.energy_joules_per_step)
        rows.append((format_seconds(bounds.step_s), energy, "no plan can go below either (LB-T, LB-E)"))
    return f"## Time against energy (modelled)\n\n{_table(('step', 'energy a step', 'plan'), rows)}"


def _devices(report: PlanReport) -> str:
    rows = []
    for id in report.prediction.devices:
        idle, compute, communicate = report.energy_split(id)
        held = report.memory.get(id)
        memory = "left out"
        if held is not None:
            parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in held.items() if size)
            memory = f"{format_bytes(sum(held.values()))}: {parts}"
        rows.append(
            (
                id,
                *(format_joules(joules) for joules in (idle, compute, communicate)),
                report.power[id].source,
                memory,
            )
        )
    heads = ("device", "idling", "computing", "communicating", "watts are", "memory")
    return f"## Energy of a step and memory by device (modelled)\n\n{_table(heads, rows)}"


def _sources(report: PlanReport) -> str:
    rows = [(figure.what, ", ".join(figure.names), figure.source) for figure in report.sources]
    table = _table(("figures", "of", "source"), rows)
    return f"## Where the figures come from\n\n{table}"


def _list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {_text(line)}" for line in lines)]) if lines else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bar(share: float) -> str:
    filled = min(_BAR_WIDTH, round(_BAR_WIDTH * share))
    return "█" * filled + "░" * (_BAR_WIDTH - filled)


def _text(text: str) -> str:
    """Return text without the characters that a table or HTML would read."""
    one_line = " ".join(text.split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text}`" if "`" not in text else _text(text)
