"""Seconds and bytes of every span of layers at once: arrays [start, stop], infinite where stop <= start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from colledge.plan import Shard
from colledge.planner.baselines.candidates import Setting
from colledge.planner.cost import find_ties, shared_bytes

Array = npt.NDArray[np.float64]
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


class SpanMemory:
    """Bytes that a device needs for every span, as `planner.memory` counts them for a whole (unsharded) span."""

    def __init__(self, setting: Setting) -> None:
        layers = setting.model.layers
        factor = 1 + setting.request.optimizer_state_factor
        sizes = [layer.parameter_bytes + factor * layer.trainable_parameter_bytes for layer in layers]
        self.static = between(np.concatenate(([0.0], np.cumsum(sizes))))
        for a, b in find_ties(layers):
            shared, trained = shared_bytes(layers, (a, b))
            self.static[: a + 1, b + 1 :] -= shared + factor * trained  # held once where a span has both ends
        self.saved = between(
            np.concatenate(([0.0], np.cumsum([layer.saved_bytes_per_sample for layer in layers])))
        )
        out = np.array([layer.output_bytes_per_sample for layer in layers], dtype=np.float64)
        self.input = np.concatenate(([0.0], out))[:, None]
        self.input[-1] = 0.0
        self.output = np.concatenate(([0.0], out[:-1], [0.0]))[None, :]

    def per_sample(self, in_flight: int, recompute: bool) -> Array:
        """Return the bytes that every sample of a micro-batch adds."""
        kept = in_flight * self.input + self.saved if recompute else in_flight * self.saved
        # two receives and two gradients sent; two gradients received, and a send a micro-batch in flight
        each: Array = kept + 4 * self.input + (2 + in_flight) * self.output
        return each

    def most_samples(self, setting: Setting, device: str, in_flight: int, recompute: bool) -> Array:
        """Return the samples of a micro-batch that fit on a device, negative where not even the weights do."""
        profile = setting.pool.device(device)
        room = profile.memory_bytes - profile.runtime_bytes - self.static
        each = np.maximum(self.per_sample(in_flight, recompute), 1e-9)
        return np.where(room < 0, -1.0, np.floor(room / each))


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
