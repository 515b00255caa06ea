"""`colledge generate`: try what a run trained, on this device, with transformers' own generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from colledge.errors import ConfigError, ModelError
from colledge.launch.inputs import load_tokenizer
from colledge.launch.job import OutputFolder


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
    tokenizer: Any = load_tokenizer(found)
    if chat and not tokenizer.chat_template:
        raise ConfigError(f"{found}: its tokenizer has no chat template.", fix="leave --chat out.")
    model = _load(found)
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ConfigError("the prompt has no tokens.", fix="give some text with --prompt.")
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


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


def _load(folder: Path) -> Any:
    adapter = (folder / "adapter_config.json").is_file()
    try:
        if adapter:
            return AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as fault:
        line = " ".join(str(fault).split())[:300]
        raise ModelError(f"{folder} cannot be loaded ({line}).", fix="export or train it again.") from None
