"""What a run reads, checked before any device starts: the model's folder, its tokenizer and the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from colledge.data import (
    Indices,
    Rows,
    Say,
    Stream,
    end_of,
    find_files,
    load_tokenizer,
    rows_of,
    split_numbers,
    stored_tokens,
)
from colledge.errors import ConfigError, DataError, ModelError, one_line
from colledge.launch.job import OutputFolder
from colledge.launch.run_config import RunConfig
from colledge.models import HuggingFaceCausalLM
from colledge.parallel.setup import decays

_WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_model(name: str) -> Path:
    """Return the folder of a model: a local one, or a hub id's (from the cache, or fetched).

    Raises:
        ModelError: There is neither such a folder nor such a model within reach.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith((".", "/", "~")):
        raise ModelError(
            f"{path}: no such model directory.", fix="set model to a folder that save_pretrained wrote."
        )
    local = f"give a local path such as ./{path.name}"
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED_FILES)))
    except GatedRepoError:
        why = "it is gated, and not open to you"
        fix = f"ask for access at https://huggingface.co/{name} and set HF_TOKEN (or `hf auth login`), or {local}."
    except RepositoryNotFoundError:
        why, fix = (
            "the hub has no model of that name, or it is private",
            f"mend the name, set HF_TOKEN, or {local}.",
        )
    except HFValidationError:
        why, fix = "it is no name of the hub either", f"{local}, or a name such as org/my-model."
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as fault:
        why, fix = one_line(fault), f"{local}, or look at the network and the disk."
        if HF_HUB_OFFLINE and isinstance(fault, LocalEntryNotFoundError):
            why, fix = "HF_HUB_OFFLINE is set and the cache has it not", f"{local}, or unset HF_HUB_OFFLINE."
    raise ModelError(f"model {name!r} is no local directory and cannot be fetched: {why}.", fix=fix)


def open_model(run: RunConfig, folder: Path, *, probe: bool = True) -> HuggingFaceCausalLM:
    """Return a run's model: the structure in its folder, trained as the run says.

    Args:
        run: The run.
        folder: The model's.
        probe: Whether a small copy is tried in parts; the command that starts a run does that, its processes need not.

    Raises:
        ModelError: It cannot be cut into layers, or the adapters do not fit it.
    """
    model = HuggingFaceCausalLM.from_directory(
        folder, run.adapters, run.mixed_precision, run.frozen_precision, probe=probe
    )
    shrunk = sorted(name for name in model.unreached if model.trains(name) and decays(name))
    if shrunk and run.optimizer.weight_decay > 0:
        raise ModelError(
            f"no loss reaches {shrunk[0]} ({len(shrunk)} such), so optimizer.weight_decay would only shrink it.",
            fix="set optimizer.weight_decay to 0.",
        )
    return model


def check_output(run: RunConfig, model_folder: Path) -> None:
    """Check that a run's output takes the place of nothing that the run reads.

    Raises:
        ConfigError: What is written would replace the model or the data.
    """
    output, model = OutputFolder(run.output.resolve()), model_folder.resolve()
    fix = "set another output in run.yaml."
    if model == output.path:
        raise ConfigError(f"output {run.output} is the model's own folder.", fix=fix)
    replaced = (output.model, output.adapter, output.metrics, output.tensorboard)
    read = [("model", model), *(("data.train", path) for path in run.data.train)]
    read += [("data.validation", path) for path in run.data.validation or ()]
    for name, path in read:
        for written in replaced:
            if written in (path.resolve(), *path.resolve().parents):
                raise ConfigError(
                    f"{name} is {path}, and what is trained goes to {written}, over it.", fix=fix
                )


@dataclass(frozen=True)
class RunData:
    """The rows that a run trains on, and those it is validated with; in words, what readers of the data should hear."""

    train: Rows
    validation: Rows | None = None
    sentences: tuple[str, ...] = ()

    @property
    def num_rows(self) -> tuple[int, int]:
        """The rows to train on, and to validate with."""
        return self.train.num_rows, self.validation.num_rows if self.validation is not None else 0

    def notes(self) -> tuple[str, ...]:
        """Return in words what of the examples is not in the rows."""
        notes = list(self.sentences)
        for name, rows in (("training", self.train), ("validation", self.validation)):
            if rows is not None and rows.num_cut:
                notes.append(
                    f"{rows.num_cut} {name} example(s) are longer than {rows.sequence_length} tokens and were cut."
                )
            if rows is not None and rows.num_dropped:
                notes.append(f"{rows.num_dropped} {name} row(s) hold nothing to learn and were left out.")
        return tuple(notes)


def load_data(run: RunConfig, model_folder: Path, say: Say | None = None) -> RunData:
    """Return a run's data as rows of tokens, which are made once and lie on the disk.

    Args:
        run: The run.
        model_folder: Of its model.
        say: Told now and then how far making them is.

    Raises:
        DataError: The data is malformed; the message names the file, the line and the key.
        ModelError: The model's folder has no usable tokenizer.
    """
    data, tokenizer = run.data, load_tokenizer(model_folder)
    end = end_of(tokenizer)

    def stream_of(sources: tuple[Path, ...]) -> tuple[Stream, tuple[str, ...]]:
        found = find_files(sources)
        stream, sentences = stored_tokens(found.files, model_folder, tokenizer, data.loss_on, say)
        return stream, (*found.left_out, *sentences)

    def rows(stream: Stream, sources: tuple[Path, ...], chosen: Indices | None = None) -> Rows:
        try:
            return rows_of(stream, data.sequence_length, end, packing=data.packing, chosen=chosen)
        except DataError as fault:
            raise DataError(f"{_named(sources)}: {fault.message}", fix=fault.fix) from None

    stream, sentences = stream_of(data.train)
    if data.validation_split is not None:
        try:
            train, held = split_numbers(len(stream.ends), data.validation_split, run.seed)
        except DataError as fault:
            raise DataError(f"{_named(data.train)}: {fault.message}", fix=fault.fix) from None
        return RunData(rows(stream, data.train, train), rows(stream, data.train, held), sentences)
    if data.validation is None:
        return RunData(rows(stream, data.train), None, sentences)
    validation, more = stream_of(data.validation)
    return RunData(rows(stream, data.train), rows(validation, data.validation), (*sentences, *more))


def _named(sources: tuple[Path, ...]) -> str:
    return ", ".join(map(str, sources))
