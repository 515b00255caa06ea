"""`colledge plan --advise`: the table of single changes. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colledge.launch.planning import PlanningInputs, whole_run
from colledge.planner.advise import Advice, AdvisedChange, advise
from colledge.profiles.catalog import read_catalog
from colledge.units import format_joules, format_seconds


def give_advice(inputs: PlanningInputs, progress: Callable[[str], None]) -> Advice:
    """Plan every single change of a pool, devices of the catalog among them.

    Raises:
        ConfigError: The pool or the model cannot be planned with at all.
    """
    catalog = [entry.profile(entry.kind) for entry in read_catalog().values()]
    return advise(inputs.pool, inputs.model, inputs.request, catalog, progress=progress)


def show_advice(advice: Advice, inputs: PlanningInputs, console: Console) -> None:
    """Print what each change takes and gains, what the run costs with it, and which one helps most."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    free = whole_run(0.0, inputs)
    run = [f"{free.steps:,} steps"] if free else []
    for column in ("change", "step", "J/step", "less energy", "less time", *run):
        table.add_column(column, justify="left" if column == "change" else "right", overflow="fold")
    for change in (advice.now, *advice.changes):
        if change.step_s is not None and change.energy_joules_per_step is not None:
            whole = whole_run(change.energy_joules_per_step, inputs)
            table.add_row(
                Text(change.change),
                format_seconds(change.step_s),
                f"{change.energy_joules_per_step:.4g}",
                _percent(change.energy_gain),
                _percent(change.time_gain),
                *([whole.text()] if whole else []),
            )
    console.print(table)
    for change in (advice.now, *advice.changes):
        if change.why_not:
            console.print(Text(f"- {change.change}: no plan ({change.why_not})"))
    if advice.best_for_energy is None and advice.best_for_time is None:
        console.print("No single change helps.")
    else:
        _print_best("energy", advice.best_for_energy, advice, console)
        _print_best("time", advice.best_for_time, advice, console)
    for note in (
        *advice.notes,
        "bought devices and cables are estimates; what they cost to buy is not counted",
    ):
        console.print(Text(f"- {note}"))


def _print_best(what: str, name: str | None, advice: Advice, console: Console) -> None:
    if name is None:
        console.print(Text(f"For {what} no single change helps."))
        return
    best: AdvisedChange = next(change for change in advice.changes if change.change == name)
    assert best.step_s is not None
    assert best.energy_joules_per_step is not None
    now, amount = advice.now, ""
    if what == "energy" and now.energy_joules_per_step is not None:
        amount = f" (from {format_joules(now.energy_joules_per_step)} a step)"
    elif what == "time" and now.step_s is not None:
        amount = f" (from {format_seconds(now.step_s)} a step)"
    reached = format_joules(best.energy_joules_per_step) if what == "energy" else format_seconds(best.step_s)
    console.print(Text(f"Best for {what}: {name}: {reached} a step{amount}."))
    for note in best.notes:
        console.print(Text(f"- {note}"))


def _percent(gain: float | None) -> str:
    return "-" if gain is None else f"{gain:+.1%}"
