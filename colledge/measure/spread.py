"""How far repeated measurements lie apart, and from where on they are called noisy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles

NOISY_SPREAD = 0.2


def spread_of(values: Sequence[float]) -> float:
    """Return (third quartile - first quartile) / median; 0 for fewer than two values."""
    middle = median(values)
    if len(values) < 2 or middle <= 0:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return (third - first) / middle
