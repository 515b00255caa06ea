"""Any plan trains exactly as one process does: losses, weights, predictions, and a change of plans half-way.

The yardstick is the plain Hugging Face model on the whole batch in one process. Every tree of stages, replicas
and shards of up to four devices is drawn with random cuts, rows, fractions, schedules, models and data; at the
end the examples together must have covered everything that a plan can express.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Trainer,
)

from colledge.data.batch import Batch
from colledge.models import HuggingFaceCausalLM
from colledge.models.float64 import keep_float64
from colledge.parallel import Engine, EngineSettings, Message, OptimizerSettings
from colledge.parallel.engine import command
from colledge.plan import Plan
from tests import forked
from tests.multiproc.faulty_worker import FaultyWorkers
from tests.multiproc.workers import Workers

NUM_STEPS = 20
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
VOCABULARY = 61
DEVICES = ("d0", "d1", "d2", "d3")
KINDS = ("llama", "qwen2", "gpt2")
MODELS = tuple(f"{kind}-{tie}" for tie in ("tied", "untied") for kind in KINDS)

OPTIMIZERS = {
    "adamw": OptimizerSettings(learning_rate=1e-2, weight_decay=0.1),
    "adamw-clipped": OptimizerSettings(learning_rate=1e-2, weight_decay=0.1, gradient_clipping=0.5),
    "sgd-clipped": OptimizerSettings(
        name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, gradient_clipping=1.0
    ),
}

_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
# further families, each with what it has beside the others: windows, soft-caps, norms of heads, fused projections
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},  # with buffers that are saved and never train
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **_SLIDING},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **_SLIDING},
    "gpt_neox": {"hidden_dropout": 0.0},
    "mistral": {"sliding_window": 4},
    "opt": {"ffn_dim": 46, "word_embed_proj_dim": 24, "dropout": 0.0, "pad_token_id": 1},
    "phi3": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": 4},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def _config(name: str) -> PretrainedConfig:
    """Return a tiny model of 3 or 4 blocks; its inner widths are no multiples of its shard units."""
    kind, _, tie = name.partition("-")
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tie == "tied",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        "initializer_range": 0.1,  # large enough that attention is not uniform and every gradient counts
    }
    separate = {
        "hidden_size": 32,
        "intermediate_size": 46,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
    }
    match kind:
        case "llama":
            return LlamaConfig(**common, **separate, num_hidden_layers=3, pad_token_id=0)
        case "qwen2":
            return Qwen2Config(**common, **separate, num_hidden_layers=4)
        case _ if kind in FAMILIES:
            special = {"num_hidden_layers": 3, "pad_token_id": 0, **FAMILIES[kind]}
            return AutoConfig.for_model(kind, **common, **separate, **special)
    gpt2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    del common["attention_dropout"]
    return GPT2Config(**common, **gpt2, n_embd=32, n_head=4, n_layer=3, n_positions=32, n_inner=50)


@cache
def _model(name: str) -> HuggingFaceCausalLM:
    return HuggingFaceCausalLM(_config(name).to_dict())


@dataclass(frozen=True)
class Case:
    """What is trained, beside the plan: the yardstick is made once a case."""

    model: str = "llama-tied"
    optimizer: str = "adamw"
    global_batch_size: int = 8
    padding: str = "right"  # none | right | left
    empty_rows: int = 0  # the last rows of every batch are padding only
    precision: str = "float64"
    num_steps: int = NUM_STEPS


def _optimizer(case: Case) -> OptimizerSettings:
    """Return a case's optimizer.

    AdamW divides by the gradient's own size, so an entry whose true gradient is 0 (the key biases of GPT-2) moves
    by round-off divided by `eps`: in float32 and with the usual 1e-8 one process alone strays from its own
    float64 run by 1e-2. The larger `eps` makes float32 a question that has an answer.
    """
    chosen = OPTIMIZERS[case.optimizer]
    return chosen.model_copy(update={"eps": 1e-3}) if case.precision == "float32" else chosen


@cache
def make_batch(case: Case, index: int, extra_rows: int = 0) -> Batch:
    """Return the batch of a step; the sequence length changes from one to the next."""
    generator = torch.Generator().manual_seed(1000 + index)
    rows, length = case.global_batch_size + extra_rows, (10, 7)[index % 2]
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if case.padding == "none":
        return Batch({"input_ids": ids}, {"labels": ids.clone()})
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    if case.empty_rows:
        lengths[case.global_batch_size - case.empty_rows : case.global_batch_size] = 0
    positions = torch.arange(length)
    mask = positions < lengths if case.padding == "right" else positions >= length - lengths
    ids = ids.masked_fill(~mask, 0)
    labels = ids.masked_fill(~mask, -100)
    return Batch({"input_ids": ids, "attention_mask": mask.long()}, {"labels": labels})


@dataclass(frozen=True)
class Outcome:
    """What training gave."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    evaluated: float
    logits: Tensor

    def difference(self, other: Outcome) -> float:
        """Return the largest relative difference; of tensors, relative to the other's largest entry."""
        assert set(self.weights) == set(other.weights)
        numbers = zip(
            [*self.losses, *self.norms, self.evaluated],
            [*other.losses, *other.norms, other.evaluated],
            strict=True,
        )
        tensors = [(self.weights[name], other.weights[name]) for name in self.weights]
        tensors.append((self.logits, other.logits))
        differences = [abs(a - b) / abs(b) for a, b in numbers]
        differences += [float((a - b).abs().max() / b.abs().max()) for a, b in tensors]
        return float(torch.tensor(differences, dtype=torch.float64).max())  # unlike max(), NaN if one is NaN


