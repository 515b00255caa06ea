"""`colledge export`: what a run trained as a folder that transformers or PEFT load, from its end or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from colledge.errors import ConfigError, ModelError
from colledge.launch.inputs import open_model
from colledge.launch.job import Job, OutputFolder
from colledge.launch.saved_model import write_adapter, write_model
from colledge.models import HuggingFaceCausalLM, ModelWeights, SafetensorsDirectory
from colledge.models.lora import is_adapter, merged, plain_of_peft
from colledge.models.weights import SafetensorsFiles
from colledge.parallel.checkpoint import find_whole_checkpoint
from colledge.records import read_json


@dataclass(frozen=True)
class Trained:
    """What a run trained: its job and model, the values by parameter name, and where they were found.

    `source` is the model that was trained, or the whole one that came of it; `passed_over` says what is wrong with
    later checkpoints.
    """

    job: Job
    model: HuggingFaceCausalLM
    source: ModelWeights
    values: Mapping[str, Tensor]
    found: Path
    passed_over: tuple[str, ...] = ()

    def weights(self) -> Mapping[str, Tensor]:
        """Return all weights: what was trained, and what was not from the model's folder."""
        return _Over(self.values, self.source, self.model.tied)


class _Over(Mapping[str, Tensor]):
    """Two mappings, of which the first counts where both have a name; names of one weight are one."""

    def __init__(
        self, first: Mapping[str, Tensor], second: Mapping[str, Tensor], tied: Mapping[str, str]
    ) -> None:
        self._first, self._second, self._tied = first, second, tied

    def __getitem__(self, name: str) -> Tensor:
        name = self._tied.get(name, name)
        return self._first[name] if name in self._first else self._second[name]

    def __contains__(self, name: object) -> bool:
        return name in self._first or name in self._second

    def __iter__(self) -> Iterator[str]:
        return iter({*self._first, *self._second})

    def __len__(self) -> int:
        return len({*self._first, *self._second})


def find_trained(output: Path) -> Trained:
    """Return what the run of an output folder trained: at its end, or else up to its last whole checkpoint.

    Raises:
        ConfigError: The folder is of no run that trained.
        ModelError: Files of it are damaged, or of another model.
    """
    folder = OutputFolder(output)
    if not folder.job.is_file():
        raise ConfigError(f"{output}: holds no job.json.", fix="give the output folder of a run.")
    job = read_json(Job, folder.job)
    adapters = job.run.adapters is not None
    if not adapters and folder.model.is_dir():
        model = open_model(job.run, folder.model, probe=False)
        return Trained(job, model, ModelWeights(folder.model, model.skeleton()), {}, folder.model)
    passed_over: list[str] = []
    values: Mapping[str, Tensor]
    if adapters and folder.adapter.is_dir():
        found, adapter = folder.adapter, SafetensorsDirectory(folder.adapter, "adapter_model")
        values = {plain_of_peft(name): adapter[name] for name in adapter}
        shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    else:
        checkpoint, passed_over = find_whole_checkpoint(output)
        if checkpoint is None:
            raise ConfigError(f"{output}: nothing was trained there.", fix="run `colledge train` first.")
        stored = SafetensorsFiles(sorted(checkpoint.glob("*.safetensors")))
        found = checkpoint
        values = stored = stored.only(name for name in stored if "@" not in name)  # not the optimizer's state
        shapes = {name: header.shape for name, header in stored.headers.items()}
    model = open_model(job.run, job.model, probe=False)
    check_trained(found, shapes, model)
    return Trained(job, model, ModelWeights(job.model, model.skeleton()), values, found, tuple(passed_over))


def check_trained(found: Path, shapes: Mapping[str, tuple[int, ...]], model: HuggingFaceCausalLM) -> None:
    """Check that values are those of all that a model trains, and nothing else.

    Raises:
        ModelError: One is missing, of another shape, or of no use to the model.
    """
    layers = (model.layer_parameters(index) for index in range(len(model.layer_names)))
    wanted = {
        name: shape
        for layer in layers
        for name, shape in layer.items()
        if model.trains(name) and name not in model.tied
    }
    fix = "use the folder as the run wrote it, with the model that it was trained from."
    for name, shape in wanted.items():
        if name not in shapes:
            raise ModelError(f"{found}: holds no {name!r}, which the model trains.", fix=fix)
        if shapes[name] != shape:
            raise ModelError(
                f"{found}: {name!r} has shape {list(shapes[name])}, the model wants {list(shape)}.", fix=fix
            )
    for name in shapes:
        if name not in wanted:
            raise ModelError(f"{found}: holds {name!r}, which the model does not train.", fix=fix)


def export(output: Path, target: Path, merge: bool) -> Trained:
    """Write what a run trained to a folder; return it.

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
    else:
        write_model(_whole_layers(trained), trained.source, target)
    return trained


def _whole_layers(trained: Trained) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of one layer of the whole model after another, adapters merged; a tied weight comes once."""
    job, values, weights, model = trained.job, trained.values, trained.weights(), trained.model
    for index in range(len(model.layer_names)):
        layer = {}
        for name, shape in model.layer_parameters(index).items():
            if name in model.tied or is_adapter(name):
                continue
            layer[name] = weights[name]
            if job.run.adapters is not None:
                layer[name] = merged(name, layer[name], values, job.run.adapters, name in model.transposed)
            assert tuple(layer[name].shape) == shape
        yield layer
