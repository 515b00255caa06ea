"""DeepSpeed's configuration: checked against run.yaml, completed."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from colledge.errors import ConfigError
from colledge.plan import Plan
from colledge.settings import OptimizerSettings

_ELSEWHERE = {
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
}  # sections of DeepSpeed, and where run.yaml says the same
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


def check_config(
    given: Mapping[str, JsonValue], optimizer: OptimizerSettings, global_batch_size: int
) -> None:
    """Check a configuration against run.yaml.

    Raises:
        ConfigError: They contradict each other.
    """
    for section, key in _ELSEWHERE.items():
        value = given.get(section)
        if value is not None and not (isinstance(value, dict) and value.get("enabled") is False):
            raise ConfigError(
                f"deepspeed: the configuration has {section!r}, which run.yaml says by {key}.",
                fix=f"take {section!r} out of it.",
            )
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
        if part and not (isinstance(part, dict) and part.get("device") == "none"):
            raise ConfigError(
                f"deepspeed: zero_optimization.{key} is set, and devices of this backend train on their CPUs.",
                fix="take it out.",
            )


def _check_value(given: Mapping[str, JsonValue], key: str, wanted: float, of: str) -> None:
    seen = given.get(key, "auto")
    if seen not in ("auto", wanted):
        raise ConfigError(
            f"deepspeed: {key} is {seen!r}, wanted {wanted:g} {of}.", fix="leave it out, or make them agree."
        )
