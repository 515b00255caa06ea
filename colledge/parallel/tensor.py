"""f and g of tensor parallelism over a group of shards (Shoeybi et al., arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colledge.parallel.clock import Clock
from colledge.parallel.groups import Group, Reduction


class ShardGroupOps:
    """f (`enter`) and g (`leave`) over a replica's shards; a `ShardOps`.

    Computing pauses while the sum is made, so that an emulated slow shard arrives late and the time counts as
    communication.
    """

    def __init__(self, group: Group, clock: Clock) -> None:
        self._group, self._clock = group, clock

    def enter(self, x: Tensor) -> Tensor:
        """Return x; its gradient is summed over the shards."""
        result: Tensor = _Enter.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def leave(self, x: Tensor) -> Tensor:
        """Return x summed over the shards; its gradient passes unchanged."""
        result: Tensor = _Leave.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def sum_in_place(self, x: Tensor) -> Tensor:
        """Return x summed over the shards, written to x itself; no gradient."""
        return self._reduce(x, "sum")

    def max_in_place(self, x: Tensor) -> Tensor:
        """Return the largest of every element over the shards, written to x itself; no gradient."""
        return self._reduce(x, "max")

    def _reduce(self, x: Tensor, how: Reduction) -> Tensor:
        self._clock.end_compute()
        blocked_s = self._group.all_reduce(x, "a tensor-parallel all-reduce", how)
        self._clock.waited(blocked_s, self._group.expected_s(x.nbytes))
        self._clock.begin_compute()
        return x


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ShardGroupOps) -> Tensor:
        ctx.ops = ops
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # What arrives was made by the linears of this region for this node alone, so it may be written to.
        return ctx.ops.sum_in_place(gradients[0].contiguous()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ShardGroupOps) -> Tensor:
        ctx.mark_dirty(x)
        return ops.sum_in_place(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
