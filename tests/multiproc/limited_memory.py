"""Trains a model over workers whose memory is limited by cgroups; prints what was measured as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from transformers import LlamaConfig

from colledge.data.batch import Batch
from colledge.launch.profiling import DeviceFacts, DeviceRequest
from colledge.measure.analytic import model_profile_from_config
from colledge.models import HuggingFaceCausalLM, SafetensorsDirectory, WeightWriter
from colledge.models.lora import StartingValues
from colledge.parallel import Engine, EngineSettings, Message
from colledge.parallel.engine import command
from colledge.plan import Plan
from colledge.planner import plan_memory
from colledge.profiles import DeviceProfile, PoolProfile, PowerMode
from colledge.settings import LoraSettings, OptimizerSettings
from tests.multiproc.workers import FreshWorkers, Workers

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
BATCH, SEQUENCE, STEPS = 4, 32, 2
CONFIG = LlamaConfig(
    vocab_size=400, hidden_size=1024, intermediate_size=4096, num_hidden_layers=13, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def cgroups_can_limit() -> bool:
    """Return whether this process may make cgroups that limit memory."""
    if os.geteuid() != 0:
        return False
    try:
        with limited(1 << 30):
            return True
    except OSError:
        return False


@contextmanager
def limited(limit_bytes: int) -> Iterator[Path]:
    """Make a cgroup, of either version, whose processes together hold at most so many bytes."""
    v1 = (V1 / "memory.limit_in_bytes").exists()
    group = (V1 if v1 else V2) / f"colledge-{token_hex(6)}"
    group.mkdir()
    try:
        names = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            if v1
            else ("memory.max", "memory.swap.max")
        )
        (group / names[0]).write_text(str(limit_bytes))
        if (group / names[1]).exists():
            (group / names[1]).write_text(str(limit_bytes) if v1 else "0")
        yield group
    finally:
        group.rmdir()


def write_weights(structure: HuggingFaceCausalLM, folder: Path) -> int:
    """Write random weights, a layer at a time; return their bytes."""
    writer, total, generator = WeightWriter(folder), 0, torch.Generator().manual_seed(0)
    for index in range(len(structure.layer_names)):
        layer = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
            for name, shape in structure.layer_parameters(index).items()
            if structure.dtype_of(name, torch.float32) is torch.float32 and "lora" not in name
        }
        writer.add(layer)
        total += sum(tensor.nbytes for tensor in layer.values())
    writer.finish()
    return total


def plan(num_devices: int) -> Plan:
    num_layers = CONFIG.num_hidden_layers + 2
    cuts = [num_layers * i // num_devices for i in range(num_devices + 1)]
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": num_layers,
            "global_batch_size": BATCH,
            "microbatch_size": 2,
            "stages": [
                {
                    "layers": cuts[i : i + 2],
                    "replicas": [{"samples": 2, "shards": [{"device": f"d{i}", "fraction": 1.0}]}],
                }
                for i in range(num_devices)
            ],
        }
    )


class LimitedWorkers(FreshWorkers):
    """Workers with a cgroup each."""

    def __init__(self, cgroups: Sequence[Path], timeout_s: float) -> None:
        self._cgroups = cgroups
        super().__init__(len(cgroups), timeout_s)

    def start(self, rank: int, environment: Mapping[str, str]) -> BaseProcess:
        process = super().start(rank, environment)
        (self._cgroups[rank - 1] / "cgroup.procs").write_text(
            str(process.pid)
        )  # before it has loaded anything
        return process


def run(folder: Path, workers: Workers, num_devices: int) -> list[dict[str, Any]]:
    """Train; return for each device the bytes that the planner reckons with and those that it held at most."""
    structure = HuggingFaceCausalLM(CONFIG.to_dict(), LoraSettings(rank=8))
    chosen = plan(num_devices)
    request = DeviceRequest(model=structure.spec, accelerator="cpu", threads=1)
    message = Message({"command": "measure_device", "request": request.model_dump(mode="json")})
    answers = command(
        workers.wire, dict.fromkeys(workers.ranks.values(), message), "measuring", workers.ranks
    )
    facts = {id: DeviceFacts.model_validate(answer.fields["answer"]) for id, answer in answers.items()}
    weights = StartingValues(SafetensorsDirectory(folder), structure.adapter_shapes, seed=0)
    settings = EngineSettings(optimizer=OptimizerSettings(learning_rate=1e-3))
    engine = Engine(chosen, structure, weights, settings, workers.ranks, workers.wire)
    ids = torch.randint(CONFIG.vocab_size, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    records = [engine.train_step(Batch({"input_ids": ids}, {"labels": ids})) for _ in range(STEPS)]
    engine.close()
    modes = (PowerMode(name="max", idle_w=1, compute_w=2, communicate_w=1, source="declared"),)
    devices = tuple(
        DeviceProfile(
            id=id,
            kind="cpu",
            memory_bytes=fact.usable_bytes,
            runtime_bytes=fact.runtime_bytes,
            allocator_overhead=fact.allocator_overhead,
            modes=modes,
        )
        for id, fact in facts.items()
    )
    pool = PoolProfile(schema_tag="colledge/pool-profile/1", devices=devices)
    model = model_profile_from_config(structure, name="llama", sequence_length=SEQUENCE)
    return [
        {
            "device": id,
            "losses": [record.loss for record in records],
            "modelled_bytes": parts.total_bytes,
            "measured_bytes": records[-1].devices[id].peak_memory_bytes,
        }
        for id, parts in plan_memory(chosen, pool, model, 2.0).items()
    ]


def main(folder: Path, limit_bytes: int, num_devices: int, timeout_s: float) -> None:
    with ExitStack() as groups:
        paths = [groups.enter_context(limited(limit_bytes)) for _ in range(num_devices)]
        workers = LimitedWorkers(paths, timeout_s)
        try:
            for row in run(folder, workers, num_devices):
                print(json.dumps(row))
        finally:
            workers.close()
