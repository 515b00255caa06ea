"""DeepSpeed's configuration: checked against run.yaml, completed."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from colledge.errors import ConfigError
from colledge.plan import Plan
from colledge.settings import OptimizerSettings

_AUTO = "auto"  # in DeepSpeed's configurations: whatever the run says
_NARROW = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")  # sections that run.yaml says by precision
_ELSEWHERE = ("optimizer", "scheduler", *_NARROW)
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
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
    given = without_auto(given)
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
    return {key: value for key, value in given.items() if key not in _ELSEWHERE} | own


def without_auto(given: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return values without the keys that are "auto": DeepSpeed has defaults for them, and does not know the word."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in given.items()
        if value != _AUTO
    }


def check_config(
    given: Mapping[str, JsonValue], optimizer: OptimizerSettings, global_batch_size: int
) -> None:
    """Check a configuration against run.yaml.

    Raises:
        ConfigError: They contradict each other.
    """
    given = without_auto(given)
    for section in _NARROW:
        value = given.get(section)
        if isinstance(value, dict) and not value.get("enabled"):
            continue
        if value is not None:
            raise _said_elsewhere(section, "precision")
    _check_optimizer(given, optimizer)
    _check_scheduler(given, optimizer)
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


def _check_value(given: Mapping[str, JsonValue], key: str, wanted: float, of: str) -> None:
    seen = given.get(key, wanted)
    if seen != wanted:
        raise ConfigError(
            f"deepspeed: {key} is {seen!r}, wanted {wanted:g} {of}.", fix="leave it out, or make them agree."
        )


def _said_elsewhere(section: str, key: str) -> ConfigError:
    return ConfigError(
        f"deepspeed: the configuration has {section!r}, which run.yaml says by {key}.",
        fix=f"take {section!r} out of it.",
    )


def _check_optimizer(given: Mapping[str, JsonValue], optimizer: OptimizerSettings) -> None:
    section = given.get("optimizer")
    if section is None:
        return
    params = section.get("params", {}) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(params, dict):
        raise _said_elsewhere("optimizer", "optimizer")
    wanted = {
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "momentum": optimizer.momentum,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    kind = section.get("type", optimizer.name)
    if str(kind).lower() != optimizer.name:
        raise _contradiction("optimizer.type", kind, f"{optimizer.name} of optimizer.name")
    for key, value in params.items():
        if key not in wanted:
            raise _said_elsewhere(f"optimizer.params.{key}", "optimizer")
        if value != wanted[key]:
            raise _contradiction(f"optimizer.params.{key}", value, f"{wanted[key]} of run.yaml's optimizer")


def _check_scheduler(given: Mapping[str, JsonValue], optimizer: OptimizerSettings) -> None:
    section = given.get("scheduler")
    if section is None:
        return
    params = section.get("params", {}) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(params, dict):
        raise _said_elsewhere("scheduler", "optimizer.schedule")
    if params:
        raise _said_elsewhere("scheduler", "optimizer.schedule and optimizer.warmup_steps")
    if "type" in section and _SCHEDULES.get(str(section["type"])) != optimizer.schedule:
        raise _contradiction(
            "scheduler.type", section["type"], f"the one of optimizer.schedule: {optimizer.schedule}"
        )


def _contradiction(key: str, seen: JsonValue, wanted: str) -> ConfigError:
    return ConfigError(
        f"deepspeed: {key} is {seen!r}, wanted {wanted}.", fix="leave it out, or make them agree."
    )
