"""Who a rank all-reduces with, and the all-reduce itself, with a deadline.

shards     the shards of one replica             activations, inside every block
replicas   one shard index of every replica      gradients
tied       every rank that holds a tied weight   its gradient
plan       every rank of the plan                the gradient norm
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from colledge.errors import DeadlineError, DeviceError
from colledge.parallel.wire import Pace, Wire, slowest
from colledge.parallel.world import World

Reduction = Literal["sum", "max"]


class PendingReduce:
    """An all-reduce under way."""

    def __init__(self, group: Group, work: dist.Work, num_bytes: int, target: Tensor, staged: Tensor) -> None:
        self._group, self._work, self._num_bytes = group, work, num_bytes
        self._target, self._staged = target, staged

    def wait(self, action: object) -> float:
        """Wait until the sum is there; return the seconds that it took.

        Raises:
            DeviceError: A member is gone or does not answer in time.
        """
        wire = self._group.wire
        began_s = time.perf_counter()
        try:
            self._work.wait(timedelta(seconds=wire.timeout_s))
        except (RuntimeError, ValueError):
            members = ", ".join(wire.names[rank] for rank in self._group.ranks)
            if time.perf_counter() - began_s >= 0.99 * wire.timeout_s:
                raise DeadlineError(
                    f"all-reduce among {members} did not finish within {wire.timeout_s:g} s during {action}.",
                    fix="look for a frozen, overloaded or unplugged device among them.",
                ) from None
            raise DeviceError(
                f"lost the connection to one of {members} during {action}.",
                fix="look at the devices' own logs: a worker may have died or run out of memory.",
            ) from None
        if self._staged is not self._target:
            self._target.copy_(self._staged)
        pace = wire.slowest_pace(self._group.ranks)
        if pace is not None:
            time.sleep(pace.all_reduce_s(self._num_bytes, len(self._group.ranks)))
        return time.perf_counter() - began_s


class Group:
    """Some ranks that sum tensors together."""

    def __init__(
        self, ranks: Sequence[int], process_group: dist.ProcessGroupGloo, wire: Wire, route: Pace | None
    ) -> None:
        self.ranks = tuple(ranks)
        self.wire = wire
        self._process_group = process_group
        self._route = route

    def expected_s(self, num_bytes: int) -> float | None:
        """Return what an all-reduce takes on the slowest measured route of the group; None if none was measured."""
        return None if self._route is None else self._route.all_reduce_s(num_bytes, len(self.ranks))

    def begin_all_reduce(self, tensor: Tensor, how: Reduction = "sum") -> PendingReduce:
        """Begin to reduce a contiguous tensor in place over the group; do not touch it before it was waited for."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        staged = tensor.cpu() if tensor.is_cuda else tensor
        work = self._process_group.allreduce(  # type: ignore[attr-defined]
            [staged], options
        )
        return PendingReduce(self, work, tensor.nbytes, tensor, staged)

    def all_reduce(self, tensor: Tensor, action: object, how: Reduction = "sum") -> float:
        """Reduce a contiguous tensor in place over the group; return the seconds that it took."""
        return self.begin_all_reduce(tensor, how).wait(action)


class GroupFactory:
    """Makes groups, each set of ranks once for the life of the process.

    All members of a group must ask for it, and all ranks must ask for theirs in one common order.
    `torch.distributed.new_group` would ask ranks outside a group too, or name it by how many groups a process
    has made before, which differs between ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._made: dict[tuple[int, ...], dist.ProcessGroupGloo] = {}

    def group(self, ranks: Sequence[int], routes: Mapping[int, Pace] | None = None) -> Group | None:
        """Return the group of these ranks, or None where it would have one member.

        Args:
            ranks: The members, this rank among them.
            routes: Measured routes from other ranks to this one.
        """
        key = tuple(sorted(ranks))
        if len(key) == 1:
            return None
        wire = self._world.wire
        if key not in self._made:
            name = "-".join(str(rank) for rank in key)
            self._made[key] = dist.ProcessGroupGloo(
                dist.PrefixStore(  # type: ignore[attr-defined]
                    f"colledge/group/{name}", self._world.store
                ),
                key.index(self._world.rank),
                len(key),
                timedelta(seconds=wire.timeout_s),
            )
        known = [route for rank, route in (routes or {}).items() if rank in key]
        return Group(key, self._made[key], wire, slowest(known))

    def join_default(self, ranks: Sequence[int], meeting: str) -> None:
        """Make these ranks the default process group of torch.distributed, until it is destroyed.

        Args:
            ranks: The members, this rank among them.
            meeting: A name that they share and no earlier group had.
        """
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"colledge/default/{meeting}", self._world.store),  # type: ignore[attr-defined]
            rank=sorted(ranks).index(self._world.rank),
            world_size=len(ranks),
            timeout=timedelta(seconds=self._world.wire.timeout_s),
        )
