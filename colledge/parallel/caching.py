"""The activation cache in a run: the coordinator has a frozen prefix computed once, devices keep what they will read.

    prefix plan   [embedding ── block.0] ─▶ [block.1 ── block.5] ┬▶ disk of "desk"   the rows that desk will train on
                                                                 └▶ disk of "pi"     those of pi
    training      [block.6 ── head] on desk  +  the same on pi       reads its rows in every epoch

Rows go straight from the device that computes them to the devices that read them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colledge.data.batch import Batch
from colledge.errors import ConfigError
from colledge.models.layered import DTYPES
from colledge.parallel.engine import DeviceStep, Engine, command, device_steps
from colledge.parallel.setup import RouteEstimate
from colledge.parallel.wire import Message, Wire
from colledge.plan import Plan
from colledge.settings import Precision
from colledge.units import format_bytes

_CHECKED_AT_ONCE = 64 * 1024**2  # bytes of rows, well within a wait


def rows_read(plan: Plan, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the rows that each device of a plan's first stage reads from its cache.

    Args:
        plan: The plan that trains.
        batches: The rows of each batch by their numbers in the data, int64, `global_batch_size` of them.

    Returns:
        By device: every row once, sorted, int64.
    """
    seen = torch.stack(list(batches))
    return {
        place.shard.device: torch.unique(seen[:, plan.row_indices(place)])
        for place in plan.places()
        if place.stage_index == 0
    }


@dataclass(frozen=True)
class FillStep:
    """One batch of rows through the prefix: how many of them were wanted, and what it took."""

    num_rows: int
    step_s: float
    devices: dict[str, DeviceStep]


