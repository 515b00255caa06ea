"""A hybrid plan gives the loss curve of Hugging Face's Trainer: the same data, schedule, decay and clipping."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from colledge.data import Rows, Tokens, rows_for_step, rows_of
from colledge.data.text.rows import joined
from colledge.launch.learning_rate import learning_rates
from colledge.models import HuggingFaceCausalLM
from colledge.models.lora import StartingValues, peft_config, peft_name
from colledge.parallel import Engine, EngineSettings, OptimizerSettings
from colledge.plan import Plan
from colledge.settings import LoraSettings
from tests import forked
from tests.multiproc.workers import Workers

NUM_STEPS, BATCH_SIZE, SEQUENCE, SEED = 50, 8, 12, 3
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=46,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=3,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OPTIMIZER = OptimizerSettings(
    learning_rate=1e-2, schedule="cosine", warmup_steps=5, weight_decay=0.1, gradient_clipping=0.5
)
METHODS = {"full": None, "lora": LoraSettings(rank=4, targets="all-linear")}
PLAN = Plan.model_validate(
    {
        "schema": "colledge/plan/1",
        "num_layers": 5,
        "global_batch_size": BATCH_SIZE,
        "microbatch_size": 4,
        "stages": [
            {
                "layers": [0, 2],
                "replicas": [
                    {
                        "samples": 4,
                        "shards": [{"device": "d0", "fraction": 0.75}, {"device": "d1", "fraction": 0.25}],
                    }
                ],
            },
            {
                "layers": [2, 5],
                "replicas": [
                    {"samples": 3, "shards": [{"device": "d2", "fraction": 1.0}]},
                    {"samples": 1, "shards": [{"device": "d3", "fraction": 1.0}]},
                ],
            },
        ],
    }
)


def rows() -> Rows:
    """Thirty rows of counting, of unequal lengths, whose first tokens are often not learnt."""
    generator = torch.Generator().manual_seed(0)
    begin = torch.randint(3, 40, (30, 1), generator=generator)
    stride = torch.randint(1, 3, (30, 1), generator=generator)
    lengths = torch.randint(6, SEQUENCE + 1, (30,), generator=generator)
    prompts = torch.randint(0, 5, (30, 1), generator=generator)
    positions = torch.arange(SEQUENCE)
    ids = ((begin + positions * stride) % 58 + 3).masked_fill(positions >= lengths[:, None], 0)
    learnt = positions >= prompts
    tokens = (
        Tokens("a row", i[:n].numpy(), m[:n].numpy()) for i, n, m in zip(ids, lengths, learnt, strict=True)
    )
    return rows_of(joined(tokens), SEQUENCE, 0, packing=False)


def start_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="sdpa")


def starting_values(lora: LoraSettings | None) -> tuple[HuggingFaceCausalLM, StartingValues]:
    structure = HuggingFaceCausalLM(CONFIG.to_dict(), lora)
    weights = {name: p.detach() for name, p in start_model().named_parameters()}
    return structure, StartingValues(weights, structure.adapter_shapes, SEED)


def trained_model(lora: LoraSettings | None) -> Any:
    """Return the library's model, with PEFT's adapters where asked for, at the values that colledge begins with."""
    model = start_model()
    if lora is None:
        return model
    structure, values = starting_values(lora)
    adapted = get_peft_model(model, peft_config(lora))
    state = {peft_name(name): values[name] for name in structure.adapter_shapes}
    assert not set_peft_model_state_dict(adapted, state).unexpected_keys
    return adapted


def trainer_losses(data: Rows, folder: str, lora: LoraSettings | None) -> list[float]:
    """Train with Trainer, each step in two accumulated halves, on colledge's order of rows."""
    order = torch.cat([rows_for_step(data.num_rows, BATCH_SIZE, SEED, step) for step in range(NUM_STEPS)])
    batch = data.batch(order)
    columns: dict[str, Tensor] = {**batch.inputs, **batch.targets}
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH_SIZE // 2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type=OPTIMIZER.schedule,
        warmup_steps=OPTIMIZER.warmup_steps,
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.betas[0],
        adam_beta2=OPTIMIZER.betas[1],
        adam_epsilon=OPTIMIZER.eps,
        max_grad_norm=OPTIMIZER.gradient_clipping or 0.0,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset: Any = [{name: column[row] for name, column in columns.items()} for row in range(len(order))]
    trainer = Trainer(model=trained_model(lora), args=arguments, train_dataset=dataset)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def print_trainer_losses(folder: str) -> None:
    print(json.dumps({name: trainer_losses(rows(), folder, lora) for name, lora in METHODS.items()}))


def colledge_losses(data: Rows, lora: LoraSettings | None, workers: Workers) -> list[float]:
    model, weights = starting_values(lora)
    engine = Engine(PLAN, model, weights, EngineSettings(OPTIMIZER), workers.ranks, workers.wire)
    losses = []
    for rate in learning_rates(OPTIMIZER, NUM_STEPS):
        indices = rows_for_step(data.num_rows, BATCH_SIZE, SEED, engine.step)
        losses.append(engine.train_step(data.batch(indices), rate).loss)
    engine.close()
    return losses


def test_a_hybrid_plan_gives_the_loss_curve_of_trainer(workers: Workers, tmp_path: Path) -> None:
    world = {
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }  # in it Trainer would look for peers of its own
    alone = {name: value for name, value in os.environ.items() if name not in world}
    finished = forked.run(print_trainer_losses, str(tmp_path), timeout_s=120, environment=alone)
    assert finished.returncode == 0, finished.stderr
    theirs = json.loads(finished.stdout.splitlines()[-1])
    for method, lora in METHODS.items():
        assert len(theirs[method]) == NUM_STEPS
        learnt = 0.5 if lora is None else 0.95  # adapters of random weights have less to work with
        assert theirs[method][-1] < learnt * theirs[method][0]
        assert colledge_losses(rows(), lora, workers) == pytest.approx(theirs[method], rel=0, abs=1e-4), (
            method
        )
