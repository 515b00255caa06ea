"""Step time of colledge against PyTorch's own parallelism on two equal devices, side by side in one run.

    python benchmarks/engine.py [--rounds 8] [--steps 4] [--json FILE]

Two worlds of two processes with one thread each live at once and run in turn, a few steps each, round after
round, so that both see the same machine: colledge's workers (fed by this process, the coordinator), and the peer.

    pipeline   torch.distributed.pipelining, Schedule1F1B over two stages
    data       DistributedDataParallel
    tensor     DTensor (parallelize_module: column- and row-wise linears, column-wise head)

The model is the same Llama (float32, AdamW), built from the same code and weights; medians over all steps but
each round's first. The loss of both is printed: they train the same thing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from colledge.data import Batch
from colledge.models import HuggingFaceCausalLM
from colledge.models.losses import LOSSES
from colledge.parallel import Engine, EngineSettings
from colledge.plan import Plan
from colledge.settings import OptimizerSettings
from tests.multiproc.workers import FreshWorkers, free_port

BATCH, SEQUENCE, MICROBATCH = 16, 128, 2
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
)
LEARNING_RATE = 1e-3
LOSS = LOSSES["causal_lm"]
PEERS = {
    "pipeline": "torch.distributed.pipelining Schedule1F1B",
    "data": "DistributedDataParallel",
    "tensor": "DTensor parallelize_module",
}


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="sdpa")


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, CONFIG.vocab_size, (BATCH, SEQUENCE), generator=generator)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


# -- the peers: each returns a function that trains one step and returns its loss on the rank that has it ----------


def data_peer(rank: int) -> Callable[[Tensor], float]:
    model = nn.parallel.DistributedDataParallel(new_model(), gradient_as_bucket_view=True)
    optimizer = adamw(model.parameters())
    half = BATCH // 2

    def step(ids: Tensor) -> float:
        rows = ids[rank * half : (rank + 1) * half]
        optimizer.zero_grad()
        total = LOSS.total(model(input_ids=rows, use_cache=False).logits, {"labels": rows})
        loss = total / (half * (SEQUENCE - 1))  # DDP averages over ranks
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def pipeline_peer(rank: int) -> Callable[[Tensor], float]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    layered = HuggingFaceCausalLM(CONFIG.to_dict())
    cut = PIPELINE_CUT
    layers = (0, cut) if rank == 0 else (cut, len(layered.layer_names))
    module, parameters = layered.build_stage(layers, torch.float32)
    values = dict(new_model().named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x, {})

    denominator = BATCH * (SEQUENCE - 1)
    stage = PipelineStage(Part(), rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(
        stage,
        BATCH // MICROBATCH,
        loss_fn=lambda output, labels: LOSS.total(output, {"labels": labels}) / denominator,
        scale_grads=False,
    )
    optimizer = adamw(iter(parameters.values()))

    def step(ids: Tensor) -> float:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(ids)
        else:
            schedule.step(target=ids, losses=losses)
        optimizer.step()
        return float(sum(losses).detach()) if losses else 0.0  # type: ignore[union-attr]

    return step


def tensor_peer(rank: int) -> Callable[[Tensor], float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = new_model()
    mesh = init_device_mesh("cpu", (2,))
    block = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, block)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    sharded = [p for p in model.parameters() if type(p) is not nn.Parameter or hasattr(p, "placements")]
    plain = [p for p in model.parameters() if not any(p is q for q in sharded)]
    optimizers = [adamw(iter(ps)) for ps in (sharded, plain) if ps]

    def step(ids: Tensor) -> float:
        for optimizer in optimizers:
            optimizer.zero_grad()
        total = LOSS.total(model(input_ids=ids, use_cache=False).logits, {"labels": ids})
        loss = total / (BATCH * (SEQUENCE - 1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return float(loss.detach())

    return step


PIPELINE_CUT = 5  # embedding and four blocks | four blocks and the head


def peer_process(rank: int, kind: str, port: int, pipe: Connection) -> None:
    """Serve `run n steps` commands of the parent: answer with step seconds and losses."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    step = {"data": data_peer, "pipeline": pipeline_peer, "tensor": tensor_peer}[kind](rank)
    source = batches()
    while (count := pipe.recv()) > 0:
        results = []
        for _ in range(count):
            ids = next(source)
            dist.barrier()
            began_s = time.perf_counter()
            loss = step(ids)
            dist.barrier()  # a step ends when its last rank ends, as it does for colledge's coordinator
            results.append((time.perf_counter() - began_s, loss))
        pipe.send(results)
    dist.destroy_process_group()


