"""`colledge demo`: the whole run on this machine, on data that every machine has.

Three emulated devices of speeds 1, 1/2 and 1/4 train a small Llama with random weights on the source of this
interpreter's standard library, tokenised byte-level.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from colledge.launch import run
from colledge.records import write_atomically

_END = "<|end|>"
_CORPUS_BYTES = 3_000_000

_POOL = """\
# One machine rehearses a pool: speeds 1, 1/2 and 1/4, joined by 1 Gbit/s. Each is at most half as fast as this
# machine, so that two cores can play all three without getting into each other's way.
devices:
  - {id: desktop, threads: 1, memory: 2 GB, power: {idle_w: 15, compute_w: 60, communicate_w: 22},
     emulate: {slowdown: 2, bandwidth: 1 Gbit/s, latency: 0.5 ms}}
  - {id: laptop, threads: 1, memory: 2 GB, power: {idle_w: 4, compute_w: 14, communicate_w: 6},
     emulate: {slowdown: 4, bandwidth: 1 Gbit/s, latency: 0.5 ms}}
  - {id: pi, threads: 1, memory: 1 GB, power: {idle_w: 2.5, compute_w: 6.5, communicate_w: 3.5},
     emulate: {slowdown: 8, bandwidth: 1 Gbit/s, latency: 0.5 ms}}
"""

_RUN = """\
model: model
data: {{train: corpus.jsonl, sequence_length: 64}}
method: full
batch: {{global_size: 8}}
optimizer: {{name: adamw, learning_rate: 7.0e-4, betas: [0.9, 0.95], gradient_clipping: 1.0}}
steps: {steps}
precision: float32
seed: 0
pool: pool.yaml
objective: energy
output: out
"""


def run_demo(directory: Path, steps: int, console: Console) -> None:
    """Make the demo's model, data and files in a directory, then profile, plan, train and report.

    Raises:
        ColledgeError: What ended one of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    texts = standard_library_source(_CORPUS_BYTES)
    console.print(f"corpus: {len(texts)} files of Python's standard library", highlight=False)
    write_atomically(directory / "corpus.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_model(directory / "model", texts)
    write_atomically(directory / "pool.yaml", _POOL)
    write_atomically(directory / "run.yaml", _RUN.format(steps=steps))

    inputs = run.read_inputs(directory / "run.yaml")
    for old in inputs.folder.path.glob("checkpoint-*"):
        shutil.rmtree(old)
    run.profile(inputs, console)
    chosen = run.choose_plan(inputs, None, console)
    run.train(inputs, chosen, console)
    run.show_report(run.report(inputs.folder), inputs.folder, console)


def standard_library_source(max_bytes: int) -> list[str]:
    """Return the text of this interpreter's standard library modules, in order of name, up to a size."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            texts.append(text)
            max_bytes -= len(text)
        if max_bytes <= 0:
            break
    return texts


def make_model(
    directory: Path, texts: list[str], vocabulary: int = 320, hidden_size: int = 256, num_blocks: int = 5
) -> None:
    """Write a Llama with random weights (3.6 million by default) and a byte-level tokenizer trained on the texts."""
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[_END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        eos_token=_END,
        pad_token=_END,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    disable_progress_bar()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
