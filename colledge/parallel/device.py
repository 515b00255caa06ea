"""A device's side of the engine: takes its place in a plan when told to, runs steps, gives back its state.

coordinator ── setup, weights ──> device        one message a layer, only what this device holds
            ── train_step ──────>               rows of the batch, shapes of the boundaries
            <───────── figures ──               loss, seconds, memory
            ── read_state ──────>  ... teardown ── shutdown
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from colledge.data.batch import ROW
from colledge.errors import ColledgeError, DeviceError, one_line
from colledge.models import build_model
from colledge.models.layered import DTYPES, LayeredModel
from colledge.models.losses import LOSSES, OutputShard
from colledge.parallel.activation_cache import DeviceCache
from colledge.parallel.backends import Backend, check_installed
from colledge.parallel.backends.native import NativeBackend
from colledge.parallel.clock import Clock
from colledge.parallel.executor import Executor, StageInput
from colledge.parallel.gradients import Gradients, PartialSums, TiedWeight
from colledge.parallel.groups import Group, GroupFactory
from colledge.parallel.setup import DeviceSetup, make_optimizer, parameter_groups, undecayed
from colledge.parallel.stage import MicrobatchRows, StageRunner
from colledge.parallel.tensor import ShardGroupOps
from colledge.parallel.wire import COORDINATOR_RANK, Message, Pace, Wire
from colledge.parallel.world import World
from colledge.parallel.zero import StatePartition
from colledge.plan import Place, Plan
from colledge.schedule import plan_schedule
from colledge.settings import Emulation


class Handler(Protocol):
    """A further command of a device."""

    def __call__(self, message: Message, wire: Wire) -> Message:
        """Answer the coordinator's message."""


class GroupOf(Protocol):
    """Makes this rank's groups."""

    def __call__(self, ranks: Sequence[int]) -> Group | None:
        """Return the group of these ranks, or None where it would have one member."""


_IDLE_LIMIT_S = 24 * 3600.0  # between commands; a coordinator that dies closes the connection
_REPORT_LIMIT = 800  # characters


class DeviceWorker:
    """Serves commands of the coordinator until it says shutdown.

    Args:
        world: The processes of the run.
        handlers: Further commands by name, such as measuring.
    """

    def __init__(self, world: World, handlers: Mapping[str, Handler] | None = None) -> None:
        self._wire = world.wire
        self._groups = GroupFactory(world)
        self._part: _Part | None = None
        self._cache = DeviceCache(world.wire)
        self._handlers = dict(handlers or {})

    def serve(self) -> None:
        """Answer commands one after another.

        Raises:
            ColledgeError: What went wrong; it has been reported to the coordinator. The process should end, so
                that its closing connections free the peers that wait for it.
        """
        while True:
            message = self._wire.receive_message(COORDINATOR_RANK, "waiting for a command", _IDLE_LIMIT_S)
            command = message.fields["command"]
            if command == "shutdown":
                self._wire.send_message(COORDINATOR_RANK, Message({"ok": True}))
                return
            try:
                answer = self._answer(command, message)
            except ColledgeError as fault:
                self._report(fault)
                raise
            except Exception as fault:  # whatever it is, the coordinator must learn of it
                line = f"{type(fault).__name__} during {command}: {one_line(fault, most=1000)}"
                failed = ColledgeError(line, exit_code=DeviceError.exit_code)
                self._report(failed)
                raise failed from fault
            self._wire.send_message(COORDINATOR_RANK, Message({"ok": True, **answer.fields}, answer.tensors))

    def _answer(self, command: str, message: Message) -> Message:
        if command == "setup":
            self._leave()
            setup = DeviceSetup.model_validate(message.fields["setup"])
            self._part = _Part(setup, self._wire, self._groups, self._cache)
            return Message({})
        if command == "teardown":
            self._leave()
            self._wire.pace({})
            return Message({})
        if command in self._handlers:
            return self._handlers[command](message, self._wire)
        match command:
            case "open_cache":
                return self._cache.open(message)
            case "find_missing_rows":
                return self._cache.find_missing(message)
            case "fill_cache":
                return self._cache.fill(message, self._part.activations if self._part is not None else None)
            case "close_cache":
                return self._cache.close(message)
        if self._part is None:
            raise DeviceError(f"command {command!r} came before setup.")
        match command:
            case "write_layer":
                return self._part.write_layer(message)
            case "train_step":
                return self._part.train_step(message)
            case "infer":
                return self._part.infer(message)
            case "forget_state":
                return self._part.forget_state()
            case "read_layer":
                return self._part.read_layer(message)
        raise DeviceError(f"unknown command {command!r}.", fix="run the same version of colledge everywhere.")

    def _leave(self) -> None:
        """Give up this device's part of a plan."""
        if self._part is not None:
            self._part.close()
        self._part = None

    def _report(self, fault: ColledgeError) -> None:
        error = {
            "message": fault.message[:_REPORT_LIMIT],  # short enough that nobody need wait to take it
            "fix": fault.fix[:_REPORT_LIMIT],
            "exit_code": fault.exit_code,
            "lost_peer": isinstance(fault, DeviceError),
        }
        try:
            self._wire.send_message(COORDINATOR_RANK, Message({"ok": False, "error": error}))
        except ColledgeError as unreachable:
            print(f"cannot report to the coordinator: {unreachable}", file=sys.stderr)


