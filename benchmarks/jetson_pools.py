"""The planner against other planners' plans on pools of Jetson boards from the catalog; nothing here is measured.

Every combination of four pools, two networks and three models is planned for time and for energy:

    pools      boards of one to three kinds
    networks   a full-duplex link between any two boards: 100 Mbit/s with 1 ms, 1,000 Mbit/s with 0.3 ms
    models     layers' bytes and FLOPs without timings, so that every time comes from the catalog's rates

Some of the other planners keep the order in which boards are listed, and none knows power modes. So that neither
decides for us, each of them plans up to four times, for boards listed from the fastest to the slowest and the other
way, all in their default and all in their fastest mode; its best answer counts, for time and for energy apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from math import inf

from colledge.plan import Plan
from colledge.planner import Baseline, PlanningRequest, PoolCosts, plan_training
from colledge.planner.baselines import all_baselines
from colledge.planner.baselines.asteroid import ASTEROID
from colledge.planner.baselines.confidant import CONFIDANT
from colledge.planner.baselines.data import EQUAL
from colledge.planner.baselines.megatron import TENSOR, WITH_PIPELINE
from colledge.planner.baselines.pipeline import GPIPE, PIPEDREAM
from colledge.planner.baselines.single import FASTEST, THRIFTIEST
from colledge.planner.request import Objective
from colledge.profiles import DeviceProfile, LayerProfile, LinkProfile, ModelProfile, PoolProfile
from colledge.profiles.catalog import catalog_device
from colledge.settings import LoraSettings

FLOAT = 4

EQUAL_SPLITS = (EQUAL, GPIPE, PIPEDREAM, TENSOR, WITH_PIPELINE)
COLUMNS: Mapping[str, Sequence[str]] = {
    "equal splits": EQUAL_SPLITS,
    "Asteroid": (ASTEROID,),
    "Confidant": (CONFIDANT,),
    "one device": (FASTEST, THRIFTIEST),
}
SHORT = {
    EQUAL: "data",
    GPIPE: "GPipe",
    PIPEDREAM: "PipeDream",
    TENSOR: "tensor",
    WITH_PIPELINE: "pipeline x tensor",
}

# Chosen before the first run. Batches are those common for these models on small devices; each has many divisors,
# so that no planner lacks micro-batch sizes.
MIXES: dict[str, dict[str, int]] = {  # fastest boards first
    "mixed five": {"jetson-xavier-nx": 1, "jetson-tx2": 2, "jetson-nano": 2},
    "one strong": {"jetson-orin-nano": 1, "jetson-nano": 4},
    "three pairs": {"jetson-orin-nano": 2, "jetson-xavier-nx": 2, "jetson-tx2": 2},
    "all equal": {"jetson-xavier-nx": 4},
}
NETWORKS: Mapping[int, float] = {100: 1e-3, 1000: 0.3e-3}  # Mbit/s: seconds of latency
TARGET = 2.1  # what the best of the other planners claims over its peers (Asteroid)
BATCHES = {"ResNet-50": 32, "BERT-base-sized": 32, "Llama 1.1B, LoRA": 16}


# -- pools ---------------------------------------------------------------------------------------------------------


def make_pool(
    mix: Mapping[str, int], mbit_per_s: int, *, fastest: bool = False, held: bool = False
) -> PoolProfile:
    """Return boards of the catalog, joined two by two.

    Args:
        mix: How many of which kind.
        mbit_per_s: Bandwidth of every link, each way; the latency goes with it.
        fastest: Put every board's fastest power mode first, instead of the catalog's default one.
        held: Leave every board its first mode alone.
    """
    devices: list[DeviceProfile] = []
    for kind, count in mix.items():
        entry = catalog_device(kind)
        mode = max(entry.modes, key=lambda mode: mode.achieved_flops_per_s).name if fastest else None
        short = kind.removeprefix("jetson-")
        devices += [entry.profile(f"{short}-{i}", mode) for i in range(count)]
    if held:
        devices = [device.model_copy(update={"modes": device.modes[:1]}) for device in devices]
    return PoolProfile(
        schema_tag="colledge/pool-profile/1",
        devices=tuple(devices),
        links=tuple(
            LinkProfile(
                source=a.id,
                target=b.id,
                latency_s=NETWORKS[mbit_per_s],
                bandwidth_bytes_per_s=mbit_per_s * 1e6 / 8,
                provenance="declared",
            )
            for a, b in combinations(devices, 2)
        ),
    )


def ways_to_list(mix: Mapping[str, int], mbit_per_s: int) -> list[PoolProfile]:
    """Return the pool in both orders, in default and in fastest modes; as it is first, and none twice."""
    found: list[PoolProfile] = []
    for fastest in (False, True):
        for listed in (dict(mix), dict(reversed(list(mix.items())))):
            pool = make_pool(listed, mbit_per_s, fastest=fastest)
            if pool not in found:
                found.append(pool)
    return found


def describe_mix(mix: Mapping[str, int]) -> str:
    """Return the boards in words."""
    titles = {kind: kind.removeprefix("jetson-").replace("-", " ") for kind in mix}
    return " + ".join(
        f"{count} {titles[kind].title().replace('Nx', 'NX').replace('Tx2', 'TX2')}"
        for kind, count in mix.items()
    )


# -- models --------------------------------------------------------------------------------------------------------


@dataclass
class _Convolutions:
    """Adds up what a chain of convolutions, each with its batch norm, costs for one image."""

    weights: int = 0
    macs: int = 0
    saved: int = 0  # values kept for the backward pass

    def add(self, side: int, inputs: int, outputs: int, kernel: int, *, relu: bool) -> None:
        """Add a convolution to `outputs` channels of `side` x `side`; its input was counted by whoever made it."""
        kernels, area = kernel * kernel * inputs * outputs, side * side
        self.weights += kernels + 2 * outputs  # the batch norm scales and shifts
        self.macs += kernels * area
        self.saved += outputs * area * (1 + relu)  # the batch norm keeps its input, the ReLU its output

    def layer(self, name: str, kind: str, output: int, frozen_input_macs: int = 0) -> LayerProfile:
        """Return the layer; `frozen_input_macs` are those whose input needs no gradient."""
        return LayerProfile(
            name=name,
            kind=kind,
            parameter_bytes=FLOAT * self.weights,
            trainable_parameter_bytes=FLOAT * self.weights,
            output_bytes_per_sample=FLOAT * output,
            saved_bytes_per_sample=FLOAT * self.saved,
            forward_flops_per_sample=2 * self.macs,
            backward_flops_per_sample=2 * (2 * self.macs - frozen_input_macs),
        )


def resnet50() -> ModelProfile:
    """Return ResNet-50 for 224 x 224 images: stem, 16 bottlenecks, head.

    From the shapes of He et al. (arXiv 1512.03385, table 1), with the stride in the 3 x 3 convolution as torchvision
    has it: 25,557,032 parameters and 4.09 G multiply-accumulates. Matrix products alone count as arithmetic.
    """
    stem = _Convolutions(saved=3 * 224 * 224)
    stem.add(112, 3, 64, 7, relu=True)
    pooled = 64 * 56 * 56
    stem.saved += 3 * pooled  # the pooled values, and where each came from (8 bytes)
    layers = [stem.layer("stem", "stem", pooled, stem.macs)]
    inputs, side = 64, 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            before, outputs = side, 4 * width
            side = side // 2 if stage > 1 and block == 0 else side
            chain = _Convolutions()
            chain.add(before, inputs, width, 1, relu=True)
            chain.add(side, width, width, 3, relu=True)
            chain.add(side, width, outputs, 1, relu=True)  # the ReLU follows the sum
            if block == 0:
                chain.add(side, inputs, outputs, 1, relu=False)
            layers.append(chain.layer(f"{stage}.{block}", "bottleneck", outputs * side * side))
            inputs = outputs
    classes = 1000
    head = _Convolutions(weights=classes * (inputs + 1), macs=classes * inputs, saved=inputs + classes)
    layers.append(head.layer("head", "head", classes))
    return ModelProfile(
        schema_tag="colledge/model-profile/1",
        name="ResNet-50",
        sequence_length=1,
        layers=tuple(layers),
        provenance="modelled",
    )


def bert_base_sized() -> ModelProfile:
    """Return a decoder of BERT-base's dimensions (109 M parameters) on rows of 128 tokens, all of it trained."""
    from transformers import GPT2Config

    from colledge.measure.analytic import model_profile_from_config
    from colledge.models import HuggingFaceCausalLM

    config = GPT2Config(
        vocab_size=30_522, n_positions=512, n_embd=768, n_layer=12, n_head=12, bos_token_id=0, eos_token_id=0
    )
    return model_profile_from_config(
        HuggingFaceCausalLM(config.to_dict()), name="BERT-base-sized", sequence_length=128
    )


