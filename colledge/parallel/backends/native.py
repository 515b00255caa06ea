"""colledge's own backend: gradients in one flat buffer, summed over replicas; every rank updates what it holds.

Under ZeRO a rank updates only the part of it whose optimizer state it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from colledge.parallel.backends import StatePart
from colledge.parallel.gradients import Gradients
from colledge.parallel.groups import Group
from colledge.parallel.stage import PlainPasses
from colledge.parallel.zero import StatePartition


class NativeBackend(PlainPasses):
    """Runs any plan.

    Args:
        module: The stage's layers.
        gradients: Of what it trains.
        optimizer: Of the same.
        gradient_clipping: The largest norm of the whole model's gradient, or None.
        plan_group: Every rank of the plan, or None for one.
        partition: The part whose optimizer state this rank holds; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        gradient_clipping: float | None,
        plan_group: Group | None,
        partition: StatePartition | None = None,
    ) -> None:
        super().__init__(module)
        self._gradients, self._optimizer = gradients, optimizer
        self._clipping, self._plan_group = gradient_clipping, plan_group
        self._partition = partition

    def start(self) -> None:
        """Do nothing: the parameters are those of the module."""

    def arm(self) -> None:
        """Say that the next backward is the last."""
        self._gradients.arm()

    def sync(self, action: object) -> None:
        """Sum the gradients."""
        self._gradients.sync(action)

    def update(self, learning_rate: float, action: object) -> float | None:
        """Clip, update and forget the gradients; return their norm before, where they are clipped."""
        norm = None
        if self._clipping is not None:
            norm = self._gradients.clip(self._clipping, self._plan_group, action)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if self._partition is not None:
            self._partition.gather(action)
        self._gradients.zero()
        return norm

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return an empty context: the parameters are whole."""
        return nullcontext()

    def read_state(self, parameter: nn.Parameter) -> StatePart:
        """Return what this rank holds of a parameter's optimizer state."""
        if self._partition is None:
            return StatePart(0, dict(self._optimizer.state.get(parameter, {})))
        piece = self._partition.piece(parameter)
        state = {} if piece is None else self._optimizer.state.get(piece, {})
        return StatePart(self._partition.begin(parameter), dict(state))

    def write_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Take a parameter's optimizer state, of which this rank keeps what it holds."""
        if self._partition is None:
            self._optimizer.state[parameter] = dict(state)
        elif (piece := self._partition.piece(parameter)) is not None:
            self._optimizer.state[piece] = self._partition.take(parameter, state)

    def close(self) -> None:
        """Do nothing: groups live as long as the process."""
