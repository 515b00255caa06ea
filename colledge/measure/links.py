"""A link's latency and bandwidth from the seconds that messages of several sizes took. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from colledge.measure.spread import spread_of


@dataclass(frozen=True)
class LinkFit:
    """What a message takes: `latency_s` and its bytes at `bandwidth_bytes_per_s`.

    `spread` is (third quartile - first quartile) / median of the largest messages' seconds.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    spread: float


def fit_link(samples: Sequence[tuple[int, float]]) -> LinkFit:
    """Return the line through the medians of the smallest and of the largest messages.

    Medians, because a message that met another process on its way says nothing about the link. A line that
    would fall (noise larger than the transfer) is replaced by one through zero.

    Args:
        samples: (bytes, one-way seconds) of single messages, of at least one size.
    """
    assert samples, "a link is fitted to at least one message"
    by_size: dict[int, list[float]] = {}
    for num_bytes, seconds in samples:
        by_size.setdefault(num_bytes, []).append(seconds)
    small, large = min(by_size), max(by_size)
    small_s, large_s = median(by_size[small]), median(by_size[large])
    spread = spread_of(by_size[large])
    if large == small or large_s <= small_s:
        return LinkFit(0.0, large / max(large_s, 1e-9), spread)
    bandwidth = (large - small) / (large_s - small_s)
    return LinkFit(max(small_s - small / bandwidth, 0.0), bandwidth, spread)