def _start_weights(case: Case) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        _config(case.model), dtype=getattr(torch, case.precision)
    )
    with torch.no_grad():
        for name, parameter in _saved(model).items():
            if name.endswith("bias"):  # they begin as zeros, where a lost or doubled bias would not show
                parameter.normal_(std=0.1)
    return model, {name: p.detach().clone() for name, p in _saved(model).items()}


def _saved(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, tied ones once, and the buffers that are saved with it."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    return {**dict(model.named_parameters()), **buffers}


def _summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )


def _round_after(model: Any, layer_index: int) -> None:
    """Round what a Llama's layer gives to bfloat16 on its way on, and its gradient on its way back."""
    module = model.model.layers[layer_index - 1] if layer_index else model.model.embed_tokens
    module.register_forward_hook(lambda _module, _inputs, output: output.bfloat16().to(output.dtype))


@cache
def reference(case: Case, rounded_after: tuple[int, ...] = ()) -> Outcome:
    """Train the plain model in this process; some layers' outputs can be rounded as a wire would round them."""
    torch.set_num_threads(1)
    model, _ = _start_weights(case)
    for layer_index in rounded_after:
        _round_after(model, layer_index)
    if case.precision == "float64":
        keep_float64(model)
    chosen = _optimizer(case)
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in model.named_parameters() if (name in decaying) == decays]}
        for decays in (True, False)
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = chosen.weight_decay, 0.0
    optimizer: torch.optim.Optimizer
    if chosen.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=chosen.learning_rate, eps=chosen.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=chosen.learning_rate, momentum=chosen.momentum)
    losses, norms = [], []
    for index in range(case.num_steps):
        batch = make_batch(case, index)
        labels = batch.targets["labels"]
        optimizer.zero_grad()
        loss = _summed_loss(model(**batch.inputs).logits, labels) / (labels[:, 1:] != -100).sum()
        loss.backward()
        if chosen.gradient_clipping is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.gradient_clipping)))
        optimizer.step()
        losses.append(loss.item())
    final = make_batch(case, case.num_steps, extra_rows=3)
    with torch.no_grad():
        logits = model(**final.inputs).logits
    return Outcome(
        losses,
        norms,
        {name: p.detach() for name, p in _saved(model).items()},
        float(_summed_loss(logits, final.targets["labels"])),
        logits,
    )


def _engine(plan: Plan, case: Case, workers: Workers) -> Engine:
    _, weights = _start_weights(case)
    engine_settings = EngineSettings(
        optimizer=_optimizer(case),
        precision=case.precision,  # type: ignore[arg-type]
    )
    return Engine(plan, _model(case.model), weights, engine_settings, workers.ranks, workers.wire)


