"""Profiles without the hardware: a pool from the catalog, and a model from its configuration. Measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from colledge.errors import ConfigError
from colledge.launch.inputs import find_model
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import PoolConfig, RunConfig
from colledge.measure.analytic import model_profile_from_config
from colledge.models import HuggingFaceCausalLM
from colledge.records import Record, parse_record, write_atomically
from colledge.settings import LoraSettings, Precision


class AnalyticRequest(Record):
    """How a model would be trained."""

    sequence_length: int = Field(ge=2)
    precision: Precision
    lora: LoraSettings | None = None

    @classmethod
    def of(
        cls, *, sequence_length: int, precision: str, lora_rank: int | None, lora_targets: str | None
    ) -> AnalyticRequest:
        """Return the request that a command line makes; the targets are separated by commas.

        Raises:
            ConfigError: The precision is not known, or there are targets and no rank.
        """
        if lora_targets is not None and lora_rank is None:
            raise ConfigError("saw --lora-targets and no --lora-rank.", fix="give both, or neither.")
        values: dict[str, Any] = {
            "sequence_length": sequence_length,
            "precision": precision,
        }
        if lora_rank is not None:
            targets = lora_targets.split(",") if lora_targets is not None else None
            values["lora"] = {"rank": lora_rank, "targets": targets}
        return parse_record(cls, values, "the command line")


def write_model_profile(model: str, request: AnalyticRequest, output: Path) -> Path:
    """Write the model-profile.json of a model from its configuration; return its path.

    Raises:
        ModelError: There is no such model, or it cannot be cut into layers or adapted.
    """
    folder = find_model(model)
    profile = model_profile_from_config(
        HuggingFaceCausalLM.from_directory(folder, request.lora),
        name=folder.name,
        sequence_length=request.sequence_length,
        precision=request.precision,
    )
    path = OutputFolder(output).model_profile
    write_atomically(path, profile.to_json())
    return path


def write_profiles(
    run: RunConfig, pool: PoolConfig, model: HuggingFaceCausalLM, model_folder: Path, folder: OutputFolder
) -> None:
    """Write the profiles of a run whose devices are from the catalog."""
    profile = model_profile_from_config(
        model,
        name=model_folder.name,
        sequence_length=run.data.sequence_length,
        precision=run.precision,
    )
    write_atomically(folder.pool_profile, pool.catalog_profile().to_json())
    write_atomically(folder.model_profile, profile.to_json())
