"""Rank 0 of a run or of a federation's pools: reads the job in a folder, drives the devices, writes what happened.

    torchrun ... -m colledge.launch.coordinator OUT_DIR

SIGTERM or SIGINT ends a training after the step under way, with a checkpoint, and a node of a federation.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError

from colledge.errors import ColledgeError, LaunchError, lack_of_memory
from colledge.launch import federate
from colledge.launch.federated_pools import FederationJob
from colledge.launch.generating import generate_job
from colledge.launch.inputs import open_model
from colledge.launch.job import Failure, Job, OutputFolder
from colledge.launch.stop import StopRequest
from colledge.launch.terminal import replace_unprintable
from colledge.launch.training import Training
from colledge.models import HuggingFaceCausalLM
from colledge.parallel import Message, World
from colledge.parallel.world import join_world, timeout_from_environment
from colledge.records import write_atomically

_ANY_JOB: TypeAdapter[Job | FederationJob] = TypeAdapter(
    Annotated[Job | FederationJob, Field(discriminator="kind")]
)


def run_job(job: Job | FederationJob, world: World, stop: StopRequest) -> None:
    """Do a job.

    Raises:
        ColledgeError: What ended it.
    """
    if world.size != len(job.devices) + 1:
        raise LaunchError(
            f"{world.size - 1} devices joined, wanted {len(job.devices)}: {', '.join(job.devices)}.",
            fix="start exactly the lines that --print-commands prints.",
        )
    ranks = {device: rank for rank, device in enumerate(job.devices, start=1)}
    for device, rank in ranks.items():
        world.wire.names[rank] = f"device {device!r}"
    if isinstance(job, FederationJob):
        federate.run_job(job, world, ranks, stop)
        return
    model = open_model(job.run, job.model, probe=False)
    if job.kind == "profile":
        _profile(job, world, ranks, model)
    elif job.kind == "generate":
        generate_job(job, world, ranks, model, stop)
    else:
        Training(job, world, ranks, model).run(stop)


def _profile(job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM) -> None:
    from colledge.launch.profiling import profile_pool

    run = job.run
    pool_profile, model_profile = profile_pool(
        world.wire,
        ranks,
        job.pool.devices,
        model,
        name=job.model.name,
        row_shape=(run.data.sequence_length,),
        global_batch_size=run.batch.global_size,
        precision=run.precision,
        optimizer=run.optimizer,
        progress=lambda line: print(line, flush=True),
    )
    folder = OutputFolder(job.output)
    write_atomically(folder.pool_profile, pool_profile.to_json())
    write_atomically(folder.model_profile, model_profile.to_json())


def _shut_down(world: World) -> None:
    """Tell every device to end, and wait until it heard."""
    for rank in range(1, world.size):
        world.wire.send_message(rank, Message({"command": "shutdown"}))
        world.wire.receive_message(rank, "shutting down")


def main() -> None:
    """Run the job in the folder that the command line names; leave error.json where it fails."""
    output = Path(sys.argv[1])
    folder = OutputFolder(output)
    stop = StopRequest()
    replace_unprintable()
    torch.set_num_threads(1)
    try:
        with folder.locked():
            try:
                job = _ANY_JOB.validate_json(folder.job.read_bytes())
                world = join_world(timeout_from_environment())
                run_job(job, world, stop)
                _shut_down(world)
            except Exception as fault:
                failure = _failure(fault)
                with suppress(OSError):  # a full disk; the launcher then quotes the log
                    write_atomically(folder.failure, failure.to_json())
                os._exit(failure.exit_code)  # sockets close now: that is what frees the devices
    except LaunchError as fault:  # the folder is another run's: leave nothing in it
        print(f"LaunchError: {fault}", file=sys.stderr, flush=True)
        os._exit(fault.exit_code)


def _failure(fault: Exception) -> Failure:
    if isinstance(fault, ColledgeError):
        print(f"error: {fault}", file=sys.stderr, flush=True)
        return Failure(message=fault.message, fix=fault.fix, exit_code=fault.exit_code)
    traceback.print_exception(fault)
    lack = lack_of_memory(fault)
    if lack is not None:
        return Failure(message=f"the coordinator is {lack.message}", fix=lack.fix, exit_code=lack.exit_code)
    if isinstance(fault, OSError | SafetensorError):
        return Failure(
            message=f"a file could not be read or written ({fault}).",
            fix="make room on that disk.",
            exit_code=2,
        )
    return Failure(
        message=f"the coordinator failed: {type(fault).__name__}: {fault}",
        fix="read the coordinator's log; this may be a fault of colledge.",
        exit_code=1,
    )


if __name__ == "__main__":
    main()
