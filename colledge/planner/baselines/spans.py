"""Seconds and bytes of every span of layers at once: arrays [start, stop], infinite where stop <= start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from colledge.arrays import Array
from colledge.plan import Shard
from colledge.planner.baselines.candidates import Setting

Indices = npt.NDArray[np.int64]


def between(prefix: Sequence[float] | Array) -> Array:
    """Return sums of layers [start, stop) from sums of layers [0, i)."""
    sums = np.asarray(prefix, dtype=np.float64)
    return np.maximum(sums[None, :] - sums[:, None], 0.0)


def no_layers(num_layers: int) -> npt.NDArray[np.bool_]:
    """Return where stop <= start."""
    edges = np.arange(num_layers + 1)
    return edges[None, :] <= edges[:, None]


def compute_prefixes(setting: Setting, device: str, samples: int) -> tuple[Array, Array]:
    """Return forward and backward seconds of layers [0, i) on a device in its first power mode."""
    if samples == 0:
        return np.zeros(setting.num_layers + 1), np.zeros(setting.num_layers + 1)
    forward, backward = setting.costs.prefix_s(*setting.costs.key(Shard(device=device)), samples, 1.0)
    return np.asarray(forward), np.asarray(backward)


def least_slowest_cut(stage_s: Sequence[Array], hop_s: Sequence[Array]) -> list[int] | None:
    """Return the edges of the cut whose slowest stage or hop takes least, or None where no cut is finite.

    Args:
        stage_s: A stage: seconds of each span [start, stop).
        hop_s: Between stage s and s + 1: seconds of the boundary at layer `edge`.
    """
    num_layers = len(stage_s[0]) - 1
    best = stage_s[0][0]
    choices: list[Indices] = []
    for seconds, hop in zip(stage_s[1:], hop_s, strict=True):
        worst = np.maximum(np.maximum(best, hop)[:, None], seconds)
        choice = np.argmin(worst, axis=0)
        choices.append(choice)
        best = np.take_along_axis(worst, choice[None, :], axis=0)[0]
    if not np.isfinite(best[num_layers]):
        return None
    edges = [num_layers]
    for choice in reversed(choices):
        edges.append(int(choice[edges[-1]]))
    return [0, *reversed(edges)]
