"""The coordinator's side of the engine: gives every device its part, feeds rows, gathers losses and state.

For any plan, losses and weights equal those of one process that runs the whole model on the whole batch: the
loss is a sum over targets divided by the number of targets in the whole batch, gradients are sums over rows.
The coordinator computes nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from colledge.data.batch import ACTIVATIONS, ROW, Batch
from colledge.errors import ColledgeError, ConfigError, DeadlineError, DeviceError, ModelError, PlanError
from colledge.models.layered import DTYPES, LayeredModel
from colledge.models.losses import IGNORED, LOSSES
from colledge.models.sharding import Slice
from colledge.parallel.backends import check_backend_plan
from colledge.parallel.backends.zero_config import complete_config
from colledge.parallel.setup import DeviceSetup, RouteEstimate
from colledge.parallel.wire import Message, Wire
from colledge.plan import Place, Plan, Stage
from colledge.settings import BackendName, Emulation, OptimizerSettings, Precision

State = dict[str, dict[str, Tensor]]
_GRACE_S = 5.0  # beyond the devices' deadlines: those who waited in vain report before they are blamed


@dataclass(frozen=True)
class DeviceStep:
    """What one device did in a step, by its own clock."""

    compute_s: float
    communicate_s: float
    peak_memory_bytes: int

    def __add__(self, other: DeviceStep) -> DeviceStep:
        """Return both together."""
        return DeviceStep(
            self.compute_s + other.compute_s,
            self.communicate_s + other.communicate_s,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )


@dataclass(frozen=True)
class Evaluation:
    """The loss summed over some targets, how many there were, and what each device did for it."""

    loss: float
    num_targets: int
    devices: dict[str, DeviceStep]

    def __add__(self, other: Evaluation) -> Evaluation:
        """Return both together, which are of the same devices."""
        devices = {device: step + other.devices[device] for device, step in self.devices.items()}
        return Evaluation(self.loss + other.loss, self.num_targets + other.num_targets, devices)


@dataclass(frozen=True)
class StepRecord:
    """What one step gave: the mean loss over its targets, seconds by the coordinator's clock."""

    step: int
    loss: float
    num_targets: int
    step_s: float
    gradient_norm: float | None
    devices: dict[str, DeviceStep]


@dataclass(frozen=True)
class EngineSettings:
    """How to train, beside the plan and the model; `deepspeed` is a configuration of DeepSpeed, to be completed."""

    optimizer: OptimizerSettings
    loss: str = "causal_lm"
    precision: Precision = "float32"
    seed: int = 0
    backend: BackendName = "native"
    deepspeed: Mapping[str, JsonValue] | None = None
    accelerators: Mapping[str, str] | None = None
    threads: Mapping[str, int] | None = None
    emulations: Mapping[str, Emulation] | None = None
    routes: Mapping[str, Mapping[str, RouteEstimate]] | None = None


