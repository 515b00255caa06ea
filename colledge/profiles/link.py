"""How bytes travel between devices: directed links, and segments that several devices share."""

from __future__ import annotations

from pydantic import Field

from colledge.profiles.device import Source
from colledge.records import Record


class LinkProfile(Record):
    """A directed link; one given one way only serves both ways. `provenance` says where the figures come from."""

    source: str = Field(min_length=1)
    target: str = Field(min_length=1)
    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    provenance: Source = "measured"


class SegmentProfile(Record):
    """A shared medium (one Wi-Fi channel): its members share its bandwidth."""

    name: str = Field(min_length=1)
    devices: tuple[str, ...] = Field(min_length=2)
    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    provenance: Source = "measured"
