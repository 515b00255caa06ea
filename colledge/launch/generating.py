"""`colledge generate`: try what a run trained, on this device by transformers, or on the pool by the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colledge.data import Batch, load_tokenizer
from colledge.errors import ColledgeError, ConfigError, ModelError, said_by
from colledge.launch.engine_settings import engine_settings
from colledge.launch.exporting import find_trained
from colledge.launch.inputs import find_model
from colledge.launch.job import Generation, Job, OutputFolder
from colledge.launch.stop import StopRequest
from colledge.models import HuggingFaceCausalLM, ModelWeights, SafetensorsDirectory
from colledge.parallel import Engine, World
from colledge.plan import Plan, read_plan
from colledge.planner.caching import CachePlan
from colledge.records import read_json, write_atomically

_DECIDE_ADAPTERS = (
    "r",
    "lora_alpha",
    "target_modules",
)  # keys of PEFT's that decide what an adapter computes


def _ids(tokenizer: Any, prompt: str, chat: bool, folder: Path) -> Tensor:
    """Return the tokens of a prompt, (1, length)."""
    if chat and not tokenizer.chat_template:
        raise ConfigError(f"{folder}: its tokenizer has no chat template.", fix="leave --chat out.")
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = inputs["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError("the prompt has no tokens.", fix="give some text with --prompt.")
    return ids


# -- on this device ------------------------------------------------------------------------------------------------


def generate(folder: Path, prompt: str, max_new_tokens: int, chat: bool) -> str:
    """Return what a trained model goes on with, always choosing the likeliest token.

    Args:
        folder: A run's output folder, or a model's or an adapter's.
        prompt: The text to go on from, or what a user says.
        max_new_tokens: Tokens at most.
        chat: Whether the prompt goes through the tokenizer's chat template.

    Raises:
        ConfigError: There is no model or adapter, or the tokenizer has no chat template.
        ModelError: It cannot be loaded.
    """
    found = _find(folder)
    adapter = (found / "adapter_config.json").is_file()
    if not adapter:
        _skeleton(found)  # a fault of config.json is said before the tokenizer stumbles over it
    tokenizer: Any = load_tokenizer(found)
    ids = _ids(tokenizer, prompt, chat, found)
    model = _load_adapter(found) if adapter else _load_model(found)
    with _using(found / "generation_config.json"), torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def _find(folder: Path) -> Path:
    """Return the model's or adapter's folder."""
    run = OutputFolder(folder)
    for path, name in (
        (run.adapter, "adapter_config.json"),
        (run.model, "config.json"),
        (folder, "adapter_config.json"),
        (folder, "config.json"),
    ):
        if (path / name).is_file():
            return path
    fix = "write what was trained so far with `colledge export`, or let the run end."
    raise ConfigError(f"{folder}: holds neither a model nor an adapter.", fix=fix)


@contextmanager
def _using(path: Path) -> Iterator[None]:
    """Say in one line, and of which file, what the libraries raise: whatever a malformed one makes of them.

    Raises:
        ModelError: They raised something.
    """
    try:
        yield
    except (ColledgeError, MemoryError):
        raise
    except Exception as fault:  # as above
        fix = "mend it, or write the folder again: export or train."
        raise ModelError(f"{path} cannot be used ({said_by(fault)}).", fix=fix) from None


def _skeleton(folder: Path) -> Any:
    """Return the model of a folder on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _using(folder / "config.json"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_model(folder: Path) -> Any:
    """Return a whole model, every weight of which is on disk: from_pretrained draws at random what it does not find."""
    from transformers import AutoModelForCausalLM

    ModelWeights(folder, _skeleton(folder)).check_values()
    with _using(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()


def _load_adapter(folder: Path) -> Any:
    """Return a model with its adapter; every weight of both is on disk."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / "adapter_config.json"
    with _using(path):
        config: Any = PeftConfig.from_pretrained(str(folder))
        said = json.loads(path.read_text(encoding="utf-8"))
    unsaid = [key for key in _DECIDE_ADAPTERS if hasattr(config, key) and key not in said]
    if unsaid:  # PEFT would take its own default
        raise ModelError(f"{path}: key {unsaid[0]!r} is missing.", fix="use the file as it was saved.")
    stored = SafetensorsDirectory(folder, "adapter_model")
    model = _load_model(_base_of(path, config.base_model_name_or_path))
    with _using(path):
        model = get_peft_model(model, config).eval()
        missing = [name for name in get_peft_model_state_dict(model) if name not in stored]
    with _using(folder / "adapter_model.safetensors"):
        result: Any = set_peft_model_state_dict(model, dict(stored))
    for what, names in (
        ("holds no", missing),
        ("holds what the adapter has no place for:", result.unexpected_keys),
    ):
        if names:
            fix = "use the folder as the run wrote it, or train again."
            raise ModelError(f"{folder}: {what} {', '.join(names[:3])}.", fix=fix)
    return model


def _base_of(path: Path, name: object) -> Path:
    """Return the folder of an adapter's base, which its configuration names."""
    if not name or not isinstance(name, str):
        raise ModelError(
            f"{path}: base_model_name_or_path is {name!r}.",
            fix="write there the folder or hub id of the model that it was trained from.",
        )
    try:
        return find_model(name)
    except ModelError as fault:
        raise ModelError(f"{path}: of its base_model_name_or_path: {fault.message}", fix=fault.fix) from None


# -- on the pool ---------------------------------------------------------------------------------------------------


def pool_job(output: Path, prompt: str, max_new_tokens: int, chat: bool) -> tuple[Job, tuple[str, ...]]:
    """Return the job that generates over the devices that a run trained on, under its plan, and what was passed over.

    Raises:
        ConfigError: The folder is of no run that trained, or the tokenizer has no chat template.
    """
    found = find_trained(output)
    trained = found.job
    _ids(load_tokenizer(trained.model), prompt, chat, trained.model)
    asked = Generation(trained=output.resolve(), prompt=prompt, max_new_tokens=max_new_tokens, chat=chat)
    folder = OutputFolder(OutputFolder(output.resolve()).generation)
    folder.create()
    plan = _whole_plan(OutputFolder(output))
    one = plan.model_copy(update={"global_batch_size": plan.microbatch_size, "prediction": None})
    write_atomically(folder.plan, one.to_json())
    run = trained.run.model_copy(update={"backend": "native", "deepspeed": None})
    changes = {"kind": "generate", "run": run, "output": folder.path, "resume": None, "generation": asked}
    return trained.model_copy(update={**changes, "devices": plan.devices}), found.passed_over


def _whole_plan(trained: OutputFolder) -> Plan:
    """Return a run's plan, or the one of all layers where it trained on cached activations.

    Raises:
        ConfigError: There is no plan of all layers.
    """
    if not trained.cache.is_file():
        return read_plan(trained.plan)
    cache = read_json(CachePlan, trained.cache)
    if cache.uncached is None:
        raise ConfigError(
            f"{trained.path}: the run trained on cached activations, and has no plan of all layers: {cache.why_not}",
            fix="generate without --pool.",
        )
    return cache.uncached


def generate_job(
    job: Job, world: World, ranks: Mapping[str, int], model: HuggingFaceCausalLM, stop: StopRequest
) -> None:
    """Generate over the pool as the coordinator: every token is a forward pass over the whole text."""
    asked, folder = job.generation, OutputFolder(job.output)
    assert asked is not None
    plan = read_plan(folder.plan)
    weights = find_trained(asked.trained).weights()
    engine = Engine(plan, model, weights, engine_settings(job, plan, None), ranks, world.wire)
    tokenizer: Any = load_tokenizer(job.model)
    ids = _ids(tokenizer, asked.prompt, asked.chat, job.model)
    length = ids.shape[1]
    while ids.shape[1] < length + asked.max_new_tokens and not stop.asked:
        logits = engine.forward(Batch({"input_ids": ids}, {"labels": ids}))
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            break
    write_atomically(folder.generated, str(tokenizer.decode(ids[0, length:], skip_special_tokens=True)))
    engine.close()


def read_generated(job: Job) -> str:
    """Return what a job generated."""
    return OutputFolder(job.output).generated.read_text(encoding="utf-8")