class _Part:
    """This device's part of a plan: modules, gradients, optimizer."""

    def __init__(self, setup: DeviceSetup, wire: Wire, groups: GroupFactory, cache: DeviceCache) -> None:
        self._setup, self._cache = setup, cache
        plan = setup.plan
        self._place = place = next(p for p in plan.places() if p.shard.device == setup.device)
        self._stage = stage = plan.stages[place.stage_index]
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._model = build_model(setup.model)
        dtype, device = DTYPES[setup.precision], torch.device(setup.accelerator)
        emulation = setup.emulations.get(setup.device)
        self._clock = Clock(emulation.slowdown if emulation else 1.0, device)
        wire.timeout_s = setup.timeout_s
        wire.pace(_paces(setup))
        ranks = setup.ranks
        for name, rank in ranks.items():
            wire.names[rank] = f"device {name!r}"
        routes = {ranks[name]: route for name, route in setup.routes.items()}
        paces = {rank: Pace(r.latency_s, r.bandwidth_bytes_per_s) for rank, r in routes.items()}
        self._plan_group, shards, replicas, tied_group = _make_groups(
            plan, place, ranks, partial(groups.group, routes=paces), self._model
        )
        self._units = stage.units(self._model.shard_units, place.shard_index)
        ops = ShardGroupOps(shards, self._clock) if shards is not None else None
        module, self._parameters = self._model.build_stage(stage.layers, dtype, self._units, ops)
        module.to(device)
        has_head = stage.layers[1] == len(self._model.layer_names)
        self._output_shard = self._find_output_shard(ops) if has_head else None
        trained = {n: p for n, p in _unique(self._parameters).items() if p.requires_grad}
        self._backend = self._make_backend(module, trained, groups, shards, replicas, tied_group)
        first_trained = self._model.first_trained
        self._runner = StageRunner(
            module,
            LOSSES[setup.loss] if has_head else None,
            plan.recomputes(place.stage_index, first_trained),
            self._output_shard,
            MicrobatchRows(setup.seed, *stage.row_ranges[place.replica_index], plan.microbatch_size),
            self._backend,
            has_backward=place.stage_index >= plan.first_backward(first_trained),
            returns_gradient=place.stage_index > 0 and stage.layers[0] > first_trained,
        )
        self._reports_loss = has_head and place.shard_index == 0
        self._executor = Executor(
            plan,
            place,
            plan_schedule(plan, first_trained),
            ranks,
            routes,
            self._runner,
            self._backend,
            wire,
            self._clock,
            dtype,
            device,
        )

    def _make_backend(
        self,
        module: nn.Module,
        trained: Mapping[str, nn.Parameter],
        groups: GroupFactory,
        shards: Group | None,
        replicas: Group | None,
        tied_group: Group | None,
    ) -> Backend:
        setup = self._setup
        settings = setup.optimizer
        decay_groups = parameter_groups(settings, list(trained.values()), undecayed(trained, module))
        check_installed(setup.backend)
        if setup.backend != "native":
            groups.join_default(list(setup.ranks.values()), setup.meeting)
        match setup.backend:
            case "native":
                tied = self._tied_weights(tied_group)
                gradients = Gradients(
                    trained,
                    replicas,
                    tied,
                    self._partial_sums(trained, shards),
                    self._counted(trained, tied),
                    self._clock,
                    overlap=not setup.emulations,
                )
                partition = None
                if setup.plan.zero is not None and replicas is not None:
                    shares = self._stage.state_shares(self._place.shard_index)
                    partition = StatePartition(gradients, shares, self._place.replica_index)
                    decay_groups = partition.own(decay_groups)
                optimizer = make_optimizer(settings, decay_groups)
                return NativeBackend(
                    module, gradients, optimizer, settings.gradient_clipping, self._plan_group, partition
                )
            case "deepspeed":  # libraries are loaded where they are asked for
                from colledge.parallel.backends.deepspeed import DeepSpeedBackend

                return DeepSpeedBackend(module, decay_groups, settings, setup.deepspeed)
            case "fairscale":
                from colledge.parallel.backends.fairscale import FairScaleBackend

                return FairScaleBackend(module, decay_groups, settings)

    def close(self) -> None:
        """Leave the other ranks of the plan."""
        self._backend.close()

    def _find_output_shard(self, ops: ShardGroupOps | None) -> OutputShard | None:
        if self._units is None or ops is None:
            return None
        columns = self._model.output_columns(self._units)
        return OutputShard(columns, ops) if columns is not None else None

    def _tied_weights(self, group: Group | None) -> dict[str, TiedWeight]:
        if group is None:
            return {}
        names = {*self._model.tied, *self._model.tied.values()}
        return {
            name: TiedWeight(parameter, group, contributes=self._place.shard_index == 0)
            for name, parameter in self._parameters.items()
            if name in names and parameter.requires_grad
        }

    def _partial_sums(self, trained: Mapping[str, nn.Parameter], shards: Group | None) -> PartialSums | None:
        partial = tuple(parameter for name, parameter in trained.items() if self._model.is_partial(name))
        return PartialSums(partial, shards) if partial and shards is not None else None

    def _counted(self, trained: Mapping[str, nn.Parameter], tied: Mapping[str, TiedWeight]) -> frozenset[str]:
        """Return the parameters that this rank counts in the global norm, so that each counts once."""
        if self._place.replica_index > 0:
            return frozenset()
        return frozenset(
            name
            for name in trained
            if not (name in tied and name in self._model.tied)  # a tied copy is counted where it stands first
            and (self._place.shard_index == 0 or self._is_sliced(name))
        )

    def _is_sliced(self, name: str) -> bool:
        return self._units is not None and self._model.slices(name, self._units) is not None

    def _layer(self, name: str) -> dict[str, nn.Parameter]:
        index = self._model.layer_names.index(name)
        return {
            parameter_name: self._parameters[parameter_name]
            for parameter_name in self._model.layer_parameters(index)
        }

    def write_layer(self, message: Message) -> Message:
        """Take a layer's values, and its optimizer state where the message has it."""
        state = message.fields.get("optimizer_step")
        for name, parameter in self._layer(message.fields["layer"]).items():
            if name not in message.tensors:
                continue
            with torch.no_grad():
                parameter.copy_(message.tensors[name])
            values = {
                key.rpartition("@")[2]: tensor
                for key, tensor in message.tensors.items()
                if key.startswith(f"{name}@")
            }
            if values:
                taken = {key: tensor.to(parameter.device, copy=True) for key, tensor in values.items()}
                if state is not None:
                    taken["step"] = torch.tensor(float(state), device=parameter.device)
                self._backend.write_state(parameter, taken)
        return Message({})

    def forget_state(self) -> Message:
        """Begin the optimizer's state anew."""
        for parameter in _unique(self._parameters).values():
            if parameter.requires_grad:
                self._backend.write_state(parameter, {})
        return Message({})

    def read_layer(self, message: Message) -> Message:
        """Give a layer's values and optimizer state (`name@key`): only what is asked of this rank.

        `begins` says from which entry of the flattened parameter on the state is.
        """
        fields = message.fields
        tensors: dict[str, Tensor] = {}
        begins: dict[str, int] = {}
        layer = {
            name: parameter
            for name, parameter in self._layer(fields["layer"]).items()
            if (self._is_sliced(name) or not fields["sliced_only"])
            and (parameter.requires_grad or not fields["trained_only"])
        }
        with self._backend.gathered(list(layer.values())):
            for name, parameter in layer.items():
                if fields["values"]:
                    tensors[name] = parameter.detach().clone()
                if fields["optimizer"]:
                    part = self._backend.read_state(parameter)
                    for key, value in part.tensors.items():
                        if isinstance(value, Tensor) and key != "step":
                            tensors[f"{name}@{key}"] = value
                            begins[f"{name}@{key}"] = part.begin
        return Message({"begins": begins}, tensors)

    def train_step(self, message: Message) -> Message:
        """Run one step and its update; answer with the loss's share and this device's seconds."""
        fields = message.fields
        self._backend.start()
        self._clock.reset()
        self._runner.begin_step(fields["denominator"], fields["step"])
        x, context, targets = self._rows(message)
        step = fields["step"]
        self._executor.train(step, x, context, targets, fields["boundaries"])
        self._clock.begin_compute()
        norm = self._backend.update(fields["learning_rate"], f"the update of step {step}")
        self._clock.end_compute()
        return Message(
            {
                "loss": float(self._runner.loss_sum) if self._reports_loss else 0.0,
                "gradient_norm": norm,
                **self._figures(),
            }
        )

    def infer(self, message: Message) -> Message:
        """Run the forwards only; where they end, answer with what they give or with the summed loss of its rows."""
        fields = message.fields
        x, context, targets = self._rows(message)
        self._backend.start()
        self._clock.reset()
        loss, outputs, until = 0.0, [], fields["until"]
        for m, output in self._executor.infer(fields["step"], x, context, fields["boundaries"], until):
            self._clock.begin_compute()
            if fields["want"] == "outputs":
                outputs.append(output if until is not None else self._whole_output(output))
            else:  # every shard takes part, one reports
                rows = {name: self._executor.rows(tensor, m) for name, tensor in targets.items()}
                loss += self._runner.total_loss(output, rows)
            self._clock.end_compute()
        if self._place.shard_index > 0:
            return Message({"loss": 0.0, **self._figures()})
        return Message({"loss": loss, **self._figures()}, {"output": torch.cat(outputs)} if outputs else {})

    def activations(self, message: Message) -> tuple[Tensor | None, dict[str, float]]:
        """Run the forwards of a prefix of the model; return its last boundary, where it is here, and the seconds."""
        x, context, _ = self._rows(message)
        self._clock.reset()
        fields = message.fields
        found = [out for _, out in self._executor.infer(fields["step"], x, context, fields["boundaries"])]
        return torch.cat(found) if found else None, self._figures()

    def _whole_output(self, output: Tensor) -> Tensor:
        """Return all columns of an output of which the shards hold parts."""
        if self._output_shard is None:
            return output
        start, stop = self._output_shard.columns
        whole = output.new_zeros(*output.shape[:-1], self._model.output_width)
        whole[..., start:stop] = output
        return self._output_shard.ops.sum_in_place(whole)

    def _figures(self) -> dict[str, float]:
        """Return what this device did since the clock was reset, and the most memory that it has held."""
        return {
            "compute_s": self._clock.compute_s,
            "communicate_s": self._clock.communicate_s,
            "peak_memory_bytes": _peak_bytes(torch.device(self._setup.accelerator)),
        }

    def _rows(self, message: Message) -> tuple[StageInput | None, dict[str, Tensor], dict[str, Tensor]]:
        """Return a message's rows: of the first stage's input by micro-batch, of the context, and of the targets."""
        parts: dict[str, dict[str, Tensor]] = {"x": {}, "context": {}, "targets": {}}
        device = torch.device(self._setup.accelerator)
        for key, tensor in message.tensors.items():
            kind, _, name = key.partition("/")
            parts[kind][name] = tensor.to(device)
        return self._stage_input(parts["x"]), parts["context"], parts["targets"]

    def _stage_input(self, x: Mapping[str, Tensor]) -> StageInput | None:
        """Return what gives the first stage a micro-batch's rows: those that came, or activations kept here."""
        if not x:
            return None
        ((name, tensor),) = x.items()
        came = tensor.to(DTYPES[self._setup.precision]) if tensor.is_floating_point() else tensor

        def rows(microbatch: int) -> Tensor:
            found = self._executor.rows(came, microbatch)
            return self._cache.read(found).to(self._setup.accelerator) if name == ROW else found

        return rows


