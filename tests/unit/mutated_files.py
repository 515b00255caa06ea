"""One of every file that colledge reads, the commands that read it, and what may become of a damaged one.

A command ends with one clear line, or does what the file says: what it used is held against what the file holds, by
json, yaml, transformers and PEFT.

    python -m tests.unit.mutated_files --count 5000 --seed 9
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.mutated_world import BARE, CHATS, OF_TEMPLATES, PROMPT, Ended, build, run
from tests.unit.mutations import Format, mutate

# -- what may become of them -----------------------------------------------------------------------------------------

_OPTIONAL = ("planned/planning.json", "planned/outcome.json")  # a report goes without them
Check = Callable[[Path, Ended], str | None]  # what a command that went through did wrong, None for nothing


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, the command that reads it, what its faults may name, and what it must do."""

    path: str
    format: Format
    command: tuple[str, ...]
    check: Check
    names: tuple[str, ...] = ()
    probed: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """What a line about the file may name: itself, its folder, or what it is about."""
        path = Path(self.path)
        return (path.name, *self.names, *((str(path.parent),) if len(path.parts) > 1 else ()))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


class _OnceLoader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if len({*map(str, keys)}) < len(keys):
            raise ValueError("a key stands twice")
        return super().construct_mapping(node, deep)


def as_said(path: str, folder: Path, ended: Ended) -> str | None:
    """Hold a file of our own against the strictest reading of it: plain UTF-8, each key once."""
    if path in _OPTIONAL and not (folder / path).exists():
        return None
    text = (folder / path).read_bytes().decode("utf-8")
    if path.endswith(".yaml"):
        value = yaml.load(text, Loader=_OnceLoader)  # a safe one
    else:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_number)
    return None if isinstance(value, dict) else "went through, and the file is no mapping"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def same_report(folder: Path, ended: Ended) -> str | None:
    """Hold a report against metrics.jsonl, read by hand."""
    lines = (folder / "planned" / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    steps = {value["step"]: value for value in map(json.loads, lines)}
    report = json.loads((folder / "planned" / "report.json").read_text())
    first, last = steps[min(steps)], steps[max(steps)]
    if not math.isclose(report["final_loss"], last["loss"], rel_tol=1e-9):
        return f"its final loss is {report['final_loss']}, the file's {last['loss']}"
    if not math.isclose(report["first_loss"], first["loss"], rel_tol=1e-9):
        return f"its first loss is {report['first_loss']}, the file's {first['loss']}"
    return None


def same_count(folder: Path, ended: Ended) -> str | None:
    """Hold the number of examples against the lines of the file, each of which is a chat."""
    lines = [
        line for line in (folder / "data.jsonl").read_text(encoding="utf-8-sig").splitlines() if line.strip()
    ]
    for line in lines:
        value = json.loads(line, object_pairs_hook=_pairs)
        if not isinstance(value, dict):
            return f"took a line that is no object: {line[:80]}"
    seen = re.search(r": ([\d,]+) example", ended.output)
    counted = int(seen[1].replace(",", "")) if seen else 0
    left_out = re.search(r"^([\d,]+) example\(s\) hold no text and were left out", ended.output, re.MULTILINE)
    counted += int(left_out[1]) if left_out else 0
    return None if counted == len(lines) else f"saw {counted} examples, the file has {len(lines)} lines"


def same_text(where: str, folder: Path, ended: Ended) -> str | None:
    """Hold what was generated against transformers', whose weights must all have been in the files."""
    model, loaded = AutoModelForCausalLM.from_pretrained(folder / where, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys"):
        if loaded[what]:
            return f"weights were drawn at random: {what} {sorted(loaded[what])[:2]}"
    if not all(torch.isfinite(tensor).all() for tensor in model.state_dict().values()):
        return "a weight is no number"
    tokenizer = AutoTokenizer.from_pretrained(folder / where)
    return _compare_text(model, tokenizer, ended)


def same_adapted_text(folder: Path, ended: Ended) -> str | None:
    """Hold what was generated with an adapter against PEFT's, all of whose values must have been in the file."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    where = folder / "adapted" / "adapter"
    config = PeftConfig.from_pretrained(where)
    base = AutoModelForCausalLM.from_pretrained(str(config.base_model_name_or_path))
    model = PeftModel.from_pretrained(base, where)
    said = json.loads((where / "adapter_config.json").read_text())
    if not {"r", "lora_alpha", "target_modules"} <= said.keys():
        return "what the adapter is multiplied by is PEFT's default, and not what was trained"
    stored = load_file(where / "adapter_model.safetensors")
    state = get_peft_model_state_dict(model)
    if stored.keys() != state.keys():
        return f"the file has {len(stored)} values, the adapter {len(state)}"
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        return "a value is no number"
    return _compare_text(model, AutoTokenizer.from_pretrained(where), ended)


def _compare_text(model: Any, tokenizer: Any, ended: Ended) -> str | None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        made = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
        )
    wanted = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return None if ended.output == f"{wanted}\n" else f"said {ended.output!r}, transformers {wanted!r}"


def same_weights(source: str, folder: Path, ended: Ended) -> str | None:
    """Hold what was exported against what the file has; transformers must find it whole."""
    stored = load_file(folder / source / "model.safetensors")
    exported, loaded = AutoModelForCausalLM.from_pretrained(folder / "exported", output_loading_info=True)
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        return f"the exported model is not whole: {loaded}"
    for name, tensor in exported.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"{name} is no number"
        if name in stored and not torch.equal(stored[name].to(tensor.dtype), tensor):
            return f"{name} was exported with other values"
    return None


def whole_or_said(folder: Path, ended: Ended) -> str | None:
    """Have a damaged checkpoint named where an older one is taken, and never taken itself."""
    newest = folder / "stopped" / "checkpoint-4"
    said = "checkpoint-4/" in ended.output + ended.errors
    try:
        state = json.loads((newest / "state.json").read_text(), object_pairs_hook=_pairs)
        layers = {path.name for path in (folder / "stopped" / "checkpoint-2").glob("*.safetensors")}
        whole = state["step"] == 4 and layers <= state["files"].keys()
        digests = {name: hashlib.sha256((newest / name).read_bytes()).hexdigest() for name in state["files"]}
        whole = whole and digests == state["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole and not said:
        return "the newest checkpoint is damaged, and an older one was taken without a word"
    if "exported" not in os.listdir(folder):
        return None
    tensor = load_file(folder / "exported" / "model.safetensors")["model.norm.weight"]
    step = 2 if said else 4
    return None if torch.all(tensor == 1 + step) else f"what was exported is not of step {step}"


def loads_whole(where: str, folder: Path, ended: Ended) -> str | None:
    """Have a model that was taken be one that transformers loads with nothing drawn at random."""
    model, loaded = AutoModelForCausalLM.from_pretrained(folder / where, output_loading_info=True)
    for what in ("missing_keys", "mismatched_keys"):
        if loaded[what]:
            return f"{what} {sorted(loaded[what])[:2]}"
    finite = all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    return None if finite else "a weight is no number"


def rendered(where: str, folder: Path, ended: Ended) -> str | None:
    """Have a tokenizer that was taken be one that transformers takes, with a template that renders every chat."""
    tokenizer = AutoTokenizer.from_pretrained(folder / where)
    total = sum(
        len(tokenizer.apply_chat_template(chat["messages"], tokenize=True, return_dict=False))
        for chat in CHATS
    )
    seen = re.search(r"^([\d,]+) tokens", ended.output, re.MULTILINE)
    counted = int(seen[1].replace(",", "")) if seen else None
    return None if counted == total else f"saw {counted} tokens, transformers {total}"


_DRY = ("train", "run.yaml", "--plan", "plan.json", "--dry-run")
_REPORT = ("report", "planned")
_CHECK = ("data", "check", "data.jsonl", "--model", "model")
_EXPORT = ("export", "stopped", "-o", "exported")
_EXPORT_MODEL = ("export", "trained", "-o", "exported")
_PROFILES = (
    *("plan", "--pool-profile", "planned/pool-profile.json", "--global-batch-size", "4"),
    *("--model-profile", "planned/model-profile.json"),
)


def _generate(folder: str) -> tuple[str, ...]:
    return ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", "3")


def _own(path: str, format: Format, command: tuple[str, ...], *names: str) -> Kind:
    return Kind(path, format, command, partial(as_said, path), names)


def _of_model(path: str, format: Format, folder: str = "model", *names: str) -> Kind:
    return Kind(f"{folder}/{path}", format, _generate(folder), partial(same_text, folder), (folder, *names))


RECORDS = (
    _own("run.yaml", "yaml", _DRY, "output", "model", "plan", "data"),
    _own("pool.yaml", "yaml", _DRY, "pool"),
    _own("plan.json", "json", _DRY, "plan"),
    _own("catalog-pool.yaml", "yaml", ("profile", "catalog.yaml", "-o", "again"), "profile", "catalog"),
    _own("planned/pool-profile.json", "json", _PROFILES, "pool", "device", "link", "memory"),
    _own("planned/model-profile.json", "json", _PROFILES, "model", "layer", "memory"),
    _own("planned/plan.json", "json", _REPORT, "plan"),
    _own("planned/planning.json", "json", _REPORT, "plan"),
    _own("planned/job.json", "json", _REPORT, "job"),
    _own("planned/outcome.json", "json", _REPORT, "outcome"),
    Kind("planned/metrics.jsonl", "jsonl", _REPORT, same_report),
    _own(
        "federation.yaml",
        "yaml",
        ("federate", "simulate", "federation.yaml", "--print-commands"),
        "nodes",
        "trainer",
    ),
    Kind("data.jsonl", "jsonl", ("data", "check", "data.jsonl"), same_count),
    Kind("data.jsonl", "jsonl", _CHECK, same_count),
    _own("stopped/job.json", "json", _EXPORT, "job", "model", "pool"),
    Kind("stopped/checkpoint-4/state.json", "json", _EXPORT, whole_or_said, ("checkpoint",)),
    Kind("stopped/checkpoint-4/block.0.safetensors", "safetensors", _EXPORT, whole_or_said, ("checkpoint",)),
)
MODELS = (
    _of_model("config.json", "json"),
    Kind("model/config.json", "json", _DRY, partial(loads_whole, "model"), ("model", "layers"), probed=True),
    _of_model("generation_config.json", "json"),
    _of_model("model.safetensors", "safetensors"),
    Kind("model/model.safetensors", "safetensors", _DRY, partial(loads_whole, "model"), ("model",)),
    _of_model("model.safetensors.index.json", "json", "shards"),
    _of_model("model-00001-of-00003.safetensors", "safetensors", "shards"),
    Kind("model/tokenizer.json", "json", _CHECK, partial(rendered, "model"), ("tokenizer",)),
    Kind("model/tokenizer_config.json", "json", _CHECK, partial(rendered, "model"), ("tokenizer",)),
    _of_model("tokenizer.json", "json", "model", "tokenizer"),
    Kind("model/chat_template.jinja", "text", _CHECK, partial(rendered, "model"), ("chat template",)),
    *(
        Kind(f"adapted/adapter/adapter_{path}", format, _generate("adapted"), same_adapted_text, ("adapter",))
        for path, format in (("config.json", "json"), ("model.safetensors", "safetensors"))
    ),
    Kind(
        "trained/model/model.safetensors",
        "safetensors",
        _EXPORT_MODEL,
        partial(same_weights, "trained/model"),
    ),
    Kind(
        "trained/model/config.json", "json", _EXPORT_MODEL, partial(same_weights, "trained/model"), ("model",)
    ),
)


# -- trials ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What became of one damaged file; `wrong` is None where that is as it should be."""

    kind: Kind
    number: str
    how: str
    refused: bool
    wrong: str | None

    def __str__(self) -> str:
        """Return what a reader needs to see it again."""
        return (
            f"{' '.join(self.kind.command[:2])} < {self.kind.path} [{self.number}, {self.how}]: {self.wrong}"
        )


def judge(kind: Kind, folder: Path, ended: Ended) -> str | None:
    """Return what is wrong with how a command ended, None for nothing."""
    bare = BARE.search(ended.errors) or BARE.search(OF_TEMPLATES.sub("", ended.output))
    if bare is not None or ended.code == 99:
        return f"says {bare[0] if bare else 'nothing'!r}: {ended.errors[-600:]}"
    if ended.code == 0:
        try:
            return kind.check(folder, ended)
        except Exception as fault:  # the file cannot be read as it should, and the command went through
            return f"went through, but: {type(fault).__name__}: {str(fault)[:300]}"
    lines = [line for line in ended.errors.splitlines() if line.startswith("colledge: ")]
    if len(lines) != 1 or " Fix: " not in lines[0] or len(lines[0]) > 1500:
        return f"no clear line: {ended.errors[-600:]!r}"
    if not any(
        word in lines[0] + ended.output for word in kind.words
    ):  # `data check` prints faults before its end
        return f"names none of {kind.words}: {lines[0]}"
    return None


def trial(folder: Path, kind: Kind, number: str) -> Trial:
    """Damage a file, run the command that reads it, and put the file back."""
    generator = random.Random(f"{kind.path} {kind.command} {number}")
    path = folder / kind.path
    whole = path.read_bytes()
    others = [
        (folder / other).read_bytes()
        for other in ("run.yaml", "plan.json", "data.jsonl", "shards/config.json")
    ]
    how, content = mutate(whole, kind.format, others, generator)
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with nullcontext() if kind.probed else mock.patch("colledge.models.huggingface.check_parts"):
            ended = run(folder, *kind.command)
        return Trial(kind, number, how, ended.code != 0, judge(kind, folder, ended))
    finally:
        path.write_bytes(whole)
        for made in ("exported", "again"):
            shutil.rmtree(folder / made, ignore_errors=True)


@contextmanager
def world() -> Iterator[Path]:
    """Give a folder with one of every file, where nothing can be fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("there is no network here")

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with (
        tempfile.TemporaryDirectory() as temporary,
        mock.patch("colledge.launch.inputs.snapshot_download", fetch),
        mock.patch.dict(os.environ, {"COLUMNS": "200", "XDG_CACHE_HOME": f"{temporary}/cache"}),
    ):
        folder = Path(temporary) / "a" / "b" / "files"
        folder.mkdir(parents=True)
        build(folder)
        for kind in (*RECORDS, *MODELS):
            ended = run(folder, *kind.command)
            assert ended.code == 0, f"{kind.path}: {ended.errors}"
            wrong = kind.check(folder, ended)
            assert wrong is None, f"{kind.path}: {wrong}"
            shutil.rmtree(folder / "exported", ignore_errors=True)
        yield folder


def trials(folder: Path, kinds: tuple[Kind, ...], count: int, seed: int) -> Iterator[Trial]:
    """Yield so many trials, dealt to the kinds in turn."""
    for number in range(count):
        yield trial(folder, kinds[number % len(kinds)], f"{seed}.{number}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default="", help="only files whose path contains this")
    arguments = parser.parse_args()
    kinds = tuple(kind for kind in (*RECORDS, *MODELS) if arguments.of in kind.path)
    counts: Counter[str] = Counter()
    with world() as folder:
        for one in trials(folder, kinds, arguments.count, arguments.seed):
            counts["wrong" if one.wrong else "refused" if one.refused else "taken"] += 1
            if one.wrong:
                print(one, flush=True)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))


if __name__ == "__main__":
    _main()
