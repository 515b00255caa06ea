"""Checkpoints keyed by layer, so that a run goes on under another plan, pool or number of devices.

    checkpoint-120/
      state.json               step, seed, validation losses: where to go on; the SHA-256 of every other file
      embedding.safetensors    values by parameter name, optimizer state as `parameter@key`
      block.0.safetensors ...

A checkpoint is written beside its place and renamed into it, so it is there whole or not at all; what became of it
later, its checksums tell.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from colledge.errors import ColledgeError, ConfigError, one_line, said_by
from colledge.models.weights import check_finite
from colledge.parallel.engine import Engine
from colledge.records import Record, read_json, write_atomically

_NAME = re.compile(r"^checkpoint-(\d+)$")
_CHUNK_BYTES = 1 << 20


class CheckpointState(Record):
    """state.json: the steps done, the seed that orders the data, validation losses by step, SHA-256 by file."""

    schema_tag: Literal["colledge/checkpoint/1"] = Field(default="colledge/checkpoint/1", alias="schema")
    step: int = Field(ge=0)
    seed: int = Field(ge=0)
    validation: dict[int, float] = Field(default_factory=dict)
    files: dict[str, str]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def save_checkpoint(engine: Engine, folder: Path, seed: int, validation: Mapping[int, float]) -> Path:
    """Write `checkpoint-<step>` into a folder, a layer at a time, and through to the disk; return its path.

    Args:
        engine: What to save.
        folder: Where.
        seed: Of the run.
        validation: Losses on the validation data so far, by step.

    Raises:
        ColledgeError: It could not be written; the checkpoints that were there stay.
    """
    final = checkpoint_path(folder, engine.step)
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = {}
        for name in engine.model.layer_names:
            tensors = {key: tensor.contiguous() for key, tensor in engine.checkpoint_layer(name).items()}
            path = partial / f"{name}.safetensors"
            save_file(tensors, path)
            files[path.name] = _sync(path)
        state = CheckpointState(step=engine.step, seed=seed, validation=dict(validation), files=files)
        write_atomically(partial / "state.json", state.to_json())
        _sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(folder)
    except (OSError, SafetensorError) as fault:
        raise ColledgeError(
            f"{final} could not be saved ({one_line(fault)}); earlier checkpoints are as they were.",
            fix="make room on that disk, then go on with --resume auto.",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _sync(path: Path) -> str:
    """Push a file through to the disk; return its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, rising."""
    return sorted(int(m.group(1)) for path in folder.glob("checkpoint-*") if (m := _NAME.match(path.name)))


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of most steps in a folder, whole or not, or None."""
    steps = _steps(folder)
    return checkpoint_path(folder, steps[-1]) if steps else None


def find_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the last checkpoint in a folder that is as it was written, and what is wrong with later ones.

    Raises:
        ConfigError: There are checkpoints, and all are damaged.
    """
    faults: list[str] = []
    for step in reversed(_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            read_state(path)
        except ConfigError as fault:
            faults.append(fault.message)
            continue
        return path, faults
    if faults:
        raise ConfigError(
            f"{folder}: no checkpoint is whole; {' '.join(faults)}",
            fix="delete them to start at step 1, or set another output.",
        )
    return None, []


def read_state(checkpoint: Path) -> CheckpointState:
    """Return the state of a checkpoint, all of whose files are as they were written.

    Raises:
        ConfigError: A file is missing or not what it was; the message names it.
    """
    fix = "delete this checkpoint to go on from the one before."
    state = read_json(CheckpointState, checkpoint / "state.json")
    if checkpoint != checkpoint_path(checkpoint.parent, state.step):
        raise ConfigError(f"{checkpoint}/state.json: says step {state.step}.", fix=fix)
    unknown = sorted({path.name for path in checkpoint.glob("*.safetensors")} - state.files.keys())
    if unknown:
        raise ConfigError(f"{checkpoint}/state.json: has no SHA-256 of {unknown[0]}.", fix=fix)
    for name, wanted in state.files.items():
        path = checkpoint / name
        try:
            seen = _sha256(path)
        except OSError as fault:
            raise ConfigError(f"{path}: cannot be read ({fault.strerror}).", fix=fix) from None
        if seen != wanted:
            raise ConfigError(
                f"{path}: its SHA-256 is {seen[:12]}..., when it was written it was {wanted[:12]}...", fix=fix
            )
    return state


def remove_checkpoints(folder: Path, newest: int, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the last `keep` up to step `newest`, and the best one.

    Those of later steps go too: a resumed run passed over them, for they are damaged.
    """
    steps = _steps(folder)
    kept = {*[step for step in steps if step <= newest][-keep:], best}
    for step in steps:
        if step not in kept:
            shutil.rmtree(checkpoint_path(folder, step), ignore_errors=True)


def load_checkpoint(engine: Engine, checkpoint: Path, seed: int) -> CheckpointState:
    """Give an engine the values, optimizer state and step of a checkpoint, whatever plan wrote it.

    Raises:
        ConfigError: The checkpoint is damaged, holds a number that is none, or is of another model or seed.
    """
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
                f"{path}: cannot be read ({said_by(fault)}).",
                fix="resume with the model that the checkpoint was made from.",
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
            check_finite(f"{path}: {key!r}", tensor)
            if shapes.get(key.partition("@")[0]) != tuple(tensor.shape):
                raise ConfigError(
                    f"{path}: {key!r} has shape {list(tensor.shape)}, which this model has not.",
                    fix="resume with the model that the checkpoint was made from.",
                )
        engine.restore_layer(name, values, state.step)
    return state
