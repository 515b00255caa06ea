"""The pipeline schedule as data: generate, lower, validate, simulate; the engine runs the same object. No torch."""

from colledge.schedule.action import Action, ActionKind
from colledge.schedule.generate import compute_order
from colledge.schedule.lower import Schedule, has_backwards, lower, plan_schedule
from colledge.schedule.simulate import Costs, DeviceTimes, Span, Timeline, Transfer, gathers, simulate
from colledge.schedule.validate import validate

__all__ = [
    "Action",
    "ActionKind",
    "Costs",
    "DeviceTimes",
    "Schedule",
    "Span",
    "Timeline",
    "Transfer",
    "compute_order",
    "gathers",
    "has_backwards",
    "lower",
    "plan_schedule",
    "simulate",
    "validate",
]