def _unique(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters with each tied pair once, by its earlier name."""
    seen: set[int] = set()
    unique = {}
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            unique[name] = parameter
    return unique


def _make_groups(
    plan: Plan, place: Place, ranks: Mapping[str, int], group_of: GroupOf, model: LayeredModel
) -> tuple[Group | None, Group | None, Group | None, Group | None]:
    """Make this rank's groups, walking all groups of the plan in one order: plan, shards, replicas, tied."""
    own = ranks[place.shard.device]
    plan_group = group_of([ranks[device] for device in plan.devices])
    shards = replicas = tied = None
    for stage in plan.stages:
        for replica in stage.replicas:
            members = [ranks[shard.device] for shard in replica.shards]
            if own in members:
                shards = group_of(members)
        for shard_index in range(stage.num_shards):
            members = [ranks[replica.shards[shard_index].device] for replica in stage.replicas]
            if own in members:
                replicas = group_of(members)
    first, last = plan.stages[0], plan.stages[-1]
    if model.tied and plan.num_stages > 1:
        members = [
            ranks[shard.device] for s in (first, last) for replica in s.replicas for shard in replica.shards
        ]
        if own in members:
            tied = group_of(members)
    return plan_group, shards, replicas, tied


def _paces(setup: DeviceSetup) -> dict[int, Pace]:
    """Return the links that this device rehearses: to every peer, the slower of the two ends."""
    real = Emulation()
    own = setup.emulations.get(setup.device, real)
    paces = {}
    for device, rank in setup.ranks.items():
        latency_s, bandwidth = own.link_to(setup.emulations.get(device, real))
        if device != setup.device and (latency_s or bandwidth is not None):
            paces[rank] = Pace(latency_s, bandwidth)
    return paces


def _peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: of its GPU, or resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
