"""How fast the planner is, and how good its plans are.

    python benchmarks/planner.py speed                     # seconds and memory against devices, layers and kinds
    python benchmarks/planner.py growth -o growth.html     # the same, plotted
    python benchmarks/planner.py search --seconds 600      # a long random search on 30 pools of 5 to 8 devices
    python benchmarks/planner.py compare                   # against the plans that those searches found
    python benchmarks/planner.py exact --pools 300         # against enumerating every plan
    python benchmarks/planner.py baselines                 # against other planners' plans on catalog Jetson pools

Run with OMP_NUM_THREADS=1. Seconds are this machine's; a plan's time and energy are the simulator's.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import resource
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

from benchmarks.jetson_pools import baselines
from colledge.plan import Plan
from colledge.planner import PlanningRequest, PoolCosts, plan_training
from colledge.planner.draft import Draft, StageDraft, draft_of, make_draft, make_plan
from colledge.planner.judge import Found, Judge
from colledge.planner.layouts import microbatch_sizes
from colledge.planner.moves import Moves
from colledge.planner.sweep import fill_rows
from colledge.planner.tables import Tables, device_classes
from colledge.profiles import ModelProfile, PoolProfile

MB = 1_000_000


# -- made pools --------------------------------------------------------------------------------------------------


def make_model(
    numbers: random.Random, kinds: dict[str, Sequence[tuple[str, float]]], num_layers: int, units: int = 8
) -> ModelProfile:
    """Return embedding + blocks + head; `kinds` gives each device kind's modes with seconds a sample of a block."""
    parameters = numbers.choice((2, 8, 20)) * MB
    saved, out = numbers.choice((5, 30)) * MB, numbers.choice((MB // 4, MB))
    tensor = {
        "units": units,
        "forward_allreduces": 2,
        "backward_allreduces": 2,
        "allreduce_bytes_per_sample": out,
    }
    names = ["embed", *(f"block.{i}" for i in range(num_layers - 2)), "head"]
    layers = [
        {
            "name": name,
            "kind": name.split(".")[0],
            "parameter_bytes": parameters,
            "trainable_parameter_bytes": parameters,
            "output_bytes_per_sample": out,
            "saved_bytes_per_sample": saved,
            "forward_flops_per_sample": 1e9,
            "backward_flops_per_sample": 2e9,
            "tensor": tensor if name.startswith("block") else None,
        }
        for name in names
    ]
    timings = [
        {
            "device_kind": kind,
            "mode": mode,
            "layer_kind": layer,
            "samples": samples,
            "shard_fraction": fraction,
            "forward_s": second * scale * fraction * (samples + 0.3),
            "backward_s": 2 * second * scale * fraction * (samples + 0.3),
            "update_s": 0.02 * second * fraction,
        }
        for kind, modes in kinds.items()
        for mode, second in modes
        for layer, scale in (("embed", 0.1), ("block", 1.0), ("head", 0.5))
        for samples in (1, 4, 8)
        for fraction in ((1.0, 0.5) if layer == "block" else (1.0,))
    ]
    return ModelProfile.model_validate(
        {
            "schema": "colledge/model-profile/1",
            "name": "made",
            "sequence_length": 128,
            "layers": layers,
            "timings": timings,
        }
    )


def made_case(
    seed: int, num_devices: int, num_kinds: int, num_layers: int, *, segments: bool | None = None
) -> tuple[PoolProfile, ModelProfile]:
    """Return a random pool and model: kinds of unequal speed, watts, memory and modes.

    Args:
        seed: Draws everything.
        num_devices: Devices, spread over the kinds.
        num_kinds: Device kinds.
        num_layers: Layers of the model.
        segments: Whether devices share one medium instead of having links of their own; None draws it.
    """
    numbers = random.Random(seed)
    modes: dict[str, list[tuple[str, float]]] = {}
    watts: dict[str, list[dict[str, object]]] = {}
    memory: dict[str, int] = {}
    tight = numbers.random() < 0.5
    for k in range(num_kinds):
        kind, second = f"kind-{k}", numbers.uniform(0.01, 0.1)
        idle, compute = numbers.uniform(1, 9), numbers.uniform(12, 60)
        modes[kind], watts[kind] = [("max", second)], []
        watts[kind].append(
            {
                "name": "max",
                "idle_w": idle,
                "compute_w": compute,
                "communicate_w": idle + 3,
                "source": "measured",
            }
        )
        if numbers.random() < 0.5:
            slower = numbers.uniform(1.2, 2.5)
            modes[kind].append(("low", second * slower))
            low = compute / slower ** numbers.uniform(0.8, 2)
            watts[kind].append(
                {
                    "name": "low",
                    "idle_w": 0.9 * idle,
                    "compute_w": max(low, idle),
                    "communicate_w": idle + 2,
                    "source": "measured",
                }
            )
        memory[kind] = numbers.choice((400, 800, 1600) if tight else (4000, 8000)) * MB
    model = make_model(numbers, modes, num_layers, numbers.choice((1, 4, 8)))
    kinds = [f"kind-{i * num_kinds // num_devices}" for i in range(num_devices)]
    ids = [f"device-{i}" for i in range(num_devices)]
    shared = numbers.random() < 0.3 if segments is None else segments
    bandwidth = (1250 if segments else numbers.choice((6, 12.5, 125))) * MB
    way = {"latency_s": 1e-3, "bandwidth_bytes_per_s": bandwidth}
    pool = PoolProfile.model_validate(
        {
            "schema": "colledge/pool-profile/1",
            "devices": [
                {"id": id, "kind": kind, "memory_bytes": memory[kind], "modes": watts[kind]}
                for id, kind in zip(ids, kinds, strict=True)
            ],
            "links": [] if shared else [{"source": a, "target": b, **way} for a, b in combinations(ids, 2)],
            "segments": [{"name": "air", "devices": ids, **way}] if shared else [],
        }
    )
    return pool, model


# -- speed -------------------------------------------------------------------------------------------------------


def time_planner(
    num_devices: int, num_kinds: int, num_layers: int, batch: int, rounds: int = 3
) -> dict[str, float]:
    """Return the median seconds of planning, peak memory and how far the plan is from the bounds."""
    pool, model = made_case(1, num_devices, num_kinds, num_layers, segments=num_devices > 200)
    seconds = []
    for _ in range(rounds):
        result = plan_training(pool, model, PlanningRequest(global_batch_size=batch))
        seconds.append(result.planning_s)
    figures = result.best.prediction
    assert figures is not None
    return {
        "devices": num_devices,
        "kinds": num_kinds,
        "layers": num_layers,
        "batch": batch,
        "seconds": median(seconds),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "time_over_bound": figures.step_s / result.bounds.step_s,
        "energy_over_bound": figures.energy_joules_per_step / result.bounds.energy_joules_per_step,
    }


def _in_own_process(*arguments: int) -> dict[str, float]:
    """Time one case in a process of its own, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(time_planner, arguments)


def speed() -> None:
    """Print the seconds of the cases that have a target."""
    print("devices kinds layers batch   seconds  target  memory MB  T/LB-T  E/LB-E")
    for *case, target in ((16, 2, 26, 64, 1), (128, 4, 26, 256, 10), (1000, 6, 100, 2048, 60)):
        row = _in_own_process(*case)
        print(
            f"{case[0]:7} {case[1]:5} {case[2]:6} {case[3]:5} {row['seconds']:9.2f} {target:7} "
            f"{row['memory_mb']:10.0f} {row['time_over_bound']:7.2f} {row['energy_over_bound']:7.2f}"
        )


def growth(output: Path) -> None:
    """Plot planning seconds against devices, kinds and layers."""
    from plotly.subplots import make_subplots

    axes: dict[str, list[tuple[int, int, int, int]]] = {
        "devices": [(n, 4, 26, 256) for n in (4, 7, 8, 12, 13, 16, 32, 64, 128, 256, 512, 1000)],
        "kinds": [(64, k, 26, 256) for k in (1, 2, 3, 4, 5, 6, 8)],
        "layers": [(64, 4, n, 256) for n in (6, 13, 26, 50, 100)],
    }
    figure = make_subplots(rows=1, cols=3, subplot_titles=[f"against {name}" for name in axes])
    for column, (name, cases) in enumerate(axes.items(), start=1):
        rows = [_in_own_process(*case, 1) for case in cases]
        for row in rows:
            print(f"{name:8} {json.dumps({key: round(value, 3) for key, value in row.items()})}", flush=True)
        figure.add_scatter(
            x=[row[name] for row in rows], y=[row["seconds"] for row in rows], row=1, col=column
        )
        figure.update_xaxes(type="log", title=name, row=1, col=column)
        figure.update_yaxes(type="log", title="seconds", row=1, col=column)
    figure.update_layout(showlegend=False, title="Planning time")
    output.write_text(figure.to_html(include_plotlyjs=True))


# -- against a long search -----------------------------------------------------------------------------------------


_MOST_IDLE = 300  # rounds without a new plan, after which an annealing begins elsewhere


class LongSearch:
    """Annealing from random drafts, from the best so far and from the planner's answer, until time is up."""

    def __init__(self, pool: PoolProfile, model: ModelProfile, request: PlanningRequest, seed: int) -> None:
        costs = PoolCosts(pool, model)
        self.numbers, self.tables, self.judge = (
            random.Random(seed),
            Tables(costs, request),
            Judge(costs, request),
        )
        self.ids = [device.id for device in pool.devices]
        self.sizes = microbatch_sizes(request.global_batch_size, 512)
        self.moves = Moves(self.tables, device_classes(costs, self.ids), self.sizes)
        self.objective = request.objective
        self.batch = request.global_batch_size

    def run(self, start: Draft, seconds: float) -> Found:
        """Return the best draft found."""
        found = self.judge.judge(start)
        assert found is not None
        best, stop = found, time.process_time() + seconds
        while time.process_time() < stop:
            origin = self.numbers.choice((best, self._random(), self._random()))
            if origin is None:
                continue
            reached = self._anneal(origin, min(stop, time.process_time() + seconds / 12))
            if self._value(reached) < self._value(best):
                best = reached
            if len(self.judge._known) > 200_000:  # memory, not time, is what runs out
                self.judge._known.clear()
        return best

    def _value(self, found: Found) -> float:
        return self.judge.score(found, self.objective)[1]

    def _random(self) -> Found | None:
        numbers, tables = self.numbers, self.tables
        devices = numbers.sample(self.ids, numbers.randint(1, len(self.ids)))
        num_stages = numbers.randint(1, min(len(devices), tables.num_layers))
        groups: list[list[str]] = [[device] for device in devices[:num_stages]]
        for device in devices[num_stages:]:
            numbers.choice(groups).append(device)
        edges = [0, *sorted(numbers.sample(range(1, tables.num_layers), num_stages - 1)), tables.num_layers]
        size = numbers.choice(self.sizes)
        count, stages = self.batch // size, []
        for s, group in enumerate(groups):
            modes = [numbers.choice(tables.modes(device))[0] for device in group]
            layers = (edges[s], edges[s + 1])
            stage: StageDraft | None = fill_rows(
                tables, layers, group, modes, size, min(num_stages - s, count)
            )
            if stage is None:
                return None
            stages.append(stage)
        return self.judge.judge(make_draft(size, tuple(stages), count))

    def _anneal(self, current: Found, stop: float) -> Found:
        best, value = current, self._value(current)
        began, heat = time.process_time(), 0.03
        simulated, idle = self.judge.num_simulated, 0
        while time.process_time() < stop and idle < _MOST_IDLE:
            idle = idle + 1 if self.judge.num_simulated == simulated else 0
            simulated = self.judge.num_simulated
            left = (stop - time.process_time()) / max(stop - began, 1e-9)
            options = list(self.numbers.choice(self.moves.kinds)(current.draft))
            for draft in self.numbers.sample(options, min(3, len(options))):
                found = self.judge.judge(draft)
                if found is None:
                    continue
                rise = self._value(found) / value - 1
                if rise <= 0 or self.numbers.random() < math.exp(-rise / max(heat * left**2, 1e-6)):
                    current, value = found, self._value(found)
                    if value < self._value(best):
                        best = current
                    break
        return best


LONG_SEARCHES = Path(__file__).with_name("long_searches.jsonl")  # the best plans that `search` found so far


def _search_question(seed: int) -> tuple[PoolProfile, ModelProfile, PlanningRequest]:
    numbers = random.Random(5000 + seed)
    case = made_case(seed, numbers.randint(5, 8), numbers.randint(2, 5), numbers.randint(8, 26))
    request = PlanningRequest(
        global_batch_size=numbers.choice((8, 16, 24, 32, 48)),
        objective=numbers.choice(("energy", "energy", "time", "energy-delay")),
        accounting=numbers.choice(("whole-pool", "marginal")),
    )
    return *case, request


def _search_long(arguments: tuple[int, float]) -> dict[str, object]:
    seed, seconds = arguments
    pool, model, request = _search_question(seed)
    search = LongSearch(pool, model, request, seed)
    best = search.run(draft_of(plan_training(pool, model, request).best, model.shard_units), seconds)
    plan = make_plan(best.draft, len(model.layers), request.global_batch_size)
    return {
        "pool": seed,
        "seconds": seconds,
        "simulated": search.judge.num_simulated,
        "plan": plan.model_dump(mode="json"),
    }


def search(num_pools: int, seconds: float, workers: int) -> None:
    """Search for long on every pool that has no plan in `LONG_SEARCHES` yet, and add what was found."""
    known = (
        {json.loads(line)["pool"] for line in LONG_SEARCHES.read_text().splitlines()}
        if LONG_SEARCHES.exists()
        else set()
    )
    todo = [(seed, seconds) for seed in range(num_pools) if seed not in known]
    with multiprocessing.get_context("spawn").Pool(workers) as processes, LONG_SEARCHES.open("a") as file:
        for row in processes.imap_unordered(_search_long, todo):
            print(json.dumps(row), file=file, flush=True)


def compare() -> None:
    """Print how far the planner's plans are above those that `search` found, simulated anew."""
    worst = 0.0
    for line in sorted(
        LONG_SEARCHES.read_text().splitlines(), key=lambda line: int(json.loads(line)["pool"])
    ):
        row = json.loads(line)
        pool, model, request = _search_question(row["pool"])
        judge, result = Judge(PoolCosts(pool, model), request), plan_training(pool, model, request)
        ours, theirs = (
            judge.judge(draft_of(plan, model.shard_units))
            for plan in (result.best, Plan.model_validate(row["plan"]))
        )
        assert ours is not None
        assert theirs is not None
        above = judge.score(ours, request.objective)[1] / judge.score(theirs, request.objective)[1] - 1
        worst = max(worst, above)
        print(
            f"pool {row['pool']:2} {len(pool.devices)} devices {len(model.layers):2} layers "
            f"batch {request.global_batch_size:2} {request.objective:12} {request.accounting:10} "
            f"planned in {result.planning_s:5.2f} s, {100 * above:+.2f} %",
            flush=True,
        )
    print(f"worst: {100 * worst:.2f} %")


# -- against every plan --------------------------------------------------------------------------------------------


def exact(num_pools: int, seed: int) -> None:
    """Compare with enumerating every plan, every objective and accounting; raises on the first difference."""
    from tests.unit.test_planner_exact import check, random_cases

    for number, case in enumerate(random_cases(seed, num_pools, 3500), start=1):
        check(case)
        if number % 20 == 0:
            print(f"{number} pools, {6 * number} questions: all equal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "growth", "search", "compare", "exact", "baselines"))
    parser.add_argument("-o", "--output", type=Path, default=Path("growth.html"))
    parser.add_argument("--pools", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    match given.what:
        case "speed":
            speed()
        case "growth":
            growth(given.output)
        case "search":
            search(given.pools, given.seconds, given.workers)
        case "compare":
            compare()
        case "exact":
            exact(given.pools, given.seed)
        case "baselines":
            baselines()


if __name__ == "__main__":
    main()
