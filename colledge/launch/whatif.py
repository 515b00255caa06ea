"""The what-if options of `colledge plan`: from what was typed to other inputs for the planner. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from colledge.errors import ConfigError
from colledge.launch.planning import PlanningInputs
from colledge.planner.whatif import (
    Changed,
    add_devices,
    apply_changes,
    remove_devices,
    set_bandwidth,
    without_missing,
)
from colledge.profiles import DeviceProfile, PoolProfile
from colledge.profiles.catalog import catalog_device
from colledge.units import parse_bytes_per_s, parse_grams_per_kwh, parse_price_per_kwh, parse_seconds

_MOST_ADDED = 1000

ValueT = TypeVar("ValueT", int, float)


@dataclass(frozen=True)
class WhatIf:
    """The options as they were typed."""

    without: Sequence[str] = ()
    added: Sequence[str] = ()
    bandwidths: Sequence[str] = ()
    deadline: str | None = None
    deadline_step: str | None = None
    steps: int | None = None
    electricity: str | None = None
    carbon: str | None = None

    @property
    def supposes(self) -> bool:
        """Whether the plan is for another pool, deadline or price than the files say."""
        return self != WhatIf()


def apply_what_if(inputs: PlanningInputs, options: WhatIf) -> PlanningInputs:
    """Return what to plan from under the options: devices go, then come, then links change.

    Raises:
        ConfigError: An option is malformed, or names what is not there.
    """
    changed = apply_changes(inputs.pool, _changes(options))
    steps = options.steps or inputs.steps
    run_s, step_s = _deadlines(options, inputs)
    limit_s = _step_limit_s(run_s, step_s, steps)
    request = inputs.request
    if limit_s is not None:
        request = request.model_copy(update={"deadline_step_s": limit_s})
    request = without_missing(request, changed.pool)
    return replace(
        inputs,
        pool=changed.pool,
        request=request,
        steps=steps,
        deadline_s=run_s,
        deadline_step_s=step_s,
        price_per_kwh=_parsed("--electricity", options.electricity, parse_price_per_kwh),
        carbon_grams_per_kwh=_parsed("--carbon", options.carbon, parse_grams_per_kwh),
        notes=(*inputs.notes, *changed.notes),
    )


def _changes(options: WhatIf) -> list[Callable[[PoolProfile], Changed]]:
    changes: list[Callable[[PoolProfile], Changed]] = []
    if options.without:
        changes.append(partial(remove_devices, ids=options.without))
    changes += [_addition(text) for text in options.added]
    named: set[str] = set()
    for text in options.bandwidths:
        name, equals, rate = text.rpartition("=")
        if not equals:
            raise ConfigError(
                f"--bandwidth {text!r} has no '='.",
                fix="write a segment or a link and its bandwidth, such as 'wifi=50 Mbit/s' or 'a->b=1 Gbit/s'.",
            )
        bytes_per_s, name = _parsed("--bandwidth", rate, parse_bytes_per_s), name.strip()
        assert bytes_per_s is not None
        if name in named:
            raise ConfigError(
                f"--bandwidth gives {name!r} twice.", fix="give each segment or link one bandwidth."
            )
        named.add(name)
        changes.append(partial(set_bandwidth, name=name, bytes_per_s=bytes_per_s))
    return changes


def _addition(text: str) -> Callable[[PoolProfile], Changed]:
    """Return the change that `catalog:KIND[:COUNT]` or `pool:KIND[:COUNT]` means."""
    origin, _, rest = text.partition(":")
    kind, _, number = rest.partition(":")
    count = int(number) if number.isascii() and number.isdigit() and len(number) < 9 else 0
    if not number and not text.endswith(":"):
        count = 1
    if origin not in ("catalog", "pool") or not kind or not 1 <= count <= _MOST_ADDED:
        raise ConfigError(
            f"--with {text!r} is not known.",
            fix=f"write catalog:KIND:COUNT or pool:KIND:COUNT with a count of 1 to {_MOST_ADDED}, such as "
            "catalog:jetson-orin-nano:2.",
        )

    def add(pool: PoolProfile) -> Changed:
        template = catalog_device(kind).profile(kind) if origin == "catalog" else _of_kind(pool, kind)
        return add_devices(pool, template, count)

    return add


def _of_kind(pool: PoolProfile, kind: str) -> DeviceProfile:
    for device in pool.devices:
        if device.kind == kind:
            return device
    there = ", ".join(dict.fromkeys(device.kind for device in pool.devices))
    raise ConfigError(
        f"the pool has no device of kind {kind!r}.", fix=f"use one of {there}, or catalog:KIND."
    )


def _deadlines(options: WhatIf, inputs: PlanningInputs) -> tuple[float | None, float | None]:
    """Return the deadlines of the whole run and of a step, in seconds: the options', else those of the files."""
    run_s = _parsed("--deadline", options.deadline, parse_seconds)
    step_s = _parsed("--deadline-step", options.deadline_step, parse_seconds)
    return (
        inputs.deadline_s if run_s is None else run_s,
        inputs.deadline_step_s if step_s is None else step_s,
    )


def _step_limit_s(run_s: float | None, step_s: float | None, steps: int | None) -> float | None:
    """Return the longest step that keeps both deadlines, in seconds."""
    limits = []
    if run_s is not None:
        if steps is None:
            raise ConfigError(
                "--deadline is for the whole run, and its steps are not known.",
                fix="give --steps N too, or --deadline-step for one step.",
            )
        limits.append(run_s / steps)
    if step_s is not None:
        limits.append(step_s)
    if limits and min(limits) <= 0:
        raise ConfigError("a deadline is 0 s, wanted more.", fix="give a longer one, such as 8h.")
    return min(limits, default=None)


def _parsed(option: str, text: str | None, parse: Callable[[object], ValueT]) -> ValueT | None:
    if text is None:
        return None
    try:
        return parse(text.strip())
    except ValueError as fault:
        raise ConfigError(f"{option}: {fault}.", fix="see `colledge plan --help` for an example.") from None
