"""Gradients of one rank: held in one flat buffer, summed over replicas, clipped by the plan's global norm.

The buffer is laid out in the order in which the last backward finishes the layers, and is summed in buckets:
while the last micro-batch's backward still runs, the buckets of finished layers are already on their way.

    last backward   block.3   block.2   block.1   embedding
    buffer        [ block.3 | block.2 | block.1 | embedding ]
    buckets       [ bucket 0          | bucket 1            ]

A weight tied across two stages stands last, in no bucket: its copies' gradients are summed by one all-reduce
over all ranks that hold it. So are the gradients of weights that every shard of a replica holds whole and uses
for its own heads or columns only: each shard computes a part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from colledge.parallel.clock import Clock
from colledge.parallel.groups import Group, PendingReduce

_BUCKET_BYTES = 8 * 1024**2


class Synchronized(Protocol):
    """Gradients that are summed over replicas, from the last backward of a step on."""

    def arm(self) -> None:
        """Say that the next backward is the last."""

    def sync(self, action: object) -> None:
        """Return when the gradients are summed."""


@dataclass(frozen=True)
class TiedWeight:
    """A weight of which another stage holds a copy.

    `contributes`: whether this rank's gradient enters the sum (one shard of a replica does, the others hold the
    same values).
    """

    parameter: nn.Parameter
    group: Group
    contributes: bool


@dataclass(frozen=True)
class PartialSums:
    """Parameters that every shard of a replica holds whole, and of whose gradients each shard has a part."""

    parameters: tuple[nn.Parameter, ...]
    shards: Group

    def sum(self, action: object, clock: Clock) -> None:
        """Sum the gradients over the shards, in one all-reduce."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        blocked_s = self.shards.all_reduce(flat, action)
        clock.waited(blocked_s, self.shards.expected_s(flat.nbytes))
        begin = 0
        for gradient in gradients:
            gradient.copy_(flat[begin : begin + gradient.numel()].view_as(gradient))
            begin += gradient.numel()


