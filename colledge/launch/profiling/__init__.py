"""`colledge profile`: asks the devices of a pool to measure themselves and their links, one after another.

coordinator ── measure_device ──> every device             memory, processor
            ── measure_layers ──> one device of each kind   a kind of layer at some sample counts
            ── count_layers ────> one device                bytes and FLOPs
            ── measure_link ────> both ends of each pair    messages there, acknowledgements back

One device measures at a time, since several may stand for one machine. `requests` says what is asked,
`device` does it (`HANDLERS`), `pool` asks (`profile_pool`). Not while a plan is set up.
"""

from colledge.launch.profiling.device import HANDLERS
from colledge.launch.profiling.pool import noise_warnings, profile_pool, sample_counts, shard_parts
from colledge.launch.profiling.requests import DeviceFacts, DeviceRequest

__all__ = [
    "HANDLERS",
    "DeviceFacts",
    "DeviceRequest",
    "noise_warnings",
    "profile_pool",
    "sample_counts",
    "shard_parts",
]