class Peer:
    """Two processes of a peer."""

    def __init__(self, kind: str) -> None:
        context, port = mp.get_context("spawn"), free_port()
        self._pipes, self._processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=peer_process, args=(rank, kind, port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._loss_rank = 1 if kind == "pipeline" else 0

    def run(self, steps: int) -> list[tuple[float, float]]:
        for pipe in self._pipes:
            pipe.send(steps)
        answers = [pipe.recv() for pipe in self._pipes]
        seconds = [max(a[0], b[0]) for a, b in zip(*answers, strict=True)]
        return [(s, answer[1]) for s, answer in zip(seconds, answers[self._loss_rank], strict=True)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join(20)


# -- colledge ------------------------------------------------------------------------------------------------------


def plan_of(kind: str, num_layers: int) -> Plan:
    def shard(device: str, fraction: float = 1.0) -> dict[str, object]:
        return {"device": device, "fraction": fraction}

    def replica(samples: int, *shards: dict[str, object]) -> dict[str, object]:
        return {"samples": samples, "shards": shards}

    size = MICROBATCH if kind == "pipeline" else BATCH
    whole = [0, num_layers]
    stages = {
        "data": [
            {"layers": whole, "replicas": [replica(size // 2, shard("d0")), replica(size // 2, shard("d1"))]}
        ],
        "tensor": [{"layers": whole, "replicas": [replica(size, shard("d0", 0.5), shard("d1", 0.5))]}],
        "pipeline": [
            {"layers": [0, PIPELINE_CUT], "replicas": [replica(size, shard("d0"))]},
            {"layers": [PIPELINE_CUT, num_layers], "replicas": [replica(size, shard("d1"))]},
        ],
    }
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": num_layers,
            "global_batch_size": BATCH,
            "microbatch_size": size,
            "stages": stages[kind],
        }
    )


class Ours:
    """colledge's engine on two workers."""

    def __init__(self, kind: str, workers: FreshWorkers) -> None:
        layered = HuggingFaceCausalLM(CONFIG.to_dict())
        weights = {name: p.detach() for name, p in new_model().named_parameters()}
        settings = EngineSettings(optimizer=OptimizerSettings(learning_rate=LEARNING_RATE))
        plan = plan_of(kind, len(layered.layer_names))
        self._engine = Engine(plan, layered, weights, settings, workers.ranks, workers.wire)
        self._source = batches()

    def run(self, steps: int) -> list[tuple[float, float]]:
        results = []
        for _ in range(steps):
            ids = next(self._source)
            record = self._engine.train_step(Batch({"input_ids": ids}, {"labels": ids}))
            results.append((record.step_s, record.loss))
        return results

    def close(self) -> None:
        self._engine.close()


def compare(kind: str, workers: FreshWorkers, rounds: int, steps: int) -> dict[str, object]:
    sides = {"colledge": Ours(kind, workers), "peer": Peer(kind)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for round_index in range(rounds + 1):  # the first round warms up
        for name, side in sides.items():
            results = side.run(steps)
            losses[name] = results[-1][1]
            if round_index > 0:
                seconds[name] += [s for s, _ in results[1:]]
    for side in sides.values():
        side.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "kind": kind,
        "peer": PEERS[kind],
        "colledge_s": medians["colledge"],
        "peer_s": medians["peer"],
        "ratio": medians["colledge"] / medians["peer"],
        "steps": len(seconds["colledge"]),
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers = FreshWorkers(2)
    try:
        rows = [compare(kind, workers, arguments.rounds, arguments.steps) for kind in arguments.kinds]
    finally:
        workers.close()
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} CPUs; {BATCH} x {SEQUENCE} tokens a step"
    )
    for row in rows:
        print(
            f"{row['kind']:9s} colledge {row['colledge_s']:.3f} s   {row['peer']} {row['peer_s']:.3f} s   "
            f"ratio {row['ratio']:.3f}   (medians of {row['steps']} steps; last losses {row['losses']})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
