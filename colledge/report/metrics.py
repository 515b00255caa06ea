"""metrics.jsonl: what happened, one line a step.

A line ends with its newline; one that does not is the torn end of a crash and is dropped. A step that is validated
is written again: the later line holds. A resumed run first drops the steps that it will repeat.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from colledge.errors import ConfigError
from colledge.plan import DeviceFigures
from colledge.records import Record, parse_json, parse_record, write_atomically


class StepMetrics(Record):
    """One step as measured. `energy_joules` is the whole pool's, `tokens` those that the loss counts.

    `validation_loss` is the mean over the validation data after this step; its time, `validation_s`, is not in
    `step_s`, nor its energy, `validation_joules`, in `energy_joules`.
    """

    step: int = Field(ge=1)
    loss: float
    step_s: float = Field(ge=0)
    tokens: int = Field(ge=0)
    energy_joules: float = Field(ge=0)
    learning_rate: float | None = Field(default=None, ge=0)
    gradient_norm: float | None = Field(default=None, ge=0)
    validation_loss: float | None = None
    validation_s: float | None = Field(default=None, ge=0)
    validation_joules: float | None = Field(default=None, ge=0)
    devices: dict[str, DeviceFigures]


def append_metrics(path: Path, line: StepMetrics) -> None:
    """Append a line; the torn end of a run that crashed is cut off first.

    Raises:
        OSError: The line could not be written.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(_encoded(line))


def keep_metrics(path: Path, step: int) -> list[StepMetrics]:
    """Drop the lines of all steps after one, and through to the disk; return the lines that stay.

    Raises:
        ConfigError: A whole line is damaged.
        OSError: The file could not be written; it stays as it was.
    """
    kept = [line for line in read_metrics(path) if line.step <= step] if path.is_file() else []
    write_atomically(path, b"".join(_encoded(line) for line in kept))
    return kept


def _encoded(line: StepMetrics) -> bytes:
    return (line.model_dump_json(exclude_none=True) + "\n").encode()


def read_metrics(path: Path) -> list[StepMetrics]:
    """Return the lines of a file, in the order of their steps.

    Raises:
        ConfigError: The file is missing or a whole line is damaged; the message names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as fault:
        raise ConfigError(
            f"{path}: cannot be read ({fault.strerror}).",
            fix="train first, or name the output folder of a run.",
        ) from None
    steps: dict[int, StepMetrics] = {}
    for number, raw in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            value = parse_json(raw)
        except (ValueError, RecursionError) as fault:
            raise ConfigError(f"{where}: not JSON ({fault}).", fix="mend or delete the line.") from None
        metrics = parse_record(StepMetrics, value, where)
        steps[metrics.step] = metrics
    return [steps[step] for step in sorted(steps)]