class Gradients:
    """The gradients of a stage's parameters on this rank.

    Attributes:
        flat: All of them, one after another.
        offsets: Where each parameter's begins in it.

    Args:
        parameters: By name, in model order.
        replicas: The group of this shard in the stage's other replicas, or None.
        tied: The weights of which other stages hold copies, by name.
        partial: The weights of whose gradients each shard has a part, or None.
        counted: Names of the parameters that this rank counts in the global norm.
        overlap: Whether buckets start during the last backward (not where a slow link is rehearsed).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        replicas: Group | None,
        tied: Mapping[str, TiedWeight],
        partial: PartialSums | None,
        counted: frozenset[str],
        clock: Clock,
        overlap: bool,
    ) -> None:
        self._tied = tied
        self._partial = partial
        self._replicas = replicas
        self._counted = [p for name, p in parameters.items() if name in counted]
        self._clock = clock
        self._overlap = overlap and replicas is not None
        plain = [p for name, p in reversed(list(parameters.items())) if name not in tied]
        self.flat, self.offsets = _flatten([*plain, *(weight.parameter for weight in tied.values())])
        self._buckets, self._bucket_of = _buckets(plain, self.flat)
        if self._overlap:
            for index, parameter in enumerate(plain):
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _FinishedHook(self, self._bucket_of[index])
                )
        self._armed = False
        self._pending: list[PendingReduce] = []
        self._waiting: list[int] = []

    def zero(self) -> None:
        """Forget the gradients of this step."""
        self.flat.zero_()
        self._pending = []
        self._armed = False

    def arm(self) -> None:
        """Say that the next backward is the last: buckets may start as their layers finish."""
        if self._overlap:
            self._armed = True
            self._waiting = [bucket.num_parameters for bucket in self._buckets]

    def parameter_finished(self, bucket_index: int) -> None:
        """Count one finished parameter; start every bucket that is now complete, in order."""
        if not self._armed:
            return
        self._waiting[bucket_index] -= 1
        while len(self._pending) < len(self._buckets) and self._waiting[len(self._pending)] == 0:
            self._start_next_bucket()

    def _start_next_bucket(self) -> None:
        assert self._replicas is not None
        bucket = self._buckets[len(self._pending)]
        self._pending.append(self._replicas.begin_all_reduce(bucket.tensor))

    def sync(self, action: object) -> None:
        """Sum the gradients: over the stage's replicas, over copies of tied weights, partial ones over shards."""
        if self._replicas is not None and self._buckets:
            blocked_s = 0.0
            if self._overlap:
                while len(self._pending) < len(self._buckets):
                    self._start_next_bucket()
                blocked_s += sum(pending.wait(action) for pending in self._pending)
            else:
                blocked_s += sum(self._replicas.all_reduce(b.tensor, action) for b in self._buckets)
            num_bytes = sum(bucket.tensor.nbytes for bucket in self._buckets)
            self._clock.waited(blocked_s, self._replicas.expected_s(num_bytes))
        for weight in self._tied.values():
            gradient = weight.parameter.grad
            assert gradient is not None
            if not weight.contributes:
                gradient.zero_()
            blocked_s = weight.group.all_reduce(gradient, action)
            self._clock.waited(blocked_s, weight.group.expected_s(gradient.nbytes))
        if self._partial is not None:
            self._partial.sum(action, self._clock)

    def all_reduce(self, action: object) -> None:
        """Sum the whole buffer over the replicas, whatever it holds; called while the clock counts computing."""
        assert self._replicas is not None
        self._clock.end_compute()
        parts = torch.split(self.flat, _BUCKET_BYTES // self.flat.element_size())
        pending = [self._replicas.begin_all_reduce(part) for part in parts if len(part)]
        blocked_s = sum(part.wait(action) for part in pending)
        self._clock.waited(blocked_s, self._replicas.expected_s(self.flat.nbytes))
        self._clock.begin_compute()

    def clip(self, max_norm: float, plan_group: Group | None, action: object) -> float:
        """Scale all gradients so that the 2-norm of the whole model's gradient is at most `max_norm`.

        Called while the clock counts computing; it pauses for the sum over the plan.

        Returns:
            The norm before, as `torch.nn.utils.clip_grad_norm_` does.
        """
        gradients = [parameter.grad for parameter in self._counted if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).double().cpu().square()
        if plan_group is not None:
            self._clock.end_compute()
            self._clock.waited(plan_group.all_reduce(square, action), plan_group.expected_s(square.nbytes))
            self._clock.begin_compute()
        norm = float(square.sqrt())
        scale = min(1.0, max_norm / (norm + 1e-6))
        if scale < 1:
            self.flat.mul_(scale)
        return norm


class _FinishedHook:
    """Tells the gradients that a parameter's gradient is complete for this backward."""

    def __init__(self, gradients: Gradients, bucket_index: int) -> None:
        self._gradients, self._bucket_index = gradients, bucket_index

    def __call__(self, parameter: Tensor) -> None:
        self._gradients.parameter_finished(self._bucket_index)


@dataclass(frozen=True)
class _Bucket:
    tensor: Tensor
    num_parameters: int


def _flatten(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, dict[nn.Parameter, int]]:
    """Give every parameter a gradient that is a view into one new flat buffer; also where each begins in it."""
    like = parameters[0] if parameters else torch.empty(0)
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=like.dtype, device=like.device)
    offsets, offset = {}, 0
    for parameter in parameters:
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offsets[parameter] = offset
        offset += parameter.numel()
    return flat, offsets


def _buckets(parameters: Sequence[nn.Parameter], flat: Tensor) -> tuple[list[_Bucket], list[int]]:
    """Cut the buffer at parameter borders into buckets of about `_BUCKET_BYTES`; also each parameter's bucket."""
    buckets: list[_Bucket] = []
    bucket_of: list[int] = []
    begin = end = count = 0
    for parameter in parameters:
        bucket_of.append(len(buckets))
        end += parameter.numel()
        count += 1
        if (end - begin) * parameter.element_size() >= _BUCKET_BYTES:
            buckets.append(_Bucket(flat[begin:end], count))
            begin, count = end, 0
    if count:
        buckets.append(_Bucket(flat[begin:end], count))
    return buckets, bucket_of
