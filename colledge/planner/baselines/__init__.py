"""What simpler planners would do on the same pool, by the same simulator: small re-implementations to compare with.

Every baseline knows one way only, uses all devices that the request allows (one-device baselines aside), runs
them in their first power mode, minimises time, and does not look at the deadline. None of it is the original
systems' code; each file names its source. Where all activations are recomputed the plan's `recompute` says so.
"""

from __future__ import annotations

from colledge.errors import ConfigError
from colledge.planner.baselines.asteroid import ASTEROID, asteroid
from colledge.planner.baselines.candidates import Setting, why_not
from colledge.planner.baselines.confidant import CONFIDANT, confidant
from colledge.planner.baselines.data import BY_SPEED, EQUAL, data_parallel
from colledge.planner.baselines.megatron import TENSOR, WITH_PIPELINE, megatron
from colledge.planner.baselines.pipeline import GPIPE, PIPEDREAM, gpipe, pipedream
from colledge.planner.baselines.single import FASTEST, THRIFTIEST, one_device
from colledge.planner.cost import PoolCosts
from colledge.planner.request import Baseline, PlanningRequest

__all__ = ["all_baselines"]


def all_baselines(costs: PoolCosts, request: PlanningRequest) -> tuple[Baseline, ...]:
    """Return what each simpler planner would do; one that has no plan says why.

    Args:
        costs: The pool, the model and what they cost.
        request: The batch, the devices that must or must not be used, and the optimizer's state.
    """
    setting = Setting(costs, request)
    answers: list[Baseline] = []
    for names, run in (
        ((FASTEST, THRIFTIEST), one_device),
        ((EQUAL, BY_SPEED), data_parallel),
        ((GPIPE,), gpipe),
        ((PIPEDREAM,), pipedream),
        ((TENSOR, WITH_PIPELINE), megatron),
        ((ASTEROID,), asteroid),
        ((CONFIDANT,), confidant),
    ):
        try:
            made = run(setting)
        except ConfigError as fault:  # a link or a timing that this plan would need is missing
            answers += [Baseline(name=name, why_not=why_not(fault)) for name in names]
        else:
            answers += [made] if isinstance(made, Baseline) else made
    return tuple(answers)
