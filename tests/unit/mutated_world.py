"""A folder of small whole files of every kind, and colledge's commands run on it within a deadline, in this process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from colledge.launch.cli import main
from colledge.launch.job import Job, OutputFolder
from colledge.launch.run_config import load_pool, load_run
from colledge.launch.saved_model import write_adapter
from colledge.models import HuggingFaceCausalLM
from colledge.parallel.checkpoint import CheckpointState

_HANG_S = 20.0  # of this process's own time, for commands that take a tenth of a second
BARE = re.compile(  # what only those understand who know the code
    r"Traceback|NoneType|object (has no attribute|is not|cannot be)|'(int|str|float|list|dict|bool|tuple)' object|"
    r"unsupported operand|not supported between|argument of type|index out of range|indices must be|unhashable|"
    r"panicked|PanicException|(Key|Type|Index|Attribute|Unbound\w+|Assertion|Recursion)Error|not enough values|"
    r"too many values|takes .* positional|missing \d+ required|unexpected keyword|has no len|must be real number|"
    r"cannot unpack|expected (str|string)(,| or) bytes|maximum recursion|<class |0x[0-9a-f]{6}|\bself\b"
)
OF_TEMPLATES = re.compile(r"chat template refuses these messages \(.*\)")  # in the words of its expressions
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = "what is 3?"


class Hang(BaseException):
    """A command that takes for ever; no `except Exception` stops it."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str