def llama_lora() -> ModelProfile:
    """Return a Llama of 1.1 G frozen parameters (TinyLlama's dimensions) on rows of 512 tokens.

    Trained are adapters of rank 16 beside the query and value projections; trained whole, weights, gradients and
    AdamW's moments would be 17.6 GB.
    """
    from transformers import LlamaConfig

    from colledge.measure.analytic import model_profile_from_config
    from colledge.models import HuggingFaceCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return model_profile_from_config(
        HuggingFaceCausalLM(config.to_dict(), LoraSettings(rank=16)),
        name="Llama 1.1B, LoRA",
        sequence_length=512,
    )


@cache
def make_model(name: str) -> ModelProfile:
    """Return a model of `BATCHES`."""
    makers = {"ResNet-50": resnet50, "BERT-base-sized": bert_base_sized, "Llama 1.1B, LoRA": llama_lora}
    return makers[name]()


# -- comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The plan for one objective beside the other planners'; values are seconds or joules a step.

    `held` is ours where every board stays in its default power mode.
    """

    objective: Objective
    ours: float
    plan: Plan
    bound: float
    planning_s: float
    held: float
    others: Mapping[str, float] = field(default_factory=dict)
    why_not: Mapping[str, str] = field(default_factory=dict)

    def best_of(self, names: Sequence[str]) -> tuple[str, float]:
        """Return the best of some baselines and its ratio to ours; infinite where none has a plan."""
        name = min(names, key=lambda name: self.others.get(name, inf))
        return name, self.others.get(name, inf) / self.ours

    @property
    def worse_than(self) -> list[str]:
        """The baselines whose plan is better than ours; there should be none."""
        return [name for name, value in self.others.items() if value < self.ours * (1 - 1e-9)]


def value_of(plan: Plan, objective: Objective) -> float:
    """Return the seconds or the joules of a step, as predicted."""
    assert plan.prediction is not None
    return plan.prediction.step_s if objective == "time" else plan.prediction.energy_joules_per_step


def compare(
    mix: Mapping[str, int], mbit_per_s: int, model: ModelProfile, batch: int, objective: Objective
) -> Comparison:
    """Plan for one objective, and set every baseline beside the plan."""
    request = PlanningRequest(global_batch_size=batch, objective=objective)
    pool, *listed_otherwise = ways_to_list(mix, mbit_per_s)
    result = plan_training(pool, model, request)
    baselines: list[Baseline] = list(result.baselines)
    for other in listed_otherwise:
        baselines += all_baselines(PoolCosts(other, model), request)
    others: dict[str, float] = {}
    why_not: dict[str, str] = {}
    for baseline in baselines:
        if baseline.plan is None:
            why_not[baseline.name] = baseline.why_not
        else:
            value = value_of(baseline.plan, objective)
            others[baseline.name] = min(value, others.get(baseline.name, inf))
    held = plan_training(make_pool(mix, mbit_per_s, held=True), model, request).best
    bound = result.bounds.step_s if objective == "time" else result.bounds.energy_joules_per_step
    return Comparison(
        objective=objective,
        ours=value_of(result.best, objective),
        plan=result.best,
        bound=bound,
        planning_s=result.planning_s,
        held=value_of(held, objective),
        others=others,
        why_not={name: why for name, why in why_not.items() if name not in others},
    )


def all_cases() -> Iterator[tuple[str, int, str]]:
    """Yield every pool, bandwidth and model, by model."""
    for model in BATCHES:
        for mbit_per_s in NETWORKS:
            for mix in MIXES:
                yield mix, mbit_per_s, model


# -- tables --------------------------------------------------------------------------------------------------------


def _ratio(ratio: float) -> str:
    if ratio == inf:
        return "-"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def table_head(objective: Objective) -> str:
    """Return the head of a Markdown table."""
    unit = "step" if objective == "time" else "energy"
    names = ["model", "Mbit/s", "pool", f"our {unit}", "our plan", *COLUMNS, "bound"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def table_row(mix: str, mbit_per_s: int, model: str, comparison: Comparison) -> str:
    """Return a row of a Markdown table: our value, our plan, and the others' values over ours."""
    value, plan = comparison.ours, comparison.plan
    cells = [
        model,
        str(mbit_per_s),
        mix,
        (f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
        + (" s" if comparison.objective == "time" else " J"),
        f"{plan.family}, {len(plan.devices)} of {sum(MIXES[mix].values())}",
    ]
    for column, names in COLUMNS.items():
        name, ratio = comparison.best_of(names)
        best = f" ({SHORT[name]})" if column == "equal splits" and ratio < inf else ""
        cells.append(_ratio(ratio) + best)
    return f"| {' | '.join(cells)} | {comparison.bound / value:.2f} |"


def baselines() -> None:
    """Print both tables and what they come to.

    Raises:
        SystemExit: A plan of another planner is better than ours.
    """
    for name, kinds in MIXES.items():
        print(f"{name}: {describe_mix(kinds)}")
    faults: list[str] = []
    objectives: tuple[Objective, ...] = ("time", "energy")
    for objective in objectives:
        print(f"\n{table_head(objective)}")
        found = []
        for case in all_cases():
            mix, mbit_per_s, model = case
            row = compare(MIXES[mix], mbit_per_s, make_model(model), BATCHES[model], objective)
            print(table_row(*case, row), flush=True)
            faults += [f"{', '.join(map(str, case))}, {objective}: {name}" for name in row.worse_than]
            found.append((mix, row))
        print(f"\n{objective}: {summary(found)}", flush=True)
    if faults:
        raise SystemExit("better than ours:\n" + "\n".join(faults))


def summary(found: Sequence[tuple[str, Comparison]]) -> str:
    """Return the ranges of a table in words."""
    mixed = [row.best_of(EQUAL_SPLITS)[1] for mix, row in found if len(MIXES[mix]) > 1]
    equal = [row.best_of(EQUAL_SPLITS)[1] for mix, row in found if len(MIXES[mix]) == 1]
    held = [row.held / row.ours for _, row in found]
    return (
        f"the best equal split over our plan is {min(mixed):.2f} to {max(mixed):.2f} on mixed pools, at least {TARGET} "
        f"in {sum(ratio >= TARGET for ratio in mixed)} of {len(mixed)}, and {min(equal):.2f} to {max(equal):.2f} on "
        f"equal boards; with power modes held ours would be {min(held):.2f} to {max(held):.2f} times as much; "
        f"planning took at most {max(row.planning_s for _, row in found):.1f} s"
    )
