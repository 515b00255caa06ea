"""Find the best plan: good drafts from a program over device counts, local moves, and on small pools a proof.

    sweep   a dynamic program proposes drafts for every number of stages and devices        any pool
    moves   local changes improve them under the simulator                                  any pool
    exact   every other draft is shown to be no better                                      small pools

What is spent is counted in simulated actions, not in seconds: the same question has the same answer everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from colledge.plan import Plan
from colledge.planner.cost import PoolCosts
from colledge.planner.draft import Draft, draft_of, make_draft
from colledge.planner.exact import Exact
from colledge.planner.judge import Found, Judge
from colledge.planner.layouts import divisors
from colledge.planner.moves import Moves, climb, wander
from colledge.planner.request import FAMILIES, Family, Objective, PlanningRequest
from colledge.planner.sweep import Goal, Sweep, fill_rows
from colledge.planner.tables import Tables, device_classes

_Entry = TypeVar("_Entry")

_MOST_MICROBATCHES = 512
_MOST_SIZES = 5
_MOST_CLASSES = 8
_MOST_POINTS = 40
_STARTS = 4
_CLIMB_ACTIONS = 20_000
_WANDER_ACTIONS = 40000  # for each class of devices
_WANDER_ACTIONS_A_DEVICE, _SMALL_POOL = 3_000, 16
_PROOF_ACTIONS = 3_000_000


class Search:
    """The search for one pool, model and request."""

    def __init__(self, costs: PoolCosts, request: PlanningRequest, devices: Sequence[str]) -> None:
        self.costs, self.request = costs, request
        self.devices = tuple(devices)
        self.tables = Tables(costs, request)
        self.classes = device_classes(costs, devices, request.must_use)
        self.judge = Judge(costs, request)
        self.sizes = microbatch_sizes(request.global_batch_size)
        self.moves = Moves(self.tables, self.classes, self.sizes)
        self.exact = Exact(self.tables, self.judge, self.classes)
        self.proven = False

    def run(self, seeds: Iterable[Plan] = ()) -> Found | None:
        """Return the best draft, or None where none fits.

        Args:
            seeds: Plans known from elsewhere; the answer is never worse than any of them.
        """
        objective = self.request.objective
        known = [draft_of(plan, self.tables.units) for plan in seeds]
        judged = map(self.judge.judge, [*known, *self._proposals()])
        best = self._polish([found for found in judged if found is not None], objective)
        if self.exact.applies():
            best = self.exact.improve(best, objective, _PROOF_ACTIONS)
            self.proven = self.exact.complete
        if best is not None:
            for end in ("time", "energy"):
                self._improve_end(end)
            best = self.judge.best([best, *self.judge.frontier], objective)
        return best

    def _polish(self, drafts: Sequence[Found], objective: Objective) -> Found | None:
        """Improve the best draft of each family and of the best few ways to group devices, then the best for longer."""
        starts = {found.draft: found for found in self.judge.families().values()}
        groupings: dict[tuple[tuple[int, ...], ...], Found] = {}
        for found in sorted(drafts, key=lambda found: self.judge.score(found, objective)):
            grouping = tuple(
                tuple(sorted(self.classes[d] for replica in stage.group for d in replica))
                for stage in found.draft.stages
            )
            groupings.setdefault(grouping, found)
        starts |= {found.draft: found for found in list(groupings.values())[:_STARTS]}
        reached = [
            climb(found, self.moves, self.judge, objective, _CLIMB_ACTIONS) for found in starts.values()
        ]
        best = self.judge.best(reached, objective)
        if best is None:
            return None
        budget = _WANDER_ACTIONS * len(set(self.classes.values()))
        budget += _WANDER_ACTIONS_A_DEVICE * max(0, len(self.devices) - _SMALL_POOL)
        return wander(best, self.moves, self.judge, objective, budget)

    def _improve_end(self, objective: Objective) -> None:
        """Extend the frontier to one of its ends."""
        start = self.judge.best(self.judge.frontier, objective)
        if start is not None and objective != self.request.objective:
            climb(start, self.moves, self.judge, objective, _CLIMB_ACTIONS)

    def families(self) -> dict[Family, Found]:
        """Return the best draft found of each kind of parallelism."""
        found = self.judge.families()
        return {family: found[family] for family in FAMILIES if family in found}

    def frontier(self) -> list[Found]:
        """Return the drafts that nothing simulated beats in both time and energy, fastest first; few of many."""
        return _spread(self.judge.frontier, _MOST_POINTS)

    def coverage(self) -> str:
        """Return in words how much was searched, and whether the answer is proven."""
        text = f"{self.judge.num_simulated} plans were simulated"
        if self.proven:
            return f"{text}; bounds on {self.exact.num_skeletons} layouts and cuts prove that no other plan is better."
        return (
            f"{text}, found by a program over devices of each kind and by local changes. The space is too large for a "
            "proof that none is better; the bounds say how much better one could be."
        )

    # -- proposals -------------------------------------------------------------------------------------------

    def _proposals(self) -> Iterable[Draft]:
        """Yield drafts to start from: one device of each class alone, and what the sweep proposes."""
        members: dict[int, list[str]] = {}
        for device, number in self.classes.items():
            members.setdefault(number, []).append(device)
        for group in members.values():
            for size in self.sizes:
                for mode, _ in self.tables.modes(group[0]):
                    whole = (0, self.tables.num_layers)
                    stage = fill_rows(self.tables, whole, group[:1], [mode], size, 1)
                    if stage is not None:
                        yield make_draft(size, (stage,), self.request.global_batch_size // size)
        marginal = self.request.accounting == "marginal"
        sweep = Sweep(self.tables, self._merged(list(members.values())), marginal)
        for size in _spread(self.sizes, _MOST_SIZES):
            yield from sweep.drafts(size, self._goals(), keep=3)

    def _goals(self) -> list[Goal]:
        idle = sum(device.modes[0].idle_w for device in self.tables.pool.devices)
        if self.request.accounting == "marginal":
            idle = 0.0
        time, energy = Goal(1.0, 1e-9), Goal(idle)
        match self.request.objective:
            case "time":
                return [time]
            case "energy":
                return [energy] if self.request.deadline_step_s is None else [energy, time]
            case "energy-delay":
                return [energy, time, Goal(3 * max(idle, 1.0))]

    def _merged(self, groups: list[list[str]]) -> list[list[str]]:
        """Return at most a few groups: classes of similar speed are taken together (the sweep only proposes)."""
        groups = sorted(groups, key=lambda members: self._whole_s(members[0]))
        while len(groups) > _MOST_CLASSES:
            gaps = [self._whole_s(b[0]) / self._whole_s(a[0]) for a, b in pairwise(groups)]
            at = gaps.index(min(gaps))
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
        return groups

    def _whole_s(self, device: str) -> float:
        return max(self.tables.busy_s(device, None, (0, self.tables.num_layers), 1, 1.0), 1e-12)


def _spread(entries: Sequence[_Entry], most: int) -> list[_Entry]:
    """Return at most so many of the entries, evenly spread, both ends among them."""
    if len(entries) <= most:
        return list(entries)
    steps = dict.fromkeys(round(i * (len(entries) - 1) / (most - 1)) for i in range(most))
    return [entries[i] for i in steps]


def microbatch_sizes(batch: int) -> list[int]:
    """Return the divisors of the batch that are tried as micro-batch sizes, largest first."""
    sizes = [d for d in divisors(batch) if batch // d <= _MOST_MICROBATCHES]
    return sizes[::-1]
