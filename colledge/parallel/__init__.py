"""The engine: a plan, run by a coordinator and one worker a device over torch.distributed (gloo)."""

from colledge.parallel.device import DeviceWorker
from colledge.parallel.engine import DeviceStep, Engine, EngineSettings, StepRecord
from colledge.parallel.setup import RouteEstimate
from colledge.parallel.wire import Message, Wire
from colledge.parallel.world import World
from colledge.settings import Emulation, OptimizerSettings

__all__ = [
    "DeviceStep",
    "DeviceWorker",
    "Emulation",
    "Engine",
    "EngineSettings",
    "Message",
    "OptimizerSettings",
    "RouteEstimate",
    "StepRecord",
    "Wire",
    "World",
]