def train(plans: Iterable[Plan], case: Case, workers: Workers) -> Outcome:
    """Train under the plans, each for an equal share of the steps; the state moves from one to the next."""
    plans = list(plans)
    steps_each = case.num_steps // len(plans)
    engine: Engine | None = None
    losses, norms = [], []
    for plan in plans:
        before, engine = engine, _engine(plan, case, workers) if engine is None else engine
        if before is not None:
            layers = {name: before.checkpoint_layer(name) for name in before.model.layer_names}
            step = before.step
            before.close()
            engine = _engine(plan, case, workers)
            for name, values in layers.items():
                engine.restore_layer(name, values, step)
        for _ in range(steps_each):
            record = engine.train_step(make_batch(case, engine.step))
            losses.append(record.loss)
            if record.gradient_norm is not None:
                norms.append(record.gradient_norm)
    assert engine is not None
    weights = {name: t for layer in engine.state_dict().values() for name, t in layer.items()}
    final = make_batch(case, case.num_steps, extra_rows=3)
    evaluation = engine.evaluate(final)
    evaluated, num_targets = evaluation.loss, evaluation.num_targets
    assert num_targets == int((final.targets["labels"][:, 1:] != -100).sum())
    logits = engine.forward(final)
    engine.close()
    return Outcome(losses, norms, weights, evaluated, logits)


# -- plans ---------------------------------------------------------------------------------------------------------

Tree = tuple[tuple[int, int], ...]  # of each stage: replicas, shards a replica


def _trees(num_devices: int) -> list[Tree]:
    """Return every tree of stages, replicas and shards with exactly so many devices."""
    if num_devices == 0:
        return [()]
    return [
        ((used // shards, shards), *rest)
        for used in range(1, num_devices + 1)
        for shards in range(1, used + 1)
        if used % shards == 0
        for rest in _trees(num_devices - used)
    ]


TREES = [tree for num_devices in range(1, 5) for tree in _trees(num_devices)]

FLOAT32_TREES = TREES[1::2]


def _name(tree: Tree) -> str:
    return ">".join(f"{replicas}x{shards}" for replicas, shards in tree)


@st.composite
def _parts(draw: st.DrawFn, total: int, count: int, least: int) -> list[int]:
    """Draw `count` whole numbers of at least `least` that sum to `total`; the simplest draw is unequal."""
    parts = []
    for later in range(count - 1, 0, -1):
        part = draw(st.integers(least, total - later * least))
        parts.append(part)
        total -= part
    return [*parts, total]


@st.composite
def _plans(draw: st.DrawFn, tree: Tree, model: HuggingFaceCausalLM, global_batch_size: int) -> Plan:
    """Draw a valid plan with this tree."""
    num_layers, units = len(model.layer_names), model.shard_units
    divisors = [size for size in range(2, global_batch_size) if global_batch_size % size == 0]
    microbatch_size = draw(st.sampled_from([*divisors, global_batch_size]))
    devices = iter(draw(st.permutations(DEVICES)))
    cuts = draw(_parts(num_layers, len(tree), 1))
    stages, start = [], 0
    for (num_replicas, num_shards), size in zip(tree, cuts, strict=True):
        samples = draw(_parts(microbatch_size, num_replicas, 0))
        fractions = [part / units for part in draw(_parts(units, num_shards, 1))]
        stages.append(
            {
                "layers": [start, start + size],
                "replicas": [
                    {"samples": n, "shards": [{"device": next(devices), "fraction": f} for f in fractions]}
                    for n in samples
                ],
            }
        )
        start += size
    num_microbatches = global_batch_size // microbatch_size
    schedule: dict[str, Any] = {"name": draw(st.sampled_from(["1f1b", "gpipe"]))}
    if schedule["name"] == "1f1b" and draw(st.sampled_from([True, False])):
        depths = draw(st.lists(st.integers(1, num_microbatches + 1), min_size=len(tree), max_size=len(tree)))
        schedule["warmup"] = sorted(depths, reverse=True)
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": num_layers,
            "global_batch_size": global_batch_size,
            "microbatch_size": microbatch_size,
            "schedule": schedule,
            "stages": stages,
            "recompute": draw(st.lists(st.booleans(), min_size=len(tree), max_size=len(tree))),
        }
    )


def _rotated(values: tuple[str, ...], turn: int) -> list[str]:
    turn %= len(values)
    return [*values[turn:], *values[:turn]]


