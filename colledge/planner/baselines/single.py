"""One device alone: the fastest, and the one of fewest joules. What a user without a pool does.

Devices run in their first power mode. Joules follow the request's accounting: under `whole-pool` the devices
left out still idle.
"""

from __future__ import annotations

from colledge.plan import Plan, Stage
from colledge.planner.baselines.candidates import Setting, one_shard
from colledge.planner.request import Baseline

FASTEST = "one device, fastest"
THRIFTIEST = "one device, thriftiest"


def one_device(setting: Setting) -> tuple[Baseline, Baseline]:
    """Return the fastest and the thriftiest device that can train alone."""
    named = set(setting.request.must_use)
    if len(named) > 1:
        why = f"{len(named)} devices must be used, and this is one alone"
        return Baseline(name=FASTEST, why_not=why), Baseline(name=THRIFTIEST, why_not=why)
    answers: dict[str, Baseline] = {}
    for look, device in _distinct(setting, [d for d in setting.devices if not named or d in named]).items():
        stages = {size: Stage(layers=(0, setting.num_layers), replicas=(one_shard(device, size),))
                  for size in setting.sizes(1)}  # fmt: skip
        plans = [setting.make_plan([stage], size) for size, stage in stages.items()]
        why_none = "no micro-batch size gives a number of micro-batches that is simulated"
        answers[look] = setting.choose(FASTEST, plans, why_none)
    planned = [answer.plan for answer in answers.values() if answer.plan is not None]
    # A recomputing device counts only where no other fits without.
    plain = [plan for plan in planned if not plan.recomputes(0)] or planned
    if not plain:
        why = "the model fits on no device alone: " + next(iter(answers.values())).why_not
        return Baseline(name=FASTEST, why_not=why), Baseline(name=THRIFTIEST, why_not=why)
    fastest = min(plain, key=lambda plan: _figures(setting, plan)[0])
    thriftiest = min(plain, key=lambda plan: _figures(setting, plan)[1])
    return Baseline(name=FASTEST, plan=fastest), Baseline(name=THRIFTIEST, plan=thriftiest)


def _figures(setting: Setting, plan: Plan) -> tuple[float, float]:
    assert plan.prediction is not None
    if setting.request.accounting == "marginal":
        return plan.prediction.step_s, plan.prediction.marginal_energy_joules_per_step
    return plan.prediction.step_s, plan.prediction.energy_joules_per_step


def _distinct(setting: Setting, devices: list[str]) -> dict[str, str]:
    """Return the first device of each set that is alike but for its links."""
    found: dict[str, str] = {}
    for device in devices:
        profile = setting.pool.device(device)
        found.setdefault(profile.model_copy(update={"id": ""}).model_dump_json(), device)
    return found
