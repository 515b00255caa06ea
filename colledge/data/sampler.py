"""Which rows a step trains on: decided by (seed, step) alone, never by the plan or the number of devices.

Every epoch is a permutation of all rows; a step takes the next `batch_size` of the endless row of epochs, so
no row is lost at an epoch's end.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_SPREAD = 0x9E3779B97F4A7C15  # keeps (seed 0, epoch 1) apart from (seed 1, epoch 0)


def rows_for_step(num_rows: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the rows of a step.

    Args:
        num_rows: Rows in the data.
        batch_size: Rows in a step; may be more than `num_rows`.
        seed: Of the run.
        step: Steps done before this one; 0 for the first.

    Returns:
        `batch_size` row indices, int64.
    """
    position = step * batch_size
    end = position + batch_size
    parts = []
    while position < end:
        epoch, offset = divmod(position, num_rows)
        parts.append(_permutation(num_rows, seed, epoch)[offset : offset + end - position])
        position += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=2)  # epochs: a batch may reach into the next one
def _permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * _SPREAD + epoch) % 2**63)
    return torch.randperm(num_rows, generator=generator)
