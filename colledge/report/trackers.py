"""A run's figures for a tracker, beside metrics.jsonl; its package is loaded when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from colledge.errors import ConfigError
from colledge.report.metrics import StepMetrics

Tracker = Literal["none", "tensorboard"]

_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "tokens": "train/tokens",
    "step_s": "train/step_s",
    "energy_joules": "train/energy_joules",
    "validation_loss": "validation/loss",
}
_FLUSH_EVERY_S = 10


class TensorBoard:
    """Writes steps as TensorBoard events.

    Args:
        folder: Of the event files; those of the run that is gone on from stay.
        first_step: Events of this step and later, which an earlier process wrote, no longer count.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        check_tracker("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=_FLUSH_EVERY_S)

    def write(self, line: StepMetrics, *names: str) -> None:
        """Write a step's figures: those named, or all but what validation adds."""
        for name in names or [name for name in _TAGS if not name.startswith("validation")]:
            value = getattr(line, name)
            if value is not None:
                self._writer.add_scalar(_TAGS[name], value, line.step)

    def close(self) -> None:
        """Write what is still to be written."""
        self._writer.close()


def check_tracker(tracker: Tracker) -> None:
    """Check that a tracker's package is installed.

    Raises:
        ConfigError: It is not.
    """
    if tracker == "none":
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            "report_to is tensorboard, whose package is not installed.",
            fix="pip install 'colledge[tensorboard]', or set report_to: none.",
        ) from None
