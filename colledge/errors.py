"""What a user can cause, as one tree of errors: each says what was seen, what was wanted and how to fix it."""

from __future__ import annotations

import re

_OF_CODE = re.compile(  # what only those understand who know the code
    r"object|operand|argument|unhashable|NoneType|ind(ex|ices)|iterable|subscript|instance of|unpack|not supported|"
    r"Tensor|recursion|interpreted"
)


class ColledgeError(Exception):
    """A problem that a user can mend.

    Args:
        message: What is wrong, with the value seen and the value wanted.
        fix: The knob to turn, in one sentence.
        exit_code: Of the command line; None means the class's own.

    The command line prints ``message`` and ``fix`` on one line and exits with ``exit_code``.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        """Return the message and, where there is one, the fix."""
        return f"{self.message} Fix: {self.fix}" if self.fix else self.message


class ConfigError(ColledgeError):
    """A file or a setting that cannot be used as it stands."""

    exit_code = 2


class PlanError(ConfigError):
    """A plan that breaks one of the rules that loading checks."""


class DataError(ConfigError):
    """Training data that cannot be read; names the file, the line and the key."""


class ModelError(ConfigError):
    """A model that is missing, or whose structure cannot be cut into layers."""


class OutOfMemoryError(ConfigError):
    """A plan that a device cannot hold; names the device, the bytes needed and the bytes there."""

    exit_code = 3


class DeviceError(ColledgeError):
    """A device that died, hung or answered wrongly; names the peer, the action and the step."""

    exit_code = 4


class DeadlineError(DeviceError):
    """A wait that passed its deadline."""


class LaunchError(ColledgeError):
    """Workers that could not be started: a port taken, a host that cannot be reached."""

    exit_code = 5


def said_by(fault: BaseException) -> str:
    """Return one line of what a library made of a malformed file; what speaks of its code alone in our words."""
    line = re.sub(r"\b(Type|Value|Key)Error: |<class '|(?<=\w)'>", "", " ".join(str(fault).split()))[:300]
    if isinstance(fault, KeyError):
        return f"{line.strip(chr(39))!r} is missing there, or not known"
    strange = "unpack" in line or (not isinstance(fault, ValueError | OSError) and _OF_CODE.search(line))
    if not line or strange or isinstance(fault, AttributeError | AssertionError | RecursionError):
        return "a value there is missing, or not of the kind that it must be"
    return line
