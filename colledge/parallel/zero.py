"""ZeRO stage 1: the replicas of a stage share the optimizer state out; each updates its part of the parameters.

ZeRO: Rajbhandari et al., arXiv 1910.02054. The parameters, in the order of the flat gradient buffer, are cut where the
shares of plan.json end, in the middle of a parameter too: whole parameters could not follow unequal shares, since an
embedding alone is often a third of a model. Gradients are summed before, as without ZeRO.

    buffer     [ head     | block.2  | block.1  | embedding ]
    state of   [ d0             | d1        | d2            ]

The buffer then takes the updated values: each replica writes its part and zeros elsewhere, and their sum is whole
everywhere, exactly. gloo has no all-gather of unequal parts; in a ring of them the largest would travel all the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from colledge.parallel.gradients import Gradients
from colledge.parallel.setup import ParameterGroups


@dataclass(frozen=True)
class _Piece:
    """Entries [start, stop) of a flattened parameter, `values` a view of them with its own gradient."""

    values: nn.Parameter
    start: int
    stop: int


class StatePartition:
    """The part of a stage's parameters whose optimizer state this rank holds.

    Args:
        gradients: Of the parameters.
        shares: The part of each replica; they sum to 1.
        own: Which of them is this rank's.
    """

    def __init__(self, gradients: Gradients, shares: Sequence[float], own: int) -> None:
        self._gradients = gradients
        size = gradients.flat.numel()
        edges = [0, *(round(size * edge) for edge in accumulate(shares[:-1])), size]
        self._pieces: dict[nn.Parameter, _Piece] = {}
        for parameter, offset in gradients.offsets.items():
            start = max(edges[own] - offset, 0)
            stop = min(edges[own + 1] - offset, parameter.numel())
            if start < stop:
                values = nn.Parameter(parameter.detach().view(-1)[start:stop])
                values.grad = gradients.flat[offset + start : offset + stop]
                self._pieces[parameter] = _Piece(values, start, stop)

    def own(self, groups: ParameterGroups) -> ParameterGroups:
        """Return groups of parameters for the optimizer of this rank: of each parameter its piece."""
        pieces = self._pieces
        return [
            {**group, "params": [pieces[p].values for p in group["params"] if p in pieces]}
            for group in groups
        ]

    def piece(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """Return the piece of a parameter that this rank updates, flat, or None."""
        found = self._pieces.get(parameter)
        return None if found is None else found.values

    def begin(self, parameter: nn.Parameter) -> int:
        """Return where the piece of a parameter begins in it; 0 where there is none."""
        found = self._pieces.get(parameter)
        return 0 if found is None else found.start

    def take(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's piece of a parameter's optimizer state; what has another shape, such as `step`, whole."""
        found = self._pieces[parameter]
        return {
            key: whole.reshape(-1)[found.start : found.stop].clone()
            if whole.shape == parameter.shape
            else whole
            for key, whole in state.items()
        }

    @torch.no_grad()
    def gather(self, action: object) -> None:
        """Give all replicas the updated values, by way of the gradient buffer; gradients are gone then."""
        flat = self._gradients.flat
        flat.zero_()
        for piece in self._pieces.values():
            assert piece.values.grad is not None
            piece.values.grad.copy_(piece.values)
        self._gradients.all_reduce(action)
        for parameter in self._gradients.offsets:
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
