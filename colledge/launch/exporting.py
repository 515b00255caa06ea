"""`colledge export`: what a run trained as a folder that transformers or PEFT load, from its end or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from colledge.errors import ConfigError
from colledge.launch.job import Job, OutputFolder
from colledge.launch.saved_model import write_adapter, write_model
from colledge.models import HuggingFaceCausalLM, SafetensorsDirectory
from colledge.models.lora import merged, plain_of_peft
from colledge.parallel.checkpoint import find_whole_checkpoint
from colledge.records import read_json


@dataclass(frozen=True)
class Trained:
    """What a run trained: its job, the values by parameter name, and where they were found."""

    job: Job
    values: Mapping[str, Tensor]
    found: Path

    def weights(self) -> Mapping[str, Tensor]:
        """Return all weights: what was trained, and what was not from the model's folder."""
        return _Over(self.values, SafetensorsDirectory(self.job.model))


class _Over(Mapping[str, Tensor]):
    """Two mappings, of which the first counts where both have a name."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, name: str) -> Tensor:
        return self._first[name] if name in self._first else self._second[name]

    def __iter__(self) -> Iterator[str]:
        return iter({*self._first, *self._second})

    def __len__(self) -> int:
        return len({*self._first, *self._second})


def find_trained(output: Path) -> Trained:
    """Return what the run of an output folder trained: at its end, or else up to its last whole checkpoint.

    Raises:
        ConfigError: The folder is of no run that trained.
        ModelError: Files of it are damaged.
    """
    folder = OutputFolder(output)
    if not folder.job.is_file():
        raise ConfigError(f"{output}: holds no job.json.", fix="give the output folder of a run.")
    job = read_json(Job, folder.job)
    if job.run.adapters is None and folder.model.is_dir():
        return Trained(job, SafetensorsDirectory(folder.model), folder.model)
    if job.run.adapters is not None and folder.adapter.is_dir():
        tensors = SafetensorsDirectory(folder.adapter, "adapter_model")
        return Trained(job, {plain_of_peft(name): tensors[name] for name in tensors}, folder.adapter)
    checkpoint, _ = find_whole_checkpoint(output)
    if checkpoint is None:
        raise ConfigError(f"{output}: nothing was trained there.", fix="run `colledge train` first.")
    return Trained(job, _checkpoint_values(checkpoint), checkpoint)


def _checkpoint_values(checkpoint: Path) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as fault:
            raise ConfigError(f"{path}: cannot be read ({fault}).", fix="delete this checkpoint.") from None
        values |= {name: tensor for name, tensor in tensors.items() if "@" not in name}
    return values


def export(output: Path, target: Path, merge: bool) -> Path:
    """Write what a run trained to a folder; return where it was found.

    Args:
        output: The run's output folder.
        target: The folder to write, which must not be there.
        merge: Whether adapters are added to the weights, so that the folder is a whole model.

    Raises:
        ConfigError: There is nothing to export, nothing to merge, or the target is there.
        ModelError: The model that the adapters belong to is gone or damaged.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already.", fix="give another folder with -o, or delete it.")
    trained = find_trained(output)
    job, adapters = trained.job, trained.job.run.adapters
    if adapters is None and merge:
        raise ConfigError(
            f"{output}: was trained whole, there is no adapter to merge.", fix="leave --merge out."
        )
    if adapters is not None and not merge:
        write_adapter([trained.values], adapters, job.run.model, job.model, target)
        return trained.found
    write_model(_whole_layers(trained), job.model, target)
    return trained.found


def _whole_layers(trained: Trained) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of one layer of the whole model after another, adapters merged; a tied weight comes once."""
    job, values, weights = trained.job, trained.values, trained.weights()
    model = HuggingFaceCausalLM.from_directory(job.model, probe=False)
    for index in range(len(model.layer_names)):
        layer = {}
        for name, shape in model.layer_parameters(index).items():
            if name in model.tied:
                continue
            layer[name] = weights[name]
            if job.run.adapters is not None:
                layer[name] = merged(name, layer[name], values, job.run.adapters, name in model.transposed)
            assert tuple(layer[name].shape) == shape
        yield layer
