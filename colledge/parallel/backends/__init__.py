"""Who trains a stage's parameters: colledge's own engine, or DeepSpeed or FairScale, which know data parallelism alone.

    step     forward, backward of each micro-batch; `arm` before the last backward; `sync`; `update`
    state    values and optimizer state by parameter, whole

The loss of a micro-batch is divided by the targets of the whole batch, so gradients are sums over replicas. These
libraries take means over them: their backends multiply the loss by the number of replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from colledge.errors import ConfigError, PlanError
from colledge.parallel.gradients import Synchronized
from colledge.parallel.stage import Passes
from colledge.plan import Plan
from colledge.settings import BackendName


class StatePart(NamedTuple):
    """Optimizer state of the entries from `begin` on of a flattened parameter, by name."""

    begin: int
    tensors: Mapping[str, Tensor]


class Backend(Passes, Synchronized, Protocol):
    """Trains the parameters of one rank."""

    def start(self) -> None:
        """Take the parameters over: they have their values. Called before every step, acts on the first."""

    def update(self, learning_rate: float, action: object) -> float | None:
        """Clip, update and forget the gradients; return their norm before, where they are clipped."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which these parameters are whole; all replicas enter it."""

    def read_state(self, parameter: nn.Parameter) -> StatePart:
        """Return what this rank holds of a parameter's optimizer state; the replicas together hold all of it."""

    def write_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Take a parameter's optimizer state."""

    def close(self) -> None:
        """Leave the other replicas."""


def check_installed(name: BackendName) -> None:
    """Check that a backend's package is there.

    Raises:
        ConfigError: It is not; the fix has the line that installs it.
    """
    if name != "native" and find_spec(name) is None:
        raise ConfigError(
            f"backend {name} needs the package {name!r}, which is not installed here.",
            fix=f"pip install 'colledge[{name}]' on every device, or set backend: native.",
        )


def check_backend_plan(name: BackendName, plan: Plan) -> None:
    """Check that a backend can run a plan.

    Raises:
        PlanError: It cannot; the message says why.
    """
    if plan.zero is not None and (plan.backend or "native") != name:
        raise PlanError(
            f"the plan divides optimizer state for backend {plan.backend or 'native'}, the run has backend {name}.",
            fix="plan again, or take zero and backend out of the plan.",
        )
    if name == "native":
        if plan.zero not in (None, 1):
            raise PlanError(
                f"the plan has zero: {plan.zero}; backend native divides optimizer state alone (zero: 1).",
                fix="set zero: 1 in the plan, or backend: deepspeed in the run.",
            )
        return
    why = plan.beyond_data_parallelism()
    if why is not None:
        raise PlanError(
            f"backend {name} is data parallelism of the whole model, one micro-batch after another; {why}.",
            fix="give a plan of one stage without shards by --plan, or set backend: native.",
        )
