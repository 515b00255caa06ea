"""How much sooner training ends with an activation cache, filling it counted.

    OMP_NUM_THREADS=1 python benchmarks/activation_cache.py [--trials 3] [--json]

Two devices fine-tune the last blocks of a Llama of 8 blocks by data parallelism, with a cache and without, in turn;
ratios are of medians over the trials.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from colledge.data import Tokens, rows_for_step, rows_of
from colledge.data.text.rows import joined
from colledge.launch.caching import numbered
from colledge.models import HuggingFaceCausalLM
from colledge.models.lora import StartingValues
from colledge.parallel import Engine, EngineSettings
from colledge.parallel.caching import ActivationCaches, rows_read
from colledge.plan import Plan
from colledge.settings import LoraSettings, OptimizerSettings
from tests.multiproc.workers import FreshWorkers

ROWS, SEQUENCE, BATCH, BLOCKS, WIDTH = 64, 128, 16, 8, 256
EPOCHS = (1, 3, 10)
CONFIG = LlamaConfig(
    vocab_size=2000,
    hidden_size=WIDTH,
    intermediate_size=640,
    num_hidden_layers=BLOCKS,
    num_attention_heads=8,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
)
SETTINGS = EngineSettings(optimizer=OptimizerSettings(learning_rate=1e-3))


def plan(first: int, last: int) -> Plan:
    """Return the plan of some layers over two devices, half of the rows each."""
    replicas = [{"samples": BATCH // 2, "shards": [{"device": d}]} for d in ("d0", "d1")]
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": BLOCKS + 2,
            "layers": (first, last),
            "global_batch_size": BATCH,
            "microbatch_size": BATCH,
            "stages": [{"layers": (first, last), "replicas": replicas}],
        }
    )


class Setting:
    """A model of which the last blocks train, and its data, on running workers."""

    def __init__(self, trained: int, workers: FreshWorkers) -> None:
        lora = LoraSettings(
            rank=8, targets=("q_proj", "v_proj"), blocks=tuple(range(BLOCKS - trained, BLOCKS))
        )
        self.model, self.workers = HuggingFaceCausalLM(CONFIG.to_dict(), lora), workers
        torch.manual_seed(0)
        weights = {n: p.detach() for n, p in AutoModelForCausalLM.from_config(CONFIG).named_parameters()}
        self.weights = StartingValues(weights, self.model.adapter_shapes, seed=0)
        ids = torch.randint(CONFIG.vocab_size, (ROWS, SEQUENCE))
        self.rows = rows_of(joined(Tokens("a row", row.numpy()) for row in ids), SEQUENCE, 0, packing=False)

    def engine(self, first: int, last: int) -> Engine:
        ranks, wire = self.workers.ranks, self.workers.wire
        return Engine(plan(first, last), self.model, self.weights, SETTINGS, ranks, wire)

    def batches(self, epochs: int) -> list[Tensor]:
        return [rows_for_step(ROWS, BATCH, 0, step) for step in range(epochs * ROWS // BATCH)]

    def seconds(self, epochs: int, cached: bool) -> float:
        """Return what the steps take, and with a cache what filling it takes; not starting and ending."""
        first, last = (self.model.first_trained if cached else 0), BLOCKS + 2
        spent_s = 0.0
        if cached:
            readers = rows_read(plan(first, last), self.batches(epochs))
            key = f"benchmark-{uuid.uuid4().hex}"
            caches = ActivationCaches(
                self.workers.wire,
                self.workers.ranks,
                readers,
                key,
                (SEQUENCE, WIDTH),
                SETTINGS.precision,
                10**9,
                {},
            )
            prefix, missing = self.engine(0, first), caches.open()
            began_s = time.perf_counter()
            list(caches.fill(prefix, missing, lambda rows: numbered(self.rows, rows)))
            spent_s = time.perf_counter() - began_s
            prefix.close()
        engine = self.engine(first, last)
        began_s = time.perf_counter()
        for rows in self.batches(epochs):
            engine.train_step(numbered(self.rows, rows))
        spent_s += time.perf_counter() - began_s
        engine.close()
        if cached:
            caches.close(remove=True)
        return spent_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    workers = FreshWorkers(2)
    for trained in (1, 2, 4):
        setting = Setting(trained, workers)
        setting.seconds(1, cached=True)  # warms up
        for epochs in EPOCHS:
            times: dict[bool, list[float]] = {True: [], False: []}
            for trial in range(given.trials):
                for cached in (True, False) if trial % 2 else (False, True):
                    times[cached].append(setting.seconds(epochs, cached))
            row = {
                "trained_blocks": trained,
                "epochs": epochs,
                "with_s": median(times[True]),
                "without_s": median(times[False]),
                "ratio": median(times[True]) / median(times[False]),
            }
            print(
                json.dumps(row)
                if given.json
                else f"last {trained} of {BLOCKS} blocks, {epochs:2} epochs: with {row['with_s']:.2f} s, "
                f"without {row['without_s']:.2f} s, ratio {row['ratio']:.2f}",
                flush=True,
            )
    workers.close()


if __name__ == "__main__":
    main()