class Engine:
    """Trains a model under a plan, on workers that serve (`DeviceWorker`).

    Args:
        plan: Checked against the model here.
        model: The structure.
        weights: The values by parameter name, read one at a time; a tied parameter may be missing.
        settings: Optimizer, loss, precision and what is known of devices.
        ranks: The rank of every device of the plan.
        wire: This rank's messages.

    Attributes:
        step: The steps made.
        compute_s: The seconds that each device has computed, by its own clock.

    Raises:
        PlanError: The plan does not fit the model, or cuts the head into shards that the loss does not take.
        ModelError: A parameter has no value or the wrong shape.
        DeviceError: A device does not answer.
    """

    def __init__(
        self,
        plan: Plan,
        model: LayeredModel,
        weights: Mapping[str, Tensor],
        settings: EngineSettings,
        ranks: Mapping[str, int],
        wire: Wire,
    ) -> None:
        plan.check_model(len(model.layer_names), model.shard_units)
        check_backend_plan(settings.backend, plan)
        self.plan, self.model = plan, model
        self._settings, self._wire = settings, wire
        self._ranks = {device: ranks[device] for device in plan.devices}
        for device, rank in self._ranks.items():
            wire.names[rank] = f"device {device!r}"
        self._places = {place.shard.device: place for place in plan.places()}
        self._dtype = DTYPES[settings.precision]
        self._loss = LOSSES[settings.loss]
        self._check_loss()
        self.step = 0
        self.compute_s: dict[str, float] = dict.fromkeys(self._ranks, 0.0)
        self._setup()
        self._write_all(weights)

    def _check_loss(self) -> None:
        last = self.plan.stages[-1]
        units = last.units(self.model.shard_units, 0) if last.layers[1] == self.plan.num_layers else None
        if units is not None and self.model.output_columns(units) is not None and not self._loss.takes_shards:
            raise PlanError(
                f"the plan cuts the head into {last.num_shards} shards; loss {self._settings.loss!r} takes none.",
                fix="give a plan whose last stage has no shards.",
            )

    # -- setting up and tearing down ---------------------------------------------------------------------------

    def _setup(self) -> None:
        settings = self._settings
        meeting = uuid.uuid4().hex
        deepspeed: dict[str, JsonValue] = {}
        if settings.backend == "deepspeed":
            deepspeed = complete_config(settings.deepspeed or {}, settings.optimizer, self.plan)
        messages = {}
        for device in self._ranks:
            setup = DeviceSetup(
                plan=self.plan.model_copy(update={"prediction": None}),
                device=device,
                ranks=self._ranks,
                model=self.model.spec,
                precision=settings.precision,
                loss=settings.loss,
                optimizer=settings.optimizer,
                backend=settings.backend,
                deepspeed=deepspeed,
                meeting=meeting,
                seed=settings.seed,
                accelerator=(settings.accelerators or {}).get(device, "cpu"),
                threads=(settings.threads or {}).get(device),
                timeout_s=self._wire.timeout_s,
                emulations=dict(settings.emulations or {}),
                routes=dict((settings.routes or {}).get(device, {})),
            )
            messages[device] = Message({"command": "setup", "setup": setup.model_dump(mode="json")})
        self._command(messages, "setup")

    def close(self) -> None:
        """Give the devices' memory back; the workers keep serving."""
        self._command({d: Message({"command": "teardown"}) for d in self._ranks}, "teardown")

    def _layer_values(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {}
        for parameter, shape in self.model.layer_parameters(self.model.layer_names.index(name)).items():
            source = parameter if parameter in weights else self.model.tied.get(parameter)
            if source is None or source not in weights:
                raise ModelError(
                    f"the weights have no {parameter!r}.", fix="give the weights of this very model."
                )
            tensor = weights[source]
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{parameter!r} has shape {list(tensor.shape)}, wanted {list(shape)}.",
                    fix="give the weights of this very model.",
                )
            values[parameter] = cast = tensor.to(self.model.dtype_of(parameter, self._dtype))
            if cast.dtype != tensor.dtype and not bool(cast.isfinite().all()):
                raise ModelError(
                    f"{parameter!r} holds numbers that are too large for {str(cast.dtype).removeprefix('torch.')}.",
                    fix="train in the precision that the weights are stored in.",
                )
        return values

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Give all layers new values and begin the optimizer's state anew; steps count on.

        Args:
            weights: As for a new engine.

        Raises:
            ConfigError: The backend takes no optimizer state.
            ModelError: A parameter has no value or the wrong shape.
        """
        self.forget_state()
        self._write_all(weights)

    def forget_state(self) -> None:
        """Begin the optimizer's state anew.

        Raises:
            ConfigError: The backend takes no optimizer state.
        """
        self._check_state()
        self._command({d: Message({"command": "forget_state"}) for d in self._ranks}, "forgetting state")

    def _write_all(self, weights: Mapping[str, Tensor]) -> None:
        for name in self.model.layer_names[slice(*self.plan.layer_range)]:
            self._write_layer(name, self._layer_values(name, weights), None)

    def _write_layer(self, name: str, values: Mapping[str, Tensor], optimizer_step: int | None) -> None:
        """Send a layer to every device that holds it: only its slices."""
        messages = {}
        for device, place in self._holders(name):
            tensors = {}
            for key, tensor in values.items():
                part = self._slice(key.partition("@")[0], place)
                tensors[key] = tensor if part is None else part.take(tensor)
            fields = {"command": "write_layer", "layer": name, "optimizer_step": optimizer_step}
            messages[device] = Message(fields, tensors)
        self._command(messages, f"sending layer {name}")

    def _holders(self, layer_name: str) -> Iterator[tuple[str, Place]]:
        index = self.model.layer_names.index(layer_name)
        for device, place in self._places.items():
            start, stop = self._stage_of(device).layers
            if start <= index < stop:
                yield device, place

    def _slice(self, parameter: str, place: Place) -> Slice | None:
        units = self.plan.stages[place.stage_index].units(self.model.shard_units, place.shard_index)
        return None if units is None else self.model.slices(parameter, units)

    # -- steps -------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, learning_rate: float | None = None) -> StepRecord:
        """Run one optimizer update on a whole batch.

        Args:
            batch: `global_batch_size` rows.
            learning_rate: For this step; None means the optimizer's own.

        Raises:
            ConfigError: The batch has another number of rows, or lacks an input, or a target of the loss.
            DeviceError: A device died, hung or failed; the message names it, the action and the step.
        """
        if batch.num_rows != self.plan.global_batch_size:
            raise ConfigError(
                f"the batch has {batch.num_rows} rows, wanted {self.plan.global_batch_size} (global_batch_size)."
            )
        num_targets = self._loss.count(batch.targets)
        self.step += 1
        rate = self._settings.optimizer.learning_rate if learning_rate is None else learning_rate
        fields = {
            "command": "train_step",
            "step": self.step,
            "denominator": num_targets,
            "learning_rate": rate,
        }
        began_s = time.perf_counter()
        answers = self._compute(self._rows(batch, fields), f"step {self.step}")
        step_s = time.perf_counter() - began_s
        return StepRecord(
            step=self.step,
            loss=sum(answer.fields["loss"] for answer in answers.values()),
            num_targets=num_targets,
            step_s=step_s,
            gradient_norm=next(iter(answers.values())).fields["gradient_norm"],
            devices=device_steps(answers),
        )

    def evaluate(self, batch: Batch) -> Evaluation:
        """Return the loss summed over a batch's targets. Any number of rows."""
        parts = []
        for part, _ in self._padded(batch):
            answers = self._infer(part, "loss", None)
            loss = sum(answer.fields["loss"] for answer in answers.values())
            parts.append(Evaluation(loss, self._loss.count(part.targets), device_steps(answers)))
        return reduce(add, parts)

    def forward(self, batch: Batch, until: int | None = None) -> Tensor:
        """Return the model's outputs for a batch of any number of rows, in its order, on the coordinator.

        Args:
            batch: Its targets are not looked at.
            until: Return what enters this layer instead; later layers are not computed.

        Raises:
            ConfigError: No layer of the plan comes before `until`, or the plan ends before it.
        """
        first, last = self.plan.layer_range
        if until is not None and not first < until <= last:
            raise ConfigError(
                f"forward until layer {until}, wanted a layer from {first + 1} to {last}.",
                fix="ask for a boundary behind a layer that the plan runs.",
            )
        outputs = []
        for part, num_rows in self._padded(Batch(batch.inputs, {})):
            answers = self._infer(part, "outputs", None if until == last else until)
            size = self.plan.microbatch_size
            whole: Tensor | None = None
            for device, answer in answers.items():
                if "output" not in answer.tensors:
                    continue
                rows = torch.tensor(self.plan.row_indices(self._places[device]))
                output = answer.tensors["output"]
                if whole is None:
                    whole = output.new_empty(size * self.plan.num_microbatches, *output.shape[1:])
                whole[rows] = output
            assert whole is not None
            outputs.append(whole[:num_rows])
        return torch.cat(outputs)

    def prefix_messages(self, batch: Batch) -> dict[str, Message]:
        """Return what each device is told to run the forwards of a batch of `global_batch_size` rows."""
        return self._rows(batch, {"command": "fill_cache", "step": self.step})

    def _infer(self, batch: Batch, want: Literal["loss", "outputs"], until: int | None) -> dict[str, Message]:
        fields = {"command": "infer", "step": self.step, "want": want, "until": until}
        messages = {
            device: message
            for device, message in self._rows(batch, fields).items()
            if until is None or self._stage_of(device).layers[0] < until
        }
        return self._compute(messages, f"a forward pass after step {self.step}")

    def _stage_of(self, device: str) -> Stage:
        return self.plan.stages[self._places[device].stage_index]

    def _padded(self, batch: Batch) -> Iterator[tuple[Batch, int]]:
        """Yield a batch in pieces of `global_batch_size` rows; the last is filled up with rows of no target."""
        size = self.plan.global_batch_size
        for begin in range(0, batch.num_rows, size):
            indices = torch.arange(begin, min(begin + size, batch.num_rows))
            yield filled_up(batch, indices, size), len(indices)

    def _rows(self, batch: Batch, fields: Mapping[str, object]) -> dict[str, Message]:
        """Return each device's message of a step: its rows of what its stage needs, and the agreed shapes."""
        model, entering = self.model, self._entering(batch)
        cached = entering == ROW  # the shapes of what a cache holds follow from the model's own input
        row_shape = tuple(batch.inputs[model.input_name if cached else entering].shape[1:])
        first_layer = 0 if cached else self.plan.layer_range[0]
        messages = {}
        for device, place in self._places.items():
            rows = torch.tensor(self.plan.row_indices(place), dtype=torch.int64)
            tensors = {}
            if len(rows):
                if place.stage_index == 0:
                    tensors[f"x/{entering}"] = batch.inputs[entering][rows]
                for name in model.context_names:
                    if name in batch.inputs:
                        tensors[f"context/{name}"] = batch.inputs[name][rows]
                if place.stage_index == self.plan.num_stages - 1:
                    tensors |= {f"targets/{name}": tensor[rows] for name, tensor in batch.targets.items()}
            layers = self._stage_of(device).layers
            boundaries = [model.boundary_shape(row_shape, layer, first_layer) for layer in layers]
            messages[device] = Message({**fields, "boundaries": boundaries}, tensors)
        return messages

    def _entering(self, batch: Batch) -> str:
        """Return which of a batch's inputs the first stage takes: the model's own, activations, or rows of a cache."""
        first_layer = self.plan.layer_range[0]
        names = (ACTIVATIONS, ROW) if first_layer else (self.model.input_name,)
        found = next((name for name in names if name in batch.inputs), None)
        if found is None:
            raise ConfigError(
                f"the batch has inputs {', '.join(batch.inputs)}; layer {first_layer} takes {' or '.join(names)}."
            )
        return found

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self, trained_only: bool = False) -> State:
        """Return the values: layer name -> parameter name -> whole tensor. A tied weight comes once.

        Args:
            trained_only: Leave frozen parameters out.
        """
        return dict(zip(self.model.layer_names, self.layers(trained_only), strict=True))

    def layers(self, trained_only: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield the values of one layer after another, as `state_dict` returns them together."""
        for name in self.model.layer_names:
            yield self._read_layer(name, False, trained_only)

    def checkpoint_layer(self, layer_name: str) -> dict[str, Tensor]:
        """Return the values and optimizer state (`parameter@key`) of what a layer trains, whole tensors.

        Raises:
            ConfigError: The backend gives no optimizer state.
        """
        self._check_state()
        return self._read_layer(layer_name, True, True)

    def restore_layer(self, layer_name: str, values: Mapping[str, Tensor], step: int) -> None:
        """Give a layer the values and optimizer state that `checkpoint_layer` returned after `step` steps.

        Layers may come in any order; a tied weight goes to all layers that hold it when its own layer comes.

        Raises:
            ConfigError: The backend takes no optimizer state.
        """
        self._check_state()
        self.step = step
        self._write_layer(layer_name, values, step)
        for copy_name, source in self.model.tied.items():
            if source in values:
                copies = {
                    key.replace(source, copy_name, 1): tensor
                    for key, tensor in values.items()
                    if key.partition("@")[0] == source
                }
                self._write_layer(self._layer_of(copy_name), copies, step)

    def _check_state(self) -> None:
        if self._settings.backend == "deepspeed":
            raise ConfigError(
                "backend deepspeed keeps no checkpoints: its optimizer state stays on the devices.",
                fix="set backend: native or fairscale.",
            )

    def _layer_of(self, parameter: str) -> str:
        for index, name in enumerate(self.model.layer_names):
            if parameter in self.model.layer_parameters(index):
                return name
        raise KeyError(parameter)

    def _read_layer(self, name: str, optimizer: bool, trained_only: bool) -> dict[str, Tensor]:
        """Gather a layer from the first replica of its stage; slices are put together to whole tensors.

        Under ZeRO the replicas each hold a part of the state, so all of them take part.
        """
        divided = self._settings.backend != "native" or self.plan.zero is not None
        holders = [(d, p) for d, p in self._holders(name) if p.replica_index == 0 or divided]
        messages = {
            device: Message(
                {
                    "command": "read_layer",
                    "layer": name,
                    "values": place.replica_index == 0,
                    "optimizer": optimizer,
                    "trained_only": trained_only,
                    "sliced_only": place.shard_index > 0,
                }
            )
            for device, place in holders
        }
        answers = self._command(messages, f"reading layer {name}")
        shapes = self.model.layer_parameters(self.model.layer_names.index(name))
        held: dict[tuple[str, Slice | None], Tensor] = {}
        for device, place in holders:
            for key, tensor in answers[device].tensors.items():
                parameter = key.partition("@")[0]
                if parameter in self.model.tied:
                    continue
                part = self._slice(parameter, place)
                shape = shapes[parameter] if part is None else part.shape(shapes[parameter])
                if tuple(tensor.shape) != shape:  # some entries, flat; the other replicas have the rest
                    begin = answers[device].fields["begins"][key]
                    all_entries = held.get((key, part), tensor.new_empty(shape))
                    all_entries.view(-1)[begin : begin + len(tensor)] = tensor
                    tensor = all_entries
                held[key, part] = tensor
        whole: dict[str, Tensor] = {}
        for (key, part), tensor in held.items():
            if part is None:
                whole[key] = tensor
            else:
                part.put(whole.setdefault(key, tensor.new_empty(shapes[key.partition("@")[0]])), tensor)
        return whole

    # -- commands ----------------------------------------------------------------------------------------------

    def _command(self, messages: Mapping[str, Message], action: str) -> dict[str, Message]:
        """Send each device its message, wait for all answers; a fault of one is raised as its own."""
        return command(self._wire, {self._ranks[d]: m for d, m in messages.items()}, action, self._ranks)

    def _compute(self, messages: Mapping[str, Message], action: str) -> dict[str, Message]:
        """Command what takes the devices' time, and note how long they computed."""
        answers = self._command(messages, action)
        for device, answer in answers.items():
            self.compute_s[device] += answer.fields["compute_s"]
        return answers


def filled_up(batch: Batch, indices: Tensor, num_rows: int) -> Batch:
    """Return some rows of a batch, and the last of them again without a target until there are `num_rows`."""
    own = len(indices)
    filled = torch.cat([indices, indices[-1:].expand(num_rows - own)])
    targets = {name: tensor[filled] for name, tensor in batch.targets.items()}
    if "labels" in targets:
        targets["labels"][own:] = IGNORED
    return Batch({name: tensor[filled] for name, tensor in batch.inputs.items()}, targets)


def device_steps(answers: Mapping[str, Message]) -> dict[str, DeviceStep]:
    """Return what the devices did, by their own answers."""
    names = ("compute_s", "communicate_s", "peak_memory_bytes")
    return {
        device: DeviceStep(*(answer.fields[name] for name in names)) for device, answer in answers.items()
    }


def command(
    wire: Wire, messages: Mapping[int, Message], action: str, ranks: Mapping[str, int]
) -> dict[str, Message]:
    """Send messages to ranks and gather their answers, by device.

    One fault brings others with it: a device that loses a peer ends, and gloo closes all of a process's
    connections when one wait passes its deadline. What is raised is what most likely came first: a device's own
    fault, then a device that stays silent, then a lost connection, then a device that merely lost a peer.

    Raises:
        ColledgeError: A device failed, was silent or was lost.
    """
    names = {rank: device for device, rank in ranks.items()}
    headers = {rank: wire.begin_receive_message(rank) for rank in messages}
    faults: list[tuple[int, ColledgeError]] = []
    sending = {rank: wire.begin_message(rank, message) for rank, message in messages.items()}
    answers: dict[str, Message] = {}
    for rank, header in headers.items():
        limit_s = _GRACE_S if faults else wire.timeout_s + _GRACE_S
        try:
            for transfer in sending[rank]:
                transfer.wait(action, limit_s)
            answer = wire.finish_message(rank, header, action, limit_s)
        except DeviceError as fault:
            faults.append((1 if isinstance(fault, DeadlineError) else 2, fault))
            continue
        if answer.fields["ok"]:
            answers[names[rank]] = answer
        else:
            error = answer.fields["error"]
            raised = ColledgeError(
                f"{wire.names[rank]}: {error['message']}", fix=error["fix"], exit_code=error["exit_code"]
            )
            faults.append((3 if error["lost_peer"] else 0, raised))
    if faults:
        raise min(faults, key=lambda pair: pair[0])[1]
    return answers
