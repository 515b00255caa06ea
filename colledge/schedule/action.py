"""One thing that a stage does, printed as `F3@1`: the forward of micro-batch 3 on stage 1."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple


class ActionKind(str, Enum):
    """What a stage can do. F and B compute; the rest moves bytes or applies the update."""

    FORWARD = "F"
    BACKWARD = "B"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"
    SYNC = "SYNC"
    STEP = "STEP"


_WHOLE_STEP = frozenset({ActionKind.SYNC, ActionKind.STEP})
_PATTERN = re.compile(r"^([A-Z]+(?:_[FB])?)(\d*)@(\d+)$")


class Action(NamedTuple):
    """An action of stage `stage`, on `microbatch` (None for SYNC and STEP, which belong to the whole step)."""

    kind: ActionKind
    stage: int
    microbatch: int | None = None

    def __str__(self) -> str:
        """Return the action as text, such as `SEND_F0@2` or `SYNC@1`."""
        number = "" if self.microbatch is None else str(self.microbatch)
        return f"{self.kind.value}{number}@{self.stage}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action that `str` printed.

        Raises:
            ValueError: The text is no action.
        """
        match = _PATTERN.match(text)
        if match is not None:
            name, number, stage = match.groups()
            if name in {kind.value for kind in ActionKind}:
                kind = ActionKind(name)
                if (number == "") == (kind in _WHOLE_STEP):
                    return cls(kind, int(stage), int(number) if number else None)
        raise ValueError(f"{text!r} is no action; wanted a form such as F3@1, SEND_F0@2 or SYNC@1")