class ActivationCaches:
    """The coordinator's side: the caches of all devices that read activations, for one model and one data set.

    Args:
        wire: This rank's messages.
        ranks: The rank of every device of the run.
        readers: The rows that each device will read, as `rows_read` returns them.
        key: Names what is cached: another model, prefix or data set has another key.
        row_shape: Of the activations of one row.
        precision: Of the activations.
        limit_bytes: The most that one device keeps.
        routes: Measured routes by target and source, to tell communication from waiting.
    """

    def __init__(
        self,
        wire: Wire,
        ranks: Mapping[str, int],
        readers: Mapping[str, Tensor],
        key: str,
        row_shape: tuple[int, ...],
        precision: Precision,
        limit_bytes: int,
        routes: Mapping[str, Mapping[str, RouteEstimate]],
    ) -> None:
        self._limit_bytes, self._routes = limit_bytes, routes
        self._wire, self._ranks, self._readers = wire, ranks, readers
        self._key, self._row_shape, self._precision = key, row_shape, precision
        self._row_bytes = torch.Size(row_shape).numel() * DTYPES[precision].itemsize
        self._num_rows = 1 + max((int(rows.max()) for rows in readers.values() if len(rows)), default=-1)
        self._missing: dict[str, Tensor] = {}  # whether a row is to be computed, bool, [num_rows]

    def open(self) -> Tensor:
        """Open every device's cache; return the rows that must be computed, sorted, int64.

        Raises:
            ConfigError: A device has too little room on its disk, or its cache is in use.
        """
        opened = self._open(list(self._readers), empty=False)
        for device, rows in self._readers.items():
            missing = self._find_missing(device, rows)
            if opened[device]["held_bytes"] + len(missing) * self._row_bytes > self._limit_bytes:
                opened |= self._open([device], empty=True)  # it is full of rows that other plans wanted
                missing = rows
            needed, free = len(missing) * self._row_bytes, opened[device]["free_bytes"]
            if needed > free:
                raise ConfigError(
                    f"the activation cache of device {device!r} needs {format_bytes(needed)} more of its disk, which "
                    f"has {format_bytes(free)} left.",
                    fix="make room there, or take activation_cache out of run.yaml.",
                )
            self._missing[device] = torch.zeros(self._num_rows, dtype=torch.bool)
            self._missing[device][missing] = True
        union = torch.stack(list(self._missing.values())).any(0)
        return torch.nonzero(union).flatten()

    def _open(self, devices: Sequence[str], empty: bool) -> dict[str, dict[str, int]]:
        """Open the caches of devices, emptied or as they are; return the bytes that they hold and have left."""
        fields = {
            "command": "open_cache",
            "key": self._key,
            "row_shape": self._row_shape,
            "precision": self._precision,
            "timeout_s": self._wire.timeout_s,
            "empty": empty,
        }
        messages = {device: Message(fields | {"device": device}) for device in devices}
        answers = self._command(messages, "opening the activation cache")
        return {device: answer.fields for device, answer in answers.items()}

    def _find_missing(self, device: str, rows: Tensor) -> Tensor:
        found = []
        for part in torch.split(rows, max(1, _CHECKED_AT_ONCE // self._row_bytes)):
            message = Message({"command": "find_missing_rows"}, {"rows": part})
            found.append(self._command({device: message}, "checking the activation cache")[device])
        return torch.cat([answer.tensors["rows"] for answer in found])

    def fill(self, prefix: Engine, rows: Tensor, batch_of: Callable[[Tensor], Batch]) -> Iterator[FillStep]:
        """Compute rows and keep each where it is read; yields after every batch.

        Args:
            prefix: The engine of the layers before the first cached boundary.
            rows: Numbers in the data, int64.
            batch_of: Returns rows as a batch.
        """
        size = prefix.plan.global_batch_size
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            began_s = time.perf_counter()
            batch = batch_of(torch.cat([part, part[-1:].expand(size - len(part))]))
            answers = self._command(self._messages(prefix, part, batch), "filling the activation cache")
            yield FillStep(len(part), time.perf_counter() - began_s, device_steps(answers))

    def _messages(self, prefix: Engine, rows: Tensor, batch: Batch) -> dict[str, Message]:
        """Return what every device does for some rows, the first of a batch: computes, gives away, takes."""
        computing = prefix.prefix_messages(Batch(batch.inputs, {}))
        messages = {}
        for device in {*computing, *self._readers}:
            own = computing.get(device, Message({"command": "fill_cache"}))
            agreed: dict[str, Any] = {
                "boundary": list(self._row_shape),
                "precision": self._precision,
                "rank": self._ranks[device],
                "give": [],
                "take": [],
                "expected_s": {},
            }
            messages[device] = Message(own.fields | agreed, dict(own.tensors))
        plan = prefix.plan
        for place in plan.places():
            if place.stage_index < plan.num_stages - 1 or place.shard_index > 0:
                continue  # the shards of a replica hold the same activations
            source = place.shard.device
            held = torch.tensor(plan.row_indices(place), dtype=torch.int64)
            positions = torch.nonzero(held < len(rows)).flatten()
            computed = rows[held[positions]]
            for reader, missing in self._missing.items():
                wanted = missing[computed]
                if wanted.any():
                    give, take = messages[source], messages[reader]
                    give.fields["give"].append(self._ranks[reader])
                    give.tensors[f"give/{self._ranks[reader]}"] = positions[wanted]
                    take.fields["take"].append(self._ranks[source])
                    route = self._routes.get(reader, {}).get(source)
                    if route is not None:
                        seconds = self._row_bytes * int(wanted.sum()) / route.bandwidth_bytes_per_s
                        take.fields["expected_s"][str(self._ranks[source])] = route.latency_s + seconds
                    take.tensors[f"take/{self._ranks[source]}"] = computed[wanted]
        return messages

    def close(self, remove: bool) -> None:
        """Close every device's cache; delete what is in it, or leave it for a run that goes on.

        Deleted is also what this run's devices keep of an earlier part of it, under another plan.
        """
        messages = {
            device: Message({"command": "close_cache", "key": self._key, "device": device, "remove": remove})
            for device in self._ranks
        }
        self._command(messages, "closing the activation cache")

    def _command(self, messages: Mapping[str, Message], action: str) -> dict[str, Message]:
        return command(self._wire, {self._ranks[d]: m for d, m in messages.items()}, action, self._ranks)
