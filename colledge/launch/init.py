"""`colledge init`: a run.yaml and a pool.yaml for this machine, every key explained."""

from __future__ import annotations

from pathlib import Path

import psutil

from colledge.errors import ConfigError
from colledge.records import write_atomically

_RUN = """\
# One training run. Check it with `colledge train run.yaml --dry-run`.
model: ./my-model             # a local Hugging Face directory, or a hub id
data:
  train: corpus.jsonl         # {"text"}, {"prompt", "completion"} or {"messages"} a line; .json, .parquet, .txt too
  sequence_length: 128        # tokens in a row
  # packing: false            # a row for each example, padded or cut; else they are joined
  # loss_on: answers          # learn completions and what the assistant says, read the rest
  # validation_split: 0.05    # or validation: a file; with evaluate_every below
method: full                  # train every parameter; lora: adapters alone, with settings such as
# lora: {rank: 8, alpha: 16, targets: [q_proj, v_proj]}   # blocks: [20, 21] adapts these alone, and then
# activation_cache: {limit: 20 GB}   # computes what lies below them once, not in every epoch
batch: {global_size: 16}      # rows in a step, over all devices
optimizer: {name: adamw, learning_rate: 1.0e-3}   # also sgd; weight_decay, betas, gradient_clipping ...
  # schedule: cosine, warmup_steps: 20: the rate rises, then falls to 0 (linear | cosine; constant stays)
steps: 200
precision: float32            # float64 | float32 | bfloat16
# mixed_precision: bfloat16   # of products only; frozen_precision: bfloat16 halves what lora's frozen weights take
# wire_precision: bfloat16    # of messages between stages: they shrink, and training is no longer exact
seed: 0                       # orders the data; never depends on the plan
pool: pool.yaml
objective: energy             # energy (of the whole pool) | time | energy-delay
# deadline: 8h                # for the whole run; deadline_step: 2 s for one step
# checkpoint_every: 50        # steps; without it only Ctrl-C saves one, the end saves the model
# evaluate_every: 50          # steps between losses on the validation data
# keep_best: true             # save the model of the lowest one; early_stopping: {patience: 3} ends in time
output: out/
"""

_POOL = """\
# The devices that train together. Add one entry for each. Those that a plan leaves out idle, and their watts count.
devices:
  - id: this-machine
    host: local               # or the address of another machine
    accelerator: cpu          # or cuda:0
    threads: {threads}
    memory: {memory_gb:.1f} GB             # what training may use
    power: {{idle_w: 5, compute_w: 20, communicate_w: 8}}   # placeholders: put your own watts here
    # emulate: {{slowdown: 2.5, bandwidth: 100 Mbit/s, latency: 2 ms}}   # rehearse a slower device
# To plan before you buy, list devices of `colledge catalog list` alone, and say what joins them:
#   - {{id: orin, catalog: jetson-orin-nano, mode: 15W}}
# links: [{{between: [orin, other], bandwidth: 1 Gbit/s, latency: 0.3 ms}}]     # segments: a medium that several share
# coordinator: {{address: 192.168.1.10, port: 29500}}   # this machine, as the other devices reach it
"""


def write_examples(directory: Path) -> list[Path]:
    """Write run.yaml and pool.yaml; return their paths.

    Raises:
        ConfigError: One of them is there already; nothing is written then.
    """
    run, pool = directory / "run.yaml", directory / "pool.yaml"
    for path in (run, pool):
        if path.exists():
            raise ConfigError(f"{path}: is there already.", fix="delete it, or name another directory.")
    threads = psutil.cpu_count(logical=False) or 1
    memory_gb = psutil.virtual_memory().available * 0.8 / 1e9
    write_atomically(run, _RUN)
    write_atomically(pool, _POOL.format(threads=threads, memory_gb=memory_gb))
    return [run, pool]
