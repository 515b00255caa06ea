"""Checkpoints keyed by layer, so that a run goes on under another plan, pool or number of devices.

    checkpoint-120/
      state.json               step, seed: where to go on
      embedding.safetensors    values by parameter name, optimizer state as `parameter@key`
      block.0.safetensors ...

A checkpoint is written beside its place and renamed into it, so it is there whole or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from colledge.errors import ConfigError
from colledge.parallel.engine import Engine
from colledge.records import Record, read_json, write_atomically

_NAME = re.compile(r"^checkpoint-(\d+)$")


class CheckpointState(Record):
    """state.json: the steps done, and the seed that orders the data."""

    schema_tag: Literal["colledge/checkpoint/1"] = Field(default="colledge/checkpoint/1", alias="schema")
    step: int = Field(ge=0)
    seed: int = Field(ge=0)


def save_checkpoint(engine: Engine, folder: Path, seed: int) -> Path:
    """Write `checkpoint-<step>` into a folder, a layer at a time; return its path.

    Raises:
        OSError: It could not be written; the checkpoints that were there stay.
    """
    final = folder / f"checkpoint-{engine.step}"
    partial = folder / f".checkpoint-{engine.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in engine.model.layer_names:
            tensors = {key: tensor.contiguous() for key, tensor in engine.checkpoint_layer(name).items()}
            save_file(tensors, partial / f"{name}.safetensors")
        write_atomically(partial / "state.json", CheckpointState(step=engine.step, seed=seed).to_json())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of most steps in a folder, or None."""
    found = [(int(m.group(1)), path) for path in folder.glob("checkpoint-*") if (m := _NAME.match(path.name))]
    return max(found)[1] if found else None


def load_checkpoint(engine: Engine, checkpoint: Path, seed: int) -> CheckpointState:
    """Give an engine the values, optimizer state and step of a checkpoint, whatever plan wrote it.

    Raises:
        ConfigError: The checkpoint is damaged or of another model.
    """
    if not (checkpoint / "state.json").is_file():
        raise ConfigError(f"{checkpoint}: holds no state.json.", fix="delete this checkpoint.")
    state = read_json(CheckpointState, checkpoint / "state.json")
    if state.seed != seed:
        raise ConfigError(
            f"{checkpoint} was made with seed {state.seed}, the run has {seed}: its data would come in another order.",
            fix=f"set seed={state.seed}.",
        )
    for index, name in enumerate(engine.model.layer_names):
        path = checkpoint / f"{name}.safetensors"
        try:
            values = load_file(path)
        except (OSError, SafetensorError) as fault:
            raise ConfigError(
                f"{path}: cannot be read ({fault}).",
                fix="delete this checkpoint to go on from the one before.",
            ) from None
        shapes = engine.model.layer_parameters(index)
        wanted = [key for key in shapes if engine.model.trains(key) and key not in engine.model.tied]
        missing = [key for key in wanted if key not in values]
        if missing:
            raise ConfigError(
                f"{path}: holds no {missing[0]!r}, which this model has.",
                fix="resume with the model that the checkpoint was made from.",
            )
        for key, tensor in values.items():
            if shapes.get(key.partition("@")[0]) != tuple(tensor.shape):
                raise ConfigError(
                    f"{path}: {key!r} has shape {list(tensor.shape)}, which this model has not.",
                    fix="resume with the model that the checkpoint was made from.",
                )
        engine.restore_layer(name, values, state.step)
    return state
