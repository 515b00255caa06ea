"""Data about devices, links and models: what was measured, declared or catalogued. No torch."""

from colledge.profiles.device import DeviceId, DeviceProfile, PowerMode
from colledge.profiles.link import LinkProfile, SegmentProfile
from colledge.profiles.model import LayerProfile, ModelProfile, TensorProfile, Timing
from colledge.profiles.pool import PoolProfile, Route

__all__ = [
    "DeviceId",
    "DeviceProfile",
    "LayerProfile",
    "LinkProfile",
    "ModelProfile",
    "PoolProfile",
    "PowerMode",
    "Route",
    "SegmentProfile",
    "TensorProfile",
    "Timing",
]
