"""A device as the planner sees it: memory, and watts in each power mode."""

from __future__ import annotations

from typing import Literal, NewType

from pydantic import Field, field_validator

from colledge.records import Record

DeviceId = NewType("DeviceId", str)

_LONGEST_NAME = 100

Source = Literal["measured", "declared", "catalog", "modelled"]


class PowerMode(Record):
    """What a device draws in one power mode, in watts; `source` says where the figures come from.

    `achieved_flops_per_s` and `memory_bytes_per_s` are what training reaches in this mode, not the peak; they
    time a device kind for which the model profile has no timings.
    """

    name: str = Field(min_length=1)
    idle_w: float = Field(ge=0)
    compute_w: float = Field(ge=0)
    communicate_w: float = Field(ge=0)
    source: Source
    achieved_flops_per_s: float | None = Field(default=None, gt=0)
    memory_bytes_per_s: float | None = Field(default=None, gt=0)

    def joules(self, step_s: float, compute_s: float, communicate_s: float) -> float:
        """Return the energy of a step: idle all through, more while it computes or communicates."""
        return (
            self.idle_w * step_s
            + (self.compute_w - self.idle_w) * compute_s
            + (self.communicate_w - self.idle_w) * communicate_s
        )


class DeviceProfile(Record):
    """One device. Devices of one `kind` share timings.

    `memory_bytes` is what training may use, of which `runtime_bytes` is taken by the process itself before
    the first weight arrives (measured). The allocator is reckoned to hold `allocator_overhead` bytes more for each
    byte of activations and workspace (an estimate). The first mode is the one a plan means when it names none.
    """

    id: str = Field(min_length=1)
    kind: str = Field(min_length=1)
    memory_bytes: int = Field(gt=0)
    runtime_bytes: int = Field(default=0, ge=0)
    allocator_overhead: float = Field(default=0.0, ge=0)
    modes: tuple[PowerMode, ...] = Field(min_length=1)

    @property
    def room_bytes(self) -> int:
        """What is left of the memory beside the process itself; below 0 if that alone is too much."""
        return self.memory_bytes - self.runtime_bytes

    @field_validator("id", "kind")
    @classmethod
    def _readable(cls, name: str) -> str:
        if not name.isprintable() or name != name.strip() or len(name) > _LONGEST_NAME:
            raise ValueError(
                f"wanted at most {_LONGEST_NAME} printable characters without spaces around them"
            )
        return name

    @field_validator("modes")
    @classmethod
    def _distinct(cls, modes: tuple[PowerMode, ...]) -> tuple[PowerMode, ...]:
        names = [mode.name for mode in modes]
        if len(set(names)) != len(names):
            raise ValueError(f"power mode names must differ, saw {names}")
        return modes

    def mode(self, name: str | None) -> PowerMode:
        """Return the mode of that name, or the first one for None.

        Raises:
            KeyError: There is no such mode.
        """
        for mode in self.modes:
            if name is None or mode.name == name:
                return mode
        raise KeyError(name)

    def has_mode(self, name: str) -> bool:
        """Return whether the device has a mode of that name."""
        return any(mode.name == name for mode in self.modes)
