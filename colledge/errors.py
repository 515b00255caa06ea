"""What a user can cause, as one tree of errors: each says what was seen, what was wanted and how to fix it."""

from __future__ import annotations

import re

_OF_CODE = re.compile(  # what only those understand who know the code
    r"object|operand|argument|unhashable|NoneType|ind(ex|ices)|iterable|subscript|instance of|unpack|not supported|"
    r"Tensor|recursion|interpreted"
)
_NO_MEMORY = re.compile(r"(can't|cannot) allocate memory", re.IGNORECASE)


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


def one_line(fault: BaseException, most: int = 300) -> str:
    """Return what a fault says on one line of so many characters at most."""
    return " ".join(str(fault).split())[:most]


def said_by(fault: BaseException) -> str:
    """Return one line of what a library made of a malformed file; what speaks of its code alone in our words.

    Raises:
        MemoryError: There was too little memory, for which no file is to blame.
    """
    if lack_of_memory(fault) is not None:
        raise MemoryError(one_line(fault)) from None
    line = re.sub(r"\b(Type|Value|Key)Error: |<class '|(?<=\w)'>", "", one_line(fault, most=1000))
    if "trust_remote_code" in line:
        return "it comes with code of its own, which is not run"
    if isinstance(fault, KeyError):
        return f"{line.strip(chr(39))!r} is missing there, or not known"
    strange = "unpack" in line or (not isinstance(fault, ValueError | OSError) and _OF_CODE.search(line))
    if not line or strange or isinstance(fault, AttributeError | AssertionError | RecursionError):
        return "a value there is missing, or not of the kind that it must be"
    return line[:300]


def lack_of_memory(fault: BaseException) -> ColledgeError | None:
    """Return what to tell of a fault that is lack of memory: Python's, the system's or PyTorch's; None of another."""
    line = one_line(fault)
    if not isinstance(fault, MemoryError) and not _NO_MEMORY.search(line):
        return None
    what = line.rpartition("] ")[2].rstrip(".")  # behind PyTorch's own file and line, and the system's number
    return ColledgeError(
        f"out of memory ({what})." if what else "out of memory.",
        fix="free some memory, or look for a size that is too large.",
        exit_code=ConfigError.exit_code,
    )
