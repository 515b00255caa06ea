"""How much memory a plan takes, as the planner says and as real processes do.

    python benchmarks/memory.py [--case NAME] [--json]

Every case trains a Llama of 14 million parameters for a few steps in processes of their own, and compares the
largest resident size of each with what `plan_memory` says of the plan.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from colledge.data import Batch
from colledge.launch.profiling import DeviceFacts, DeviceRequest
from colledge.measure.analytic import model_profile_from_config
from colledge.models import HuggingFaceCausalLM
from colledge.parallel import Engine, EngineSettings, Message
from colledge.parallel.engine import command
from colledge.plan import Plan
from colledge.planner import plan_memory
from colledge.profiles import DeviceProfile, PoolProfile, PowerMode
from colledge.settings import OptimizerSettings
from tests.multiproc.workers import FreshWorkers

BATCH, SEQUENCE, STEPS = 8, 256, 3
CONFIG = LlamaConfig(
    vocab_size=4000,
    hidden_size=384,
    intermediate_size=960,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)


def stage(
    layers: tuple[int, int], *replicas: tuple[int, tuple[str, ...]], state_shares: tuple[float, ...] = ()
) -> dict[str, Any]:
    return {
        "layers": layers,
        "replicas": [
            {
                "samples": rows,
                "shards": [
                    {"device": d, "fraction": 1 / len(devices), "state_share": share} for d in devices
                ],
            }
            for (rows, devices), share in zip_longest(replicas, state_shares)
        ],
    }


@dataclass(frozen=True)
class Case:
    """A plan, but for what is the same in all of them."""

    stages: list[dict[str, Any]]
    microbatch_size: int
    schedule: str = "1f1b"
    recompute: list[bool] | None = None
    zero: int | None = None
    backend: str | None = None

    def plan(self) -> Plan:
        return Plan.model_validate(
            {
                "schema": "colledge/plan/1",
                "num_layers": CONFIG.num_hidden_layers + 2,
                "global_batch_size": BATCH,
                "microbatch_size": self.microbatch_size,
                "schedule": {"name": self.schedule},
                "stages": self.stages,
                "recompute": self.recompute,
                "zero": self.zero,
                "backend": self.backend,
            }
        )


PIPELINE = [stage((0, 4), (2, ("d0",))), stage((4, 8), (2, ("d1",)))]
REPLICAS = [stage((0, 8), (1, ("d0",)), (1, ("d1",)))]
CASES = {
    "single": Case([stage((0, 8), (8, ("d0",)))], 8),
    "data": Case([stage((0, 8), (5, ("d0",)), (3, ("d1",)))], 8),
    "1f1b": Case(PIPELINE, 2),
    "gpipe": Case(PIPELINE, 2, "gpipe"),
    "recompute": Case(PIPELINE, 2, "gpipe", [True, True]),
    "hybrid": Case([stage((0, 4), (2, ("d0",))), stage((4, 8), (2, ("d1", "d2")))], 2, "gpipe"),
    "tensor": Case([stage((0, 8), (4, ("d0", "d1")))], 4),
    "zero": Case([stage((0, 8), (1, ("d0",)), (1, ("d1",)), state_shares=(0.8, 0.2))], 2, zero=1),
    "fairscale": Case(REPLICAS, 2, zero=1, backend="fairscale"),
    **{f"zero-{n}": Case(REPLICAS, 2, zero=n, backend="deepspeed") for n in (1, 2, 3)},
}


def measure(name: str) -> list[dict[str, Any]]:
    """Return the modelled and the measured bytes of each device."""
    torch.manual_seed(0)
    plan, structure = CASES[name].plan(), HuggingFaceCausalLM(CONFIG.to_dict())
    workers = FreshWorkers(len(plan.devices))
    request = DeviceRequest(model=structure.spec, accelerator="cpu", threads=1)
    message = Message({"command": "measure_device", "request": request.model_dump(mode="json")})
    answers = command(
        workers.wire, dict.fromkeys(workers.ranks.values(), message), "measuring", workers.ranks
    )
    facts = {id: DeviceFacts.model_validate(answer.fields["answer"]) for id, answer in answers.items()}
    weights = {n: p.detach() for n, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
    settings = EngineSettings(
        optimizer=OptimizerSettings(learning_rate=1e-3),
        backend=plan.backend or "native",
        deepspeed={"zero_optimization": {"stage": plan.zero}} if plan.backend == "deepspeed" else None,
    )
    engine = Engine(plan, structure, weights, settings, workers.ranks, workers.wire)
    for _ in range(STEPS):
        ids = torch.randint(CONFIG.vocab_size, (BATCH, SEQUENCE))
        record = engine.train_step(Batch({"input_ids": ids}, {"labels": ids}))
    engine.close()
    workers.close()
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
            "case": name,
            "device": id,
            "modelled_bytes": parts.total_bytes,
            "measured_bytes": record.devices[id].peak_memory_bytes,
        }
        for id, parts in plan_memory(plan, pool, model, 2.0).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for case in given.case or CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for row in process.submit(measure, case).result():
                ratio = row["modelled_bytes"] / row["measured_bytes"]
                if given.json:
                    print(json.dumps(row))
                else:
                    print(
                        f"{row['case']:10} {row['device']}  modelled {row['modelled_bytes'] / 1e6:6.0f} MB, "
                        f"measured {row['measured_bytes'] / 1e6:6.0f} MB, ratio {ratio:.2f}"
                    )


if __name__ == "__main__":
    main()
