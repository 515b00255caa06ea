"""What the commands print to, which may be no UTF-8."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Have what standard output and error cannot encode replaced, so that no command dies of its own words."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
