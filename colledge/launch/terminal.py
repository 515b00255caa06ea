"""What a process prints, on any terminal."""

from __future__ import annotations

import io
import sys


def replace_unprintable() -> None:
    """Have what the terminal's encoding cannot write replaced: no command dies of its own output."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