def run(folder: Path, *arguments: str) -> Ended:
    """Run a command of colledge in this process, as its main function does."""
    code: Any = "no exit"
    with (
        redirect_stdout(io.StringIO()) as output,
        redirect_stderr(io.StringIO()) as errors,
        mock.patch.object(sys, "argv", ["colledge", *arguments]),
        _limited(),
    ):
        before = os.getcwd()
        os.chdir(folder)
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except BaseException as fault:  # what a user would see as a traceback
            if isinstance(fault, KeyboardInterrupt):
                raise
            traceback.print_exc(file=errors)
        finally:
            os.chdir(before)
    return Ended(code if isinstance(code, int) else 99, output.getvalue(), errors.getvalue())


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# -- the files -----------------------------------------------------------------------------------------------------

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": "it is " + "x" * n},
        ]
    }
    for n in range(1, 9)
]
_RUN = """\
model: model
data: {train: data.jsonl, sequence_length: 32, packing: false}
batch: {global_size: 4}
optimizer: {name: adamw, learning_rate: 1.0e-3, schedule: linear, warmup_steps: 1}
steps: 4
seed: 3
pool: pool.yaml
output: fresh
"""
_POOL = """\
coordinator: {address: 127.0.0.1, port: 29513}
devices:
  - {id: a, threads: 1, memory: 2 GB, power: {idle_w: 2, compute_w: 8, communicate_w: 4}}
  - {id: b, accelerator: cpu, emulate: {slowdown: 2, bandwidth: 100 Mbit/s, latency: 1 ms}}
"""
_CATALOG_POOL = """\
devices:
  - {id: a, catalog: jetson-orin-nano, memory: 6 GB}
  - {id: b, catalog: raspberry-pi-5}
segments: [{name: wifi, devices: [a, b], bandwidth: 300 Mbit/s, latency: 3 ms}]
"""
_FEDERATION = """\
strategy: {name: fedavg}
rounds: {count: 2, quorum: 0.5, deadline: 10 s}
data: {source: data.jsonl, text: {tokenizer: bytes, sequence_length: 16}, split: {iid: true}, public: 0.1}
models: {small: {architecture: llama, hidden: 8, intermediate: 16, heads: 2, kv_heads: 1, blocks: 1}}
local: {epochs: 1, batch_size: 4, optimizer: {name: sgd, learning_rate: 0.1}}
nodes:
  - {id: cloud, model: small, trainer: pool.yaml}
  - {id: end, count: 2, parent: cloud, model: small, device: raspberry-pi-5, bandwidth: 20 Mbit/s, latency: 5 ms}
seed: 2
output: federation
"""


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        ["what is it? it is"], vocab_size=264, special_tokens=["</s>", "<s>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="</s>", bos_token="<s>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def build(folder: Path) -> Path:
    """Write every file; return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, most in (("model", "1GB"), ("shards", "20KB")):
        model.save_pretrained(folder / name, max_shard_size=most)
        _tokenizer().save_pretrained(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    (folder / "run.yaml").write_text(_RUN)
    (folder / "pool.yaml").write_text(_POOL)
    (folder / "catalog-pool.yaml").write_text(_CATALOG_POOL)
    (folder / "catalog.yaml").write_text(
        _RUN.replace("pool.yaml", "catalog-pool.yaml").replace("fresh", "planned")
    )
    (folder / "federation.yaml").write_text(_FEDERATION)
    shard = {"device": "a", "fraction": 1.0}
    (folder / "plan.json").write_text(
        json.dumps(
            {
                "schema": "colledge/plan/1",
                "num_layers": 4,
                "global_batch_size": 4,
                "microbatch_size": 2,
                "schedule": {"name": "1f1b", "warmup": [2, 1]},
                "stages": [
                    {"layers": [0, 2], "replicas": [{"samples": 2, "shards": [shard]}]},
                    {"layers": [2, 4], "replicas": [{"samples": 2, "shards": [{**shard, "device": "b"}]}]},
                ],
                "recompute": [False, True],
            }
        )
    )
    for command in (["profile", "catalog.yaml"], ["plan", "catalog.yaml"]):
        ended = run(folder, *command)
        assert ended.code == 0, ended.errors
    _write_runs(folder)
    return folder


def _write_runs(folder: Path) -> None:
    """Write what trainings leave: a model, an adapter, or two checkpoints; and figures of each step."""
    planned = json.loads((folder / "planned" / "plan.json").read_text())
    figures = planned["prediction"]["devices"]
    steps = [
        {"step": n, "loss": 5.0 / n, "step_s": 0.5, "tokens": 100, "energy_joules": 7.0, "learning_rate": 1e-3,
         "devices": figures} for n in range(1, 5)
    ]  # fmt: skip
    (folder / "planned" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (folder / "planned" / "outcome.json").write_text(
        json.dumps(
            {
                "schema": "colledge/outcome/1",
                "steps": 4,
                "step": 3,
                "best_loss": 1.5,
                "stopped_early": "it was",
            }
        )
    )
    lora = ["method=lora", "lora.rank=2", "lora.targets=[q_proj, v_proj]"]
    jobs = {"planned": [], "trained": [], "stopped": [], "adapted": lora}
    for name, overrides in jobs.items():
        source = "catalog.yaml" if name == "planned" else "run.yaml"
        made = load_run(folder / source, [*overrides, f"output={folder / name}"])
        pool = load_pool(made.pool)
        output = OutputFolder(folder / name)
        output.create()
        job = Job(
            kind="train", run=made, pool=pool, model=folder / "model", devices=("a", "b"), output=folder / name,
        )  # fmt: skip
        output.job.write_text(job.to_json())
        if name == "adapted":
            assert made.adapters is not None
            adapted = HuggingFaceCausalLM.from_directory(folder / "model", made.adapters, probe=False)
            values = {key: torch.randn(shape) for key, shape in adapted.adapter_shapes.items()}
            write_adapter([values], made.adapters, str(folder / "model"), folder / "model", output.adapter)
    shutil.copytree(folder / "model", folder / "trained" / "model")
    plain = HuggingFaceCausalLM.from_directory(folder / "model", probe=False)
    weights = load_file(folder / "model" / "model.safetensors")
    for step in (2, 4):
        checkpoint = folder / "stopped" / f"checkpoint-{step}"
        checkpoint.mkdir()
        digests = {}
        for index, name in enumerate(plain.layer_names):
            path = checkpoint / f"{name}.safetensors"
            save_file({key: weights[key] + step for key in plain.layer_parameters(index)}, path)
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        state = CheckpointState(step=step, seed=3, validation={step: 2.5}, files=digests)
        (checkpoint / "state.json").write_text(state.to_json())