@st.composite
def _cases(draw: st.DrawFn, tree: Tree, precision: str = "float64") -> tuple[Case, Plan]:
    """Draw what to train and a plan for it; each tree begins with another model and another optimizer."""
    turn = TREES.index(tree)
    case = Case(
        model=draw(st.sampled_from(_rotated(MODELS, turn))),
        optimizer=draw(st.sampled_from(_rotated(tuple(OPTIMIZERS), turn // 2))),
        global_batch_size=draw(st.sampled_from([6, 8, 9, 4])),
        padding=draw(st.sampled_from(_rotated(("right", "left", "none"), turn // 3))),
        precision=precision,
    )
    plan = draw(_plans(tree, _model(case.model), case.global_batch_size))
    if case.padding != "none" and plan.num_microbatches > 1 and draw(st.sampled_from([True, False])):
        case = replace(case, empty_rows=plan.microbatch_size)
    return case, plan


def _features(case: Case, plan: Plan) -> set[str]:
    """Return what an example covers."""
    sizes = [stage.layers[1] - stage.layers[0] for stage in plan.stages]
    samples = [[replica.samples for replica in stage.replicas] for stage in plan.stages]
    data = any(len(stage.replicas) > 1 for stage in plan.stages)
    tensor = any(stage.num_shards > 1 for stage in plan.stages)
    pipeline = plan.num_stages > 1
    default = plan.model_copy(update={"schedule": plan.schedule.model_copy(update={"warmup": None})})
    odd = plan.schedule.warmup is not None and plan.warmup_depths() != default.warmup_depths()
    kind, _, tie = case.model.partition("-")
    return {
        feature
        for feature, there in {
            "samples unequal": any(len(set(n)) > 1 for n in samples),
            "samples zero": any(0 in n for n in samples),
            "cut unequal": len(set(sizes)) > 1,
            "stage of one layer": pipeline and 1 in sizes,
            "shards unequal": any(len(set(stage.replicas[0].fractions)) > 1 for stage in plan.stages),
            "data x pipeline": data and pipeline and not tensor,
            "tensor x pipeline": tensor and pipeline and not data,
            "tensor x data": any(len(s.replicas) > 1 and s.num_shards > 1 for s in plan.stages),
            "all three": data and tensor and pipeline,
            "one micro-batch": plan.num_microbatches == 1,
            "odd warm-up": pipeline and odd,
            "recomputation": plan.recompute is not None and any(plan.recompute),
            "recomputation in one of two stages": len(set(plan.recompute or ())) == 2,
            "padding": case.padding != "none",
            "last micro-batch all padding": case.empty_rows > 0,
        }.items()
        if there
    } | {
        f"{len(plan.devices)} devices",
        f"family {plan.family}",
        f"schedule {plan.schedule.name}",
        f"{tie} over {'stages' if pipeline else 'one stage'}",
        f"model {kind}",
        f"optimizer {case.optimizer}",
        f"padding {case.padding}",
    }


FEATURES = {
    "samples unequal",
    "samples zero",
    "cut unequal",
    "stage of one layer",
    "shards unequal",
    "data x pipeline",
    "tensor x pipeline",
    "tensor x data",
    "all three",
    "one micro-batch",
    "odd warm-up",
    "recomputation",
    "recomputation in one of two stages",
    "padding",
    "last micro-batch all padding",
    *(f"{count} devices" for count in range(1, 5)),
    *(f"family {family}" for family in ("single", "data", "pipeline", "tensor", "hybrid")),
    *(f"schedule {name}" for name in ("1f1b", "gpipe")),
    *(f"{tie} over {span}" for tie in ("tied", "untied") for span in ("stages", "one stage")),
    *(f"model {kind}" for kind in KINDS),
    *(f"optimizer {name}" for name in OPTIMIZERS),
    *(f"padding {side}" for side in ("none", "right", "left")),
}
EXAMPLES_A_TREE = {1: 2, 2: 3, 3: 3, 4: 2}  # by number of devices

_covered: dict[str, set[str]] = {"float64": set(), "float32": set()}
_plans_run: dict[str, set[str]] = {"float64": set(), "float32": set()}


def _check(case: Case, plan: Plan, workers: Workers) -> None:
    difference = train([plan], case, workers).difference(reference(case))
    assert difference < TOLERANCE[case.precision], (difference, case, plan.describe(), plan)
    _plans_run[case.precision].add(plan.model_dump_json())
    _covered[case.precision] |= _features(case, plan)


def _property_settings(max_examples: int) -> settings:
    """Return the same examples every time; no shrinking, as every example trains for real."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
    )


@pytest.mark.parametrize("tree", TREES, ids=_name)
def test_any_plan_trains_as_one_process_does(tree: Tree, workers: Workers) -> None:
    @_property_settings(EXAMPLES_A_TREE[sum(r * s for r, s in tree)])
    @given(_cases(tree))
    def trains_alike(drawn: tuple[Case, Plan]) -> None:
        _check(*drawn, workers)

    trains_alike()


@pytest.mark.parametrize("tree", FLOAT32_TREES, ids=_name)
def test_float32_trains_as_one_process_does(tree: Tree, workers: Workers) -> None:
    @_property_settings(1)
    @given(_cases(tree, "float32"))
    def trains_alike(drawn: tuple[Case, Plan]) -> None:
        _check(*drawn, workers)

    trains_alike()


def _stage(layers: tuple[int, int], *replicas: tuple[int, dict[str, float]]) -> dict[str, Any]:
    return {
        "layers": list(layers),
        "replicas": [
            {"samples": samples, "shards": [{"device": d, "fraction": f} for d, f in shards.items()]}
            for samples, shards in replicas
        ],
    }


def _plan(*stages: dict[str, Any], global_batch_size: int = 8, microbatch_size: int = 4) -> Plan:
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": stages[-1]["layers"][1],
            "global_batch_size": global_batch_size,
            "microbatch_size": microbatch_size,
            "stages": list(stages),
        }
    )


PLANS = {
    "data": _plan(_stage((0, 5), (3, {"d0": 1}), (1, {"d1": 1}))),
    "pipeline": _plan(_stage((0, 1), (4, {"d0": 1})), _stage((1, 5), (4, {"d1": 1}))),
    "tensor": _plan(_stage((0, 5), (4, {"d0": 0.75, "d1": 0.25}))),
    "hybrid": _plan(
        _stage((0, 2), (4, {"d2": 0.25, "d0": 0.75})),
        _stage((2, 5), (3, {"d3": 1}), (1, {"d1": 1})),
        microbatch_size=4,
    ),
    "hybrid reversed": _plan(
        _stage((0, 3), (1, {"d1": 1}), (1, {"d3": 1})),
        _stage((3, 5), (2, {"d0": 0.5, "d2": 0.5})),
        microbatch_size=2,
    ),
    "one device": _plan(_stage((0, 5), (8, {"d2": 1})), microbatch_size=8),
}


@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        ("hybrid", "data", Case("llama-tied", "adamw-clipped")),
        ("one device", "hybrid reversed", Case("gpt2-tied", "adamw")),
        ("tensor", "hybrid", Case("llama-untied", "sgd-clipped")),
        ("pipeline", "tensor", Case("gpt2-tied", "sgd-clipped")),
        ("data", "pipeline", Case("gpt2-untied", "adamw-clipped")),
        ("hybrid reversed", "hybrid", Case("llama-tied", "adamw")),
    ],
    ids=lambda value: f"{value.model}-{value.optimizer}" if isinstance(value, Case) else value,
)
def test_training_goes_on_exactly_under_another_plan(
    before: str, after: str, case: Case, workers: Workers
) -> None:
    outcome = train([PLANS[before], PLANS[after]], case, workers)
    assert outcome.difference(reference(case)) < TOLERANCE["float64"]


def test_layers_are_restored_in_any_order(workers: Workers) -> None:
    case = Case("llama-tied")
    engine = _engine(PLANS["pipeline"], case, workers)
    for index in range(10):
        engine.train_step(make_batch(case, index))
    layers = {name: engine.checkpoint_layer(name) for name in engine.model.layer_names}
    engine.close()
    engine = _engine(PLANS["hybrid"], case, workers)
    for name in reversed(engine.model.layer_names):
        engine.restore_layer(name, layers[name], 10)
    losses = [engine.train_step(make_batch(case, index)).loss for index in range(10, NUM_STEPS)]
    engine.close()
    assert losses == pytest.approx(reference(case).losses[10:], rel=1e-10)


FAMILY_PLANS = {
    "data": PLANS["data"],
    "pipeline": _plan(
        *(_stage((i, i + 1), (4, {f"d{i}": 1})) for i in range(3)), _stage((3, 5), (4, {"d3": 1}))
    ),
    "hybrid": PLANS["hybrid"],
    "tensor": _plan(_stage((0, 5), (4, {"d0": 0.25, "d1": 0.75}))),
}


SHARD_KINDS = ("gpt_neox", "opt", "phi3", "qwen3")  # projections in groups, apart, fused; with norms of heads


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        (f, p)
        for f in FAMILIES
        for p in FAMILY_PLANS
        if (p != "tensor" or f in SHARD_KINDS) and (f != "apertus" or p in ("data", "pipeline"))  # is not cut
    ],
)
def test_a_model_found_by_structure_trains_as_one_process_does(
    family: str, plan: str, workers: Workers
) -> None:
    tie = "untied" if family == "phi3" else "tied"
    case = Case(f"{family}-{tie}", "adamw-clipped", padding="left", num_steps=6)
    outcome = train([FAMILY_PLANS[plan]], case, workers)
    assert outcome.difference(reference(case)) < TOLERANCE["float64"]


# -- bfloat16 between stages ---------------------------------------------------------------------------------------

ROUNDED = {
    "two stages, shards to replicas": PLANS["hybrid"],
    "three stages, computed again": _plan(
        _stage((0, 1), (3, {"d0": 1}), (1, {"d1": 1})),
        _stage((1, 3), (4, {"d3": 1})),
        _stage((3, 5), (4, {"d2": 1})),
    ).model_copy(update={"recompute": (False, True, False)}),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_on_the_wire_is_rounding_at_the_cuts(name: str, workers: Workers) -> None:
    case = Case("llama-tied", "adamw-clipped")
    plan = ROUNDED[name].model_copy(update={"wire_precision": "bfloat16"})
    cuts = tuple(stage.layers[1] - 1 for stage in plan.stages[:-1])
    outcome = train([plan], case, workers)
    assert outcome.difference(reference(case, cuts)) < TOLERANCE["float64"]
    assert outcome.difference(reference(case)) > 1e6 * TOLERANCE["float64"]


# -- negative controls ---------------------------------------------------------------------------------------------

_BOTH = ("d0", "d1")
_DROP = {device: {"fault": "drop_all_reduce", "number": 3} for device in _BOTH}
_SMALL = {"bucket_bytes": 4096}

# name -> plan, model, what to inject in each device
CONTROLS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "nothing broken": ("data", "llama-tied", {}),
    "many small buckets": ("data", "llama-tied", dict.fromkeys(_BOTH, _SMALL)),
    "an all-reduce over replicas dropped": ("data", "llama-tied", _DROP),
    "one small bucket dropped": (
        "data",
        "llama-tied",
        {device: {**_DROP[device], **_SMALL} for device in _BOTH},
    ),
    "an all-reduce of a tied weight dropped": ("pipeline", "llama-tied", _DROP),
    "an all-reduce over shards dropped": ("tensor", "llama-untied", _DROP),
    "one replica misweighed": ("data", "llama-tied", {"d1": {"fault": "misweigh", "factor": 1.01}}),
}
HARMLESS = {"nothing broken", "many small buckets"}


def _run_controls() -> None:
    """Train with each fault in this process's own world; print how far each is from the yardstick."""
    world = FaultyWorkers(2)
    differences = {}
    for name, (plan, model, faults) in CONTROLS.items():
        orders = {
            rank: Message({"command": "inject", "fault": "none", **faults.get(device, {})})
            for device, rank in world.ranks.items()
        }
        command(world.wire, orders, "inject", world.ranks)
        case = Case(model)
        differences[name] = train([PLANS[plan]], case, world).difference(reference(case))
    world.close()
    print(json.dumps(differences))


@pytest.fixture(scope="module")
def control_differences() -> dict[str, float]:
    finished = forked.run(_run_controls, timeout_s=120)
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_sees_a_fault(control: str, control_differences: dict[str, float]) -> None:
    if control in HARMLESS:
        assert control_differences[control] < TOLERANCE["float64"]
    else:
        assert control_differences[control] > 1e5 * TOLERANCE["float64"]


def test_the_examples_covered_everything_a_plan_can_express(request: pytest.FixtureRequest) -> None:
    examples = sum("trains_as_one_process_does" in item.name for item in request.session.items)
    if examples < len(TREES) + len(FLOAT32_TREES):
        pytest.skip(f"only {examples} of the examples were selected")
    assert len(_plans_run["float64"]) >= 60
    assert len(_plans_run["float32"]) >= 12
    assert _covered["float64"] == FEATURES
