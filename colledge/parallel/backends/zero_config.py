"""DeepSpeed's configuration: checked against run.yaml, completed."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from colledge.errors import ConfigError
from colledge.plan import Plan
from colledge.settings import OptimizerSettings

_PRECISIONS = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")  # sections that do nothing unless enabled
_TYPES = {"adamw": "AdamW", "sgd": "SGD"}  # DeepSpeed's types, by what run.yaml calls them
_SCHEDULES = {"constant": "WarmupLR", "linear": "WarmupDecayLR", "cosine": "WarmupCosineLR"}
_NOT_DEEPSPEEDS = ("optimizer", "scheduler", *_PRECISIONS)  # run.yaml's business: checked, and not handed on
_MANY_STEPS = 1 << 40


def complete_config(
    given: Mapping[str, JsonValue], optimizer: OptimizerSettings, plan: Plan
) -> dict[str, JsonValue]:
    """Return a configuration in which everything stands that decides losses.

    DeepSpeed's own default would clip gradients at 1.0. Batch sizes are those of the plan, which replicas need not
    share equally; DeepSpeed only counts with them, so it is told one row a micro-batch.

    Raises:
        ConfigError: It contradicts the run or the plan; "auto" contradicts nothing.
    """
    replicas = plan.stages[0].replicas
    given = _without_auto(given)
    check_config(given, optimizer, plan.global_batch_size)
    _check_value(given, "gradient_accumulation_steps", plan.num_microbatches, "of the plan")
    for samples in {replica.samples for replica in replicas}:
        _check_value(given, "train_micro_batch_size_per_gpu", samples, "of a replica of the plan")
    own: dict[str, JsonValue] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": plan.num_microbatches,
        "train_batch_size": plan.num_microbatches * len(replicas),
        "gradient_clipping": optimizer.gradient_clipping or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _MANY_STEPS,
    }
    return {key: value for key, value in given.items() if key not in _NOT_DEEPSPEEDS} | own


def check_config(
    given: Mapping[str, JsonValue],
    optimizer: OptimizerSettings,
    global_batch_size: int,
    steps: int | None = None,
) -> None:
    """Check a configuration against run.yaml; `steps` are the run's, where they are known.

    Raises:
        ConfigError: They contradict each other; "auto" contradicts nothing, at any depth.
    """
    given = _without_auto(given)
    for section in _PRECISIONS:
        value = given.get(section)
        if value and (not isinstance(value, dict) or value.get("enabled")):
            raise ConfigError(
                f"deepspeed: the configuration enables {section!r}, which run.yaml says by precision.",
                fix=f"take {section!r} out of it.",
            )
    _check_optimizer(given, optimizer)
    _check_scheduler(given, optimizer, steps)
    _check_value(given, "train_batch_size", global_batch_size, "of batch.global_size")
    _check_value(
        given, "gradient_clipping", optimizer.gradient_clipping or 0.0, "of optimizer.gradient_clipping"
    )
    zero = given.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"deepspeed: zero_optimization.stage is {stage!r}, wanted 1, 2 or 3.", fix="set one of them."
        )
    assert isinstance(zero, dict)
    for key in ("offload_optimizer", "offload_param", "cpu_offload"):
        part = zero.get(key)
        if part and not (isinstance(part, dict) and part.get("device", "none") == "none"):
            raise ConfigError(
                f"deepspeed: zero_optimization.{key} is set, and devices of this backend train on their CPUs.",
                fix="take it out.",
            )


def _without_auto(given: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a configuration without what it leaves to others: "auto" at any depth."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value != "auto" and not (isinstance(value, list) and "auto" in value)
    }


def _check_optimizer(given: Mapping[str, JsonValue], optimizer: OptimizerSettings) -> None:
    known: dict[str, JsonValue] = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "adamw":
        known |= {"betas": list(optimizer.betas), "eps": optimizer.eps}
        known |= {"adam_w_mode": True, "bias_correction": True}
    else:
        known["momentum"] = optimizer.momentum
    _check_part(given, "optimizer", _TYPES[optimizer.name], known)


def _check_scheduler(given: Mapping[str, JsonValue], optimizer: OptimizerSettings, steps: int | None) -> None:
    known: dict[str, JsonValue] = {
        "warmup_min_lr": 0,
        "warmup_min_ratio": 0,
        "cos_min_ratio": 0,
        "warmup_max_lr": optimizer.learning_rate,
        "warmup_num_steps": optimizer.warmup_steps,
        "warmup_type": "linear",
    }
    if steps is not None:
        known["total_num_steps"] = steps
    _check_part(given, "scheduler", _SCHEDULES[optimizer.schedule], known, unchecked=("total_num_steps",))


def _check_part(
    given: Mapping[str, JsonValue],
    section: str,
    type_wanted: str,
    known: Mapping[str, JsonValue],
    unchecked: tuple[str, ...] = (),
) -> None:
    """Check that a section with a `type` and `params` says what run.yaml says, as far as it says something."""
    part = given.get(section)
    if part is None:
        return
    params = part.get("params") or {} if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(params, dict):
        raise ConfigError(
            f"deepspeed: {section} is {part!r:.60}, wanted an object with type and params.",
            fix="take it out.",
        )
    saw = part.get("type")
    if saw is not None and str(saw).lower() != type_wanted.lower():
        raise ConfigError(
            f"deepspeed: {section}.type is {saw!r}, and run.yaml's optimizer is what {type_wanted!r} is.",
            fix=f"take {section!r} out, or change optimizer in run.yaml.",
        )
    for key, value in params.items():
        if key not in known and key not in unchecked:
            raise ConfigError(
                f"deepspeed: {section}.params.{key} is {value!r:.60}, and run.yaml has nothing of the kind.",
                fix="take it out.",
            )
        if key in known and value != known[key]:
            raise ConfigError(
                f"deepspeed: {section}.params.{key} is {value!r:.60}, wanted {known[key]!r} of run.yaml's optimizer.",
                fix='set it to "auto", or make them agree.',
            )


def _check_value(given: Mapping[str, JsonValue], key: str, wanted: float, of: str) -> None:
    seen = given.get(key)
    if seen is not None and seen != wanted:
        raise ConfigError(
            f"deepspeed: {key} is {seen!r:.60}, wanted {wanted:g} {of}.",
            fix="leave it out, or make them agree.",
        )
