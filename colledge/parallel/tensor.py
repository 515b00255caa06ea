"""f and g of tensor parallelism over a group of shards (Shoeybi et al., arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colledge.parallel.clock import Clock
from colledge.parallel.groups import Group


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

    def sum(self, x: Tensor) -> Tensor:
        """Return x summed over the shards, in place where x is contiguous."""
        x = x.contiguous()
        self._clock.end_compute()
        blocked_s = self._group.all_reduce(x, "a tensor-parallel all-reduce")
        self._clock.waited(blocked_s, None)
        self._clock.begin_compute()
        return x


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ShardGroupOps) -> Tensor:
        ctx.ops = ops
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ops.sum(gradients[0].clone()), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: ShardGroupOps) -> Tensor:
        ctx.mark_dirty(x)
        return ops.sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
