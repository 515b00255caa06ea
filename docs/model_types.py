"""Write docs/model-types.md: of every causal model type of the installed transformers, whether colledge trains it.

    make model-types                    all of them, some minutes
    python docs/model_types.py llama    some of them, printed

Each type is taken with the configuration that transformers has for it; a small copy with random weights is cut after
every layer, and its shards are summed, as for a model that is opened (colledge/models/probe.py): every boundary and
gradient must be the library's, bit for bit. Where transformers' own defaults make no model, or one that its kernels do
not take, sizes that they leave open are filled in, and experts' widths are rounded up.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from textwrap import shorten
from typing import Any

PAGE = Path(__file__).with_name("model-types.md")
LIMIT_S = 300.0
AT_ONCE = 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NO_MODEL = "transformers' defaults make no model"
# What configurations leave open, and transformers fills in for published models alone.
_OPEN: dict[str, Any] = {
    "head_dim": 64,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# What the code of one type reads, its configuration has no default for, and its published models give.
_OPEN_OF: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8}},
}


def types() -> list[str]:
    """Return the causal model types, but for encoders and encoder-decoders, which are no decoder-only models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def outcome(kind: str) -> str:
    """Return "exact", or why a type is refused, in one line."""
    import torch
    from transformers import CONFIG_MAPPING

    from colledge.errors import ColledgeError
    from colledge.models import HuggingFaceCausalLM

    torch.set_num_threads(1)
    said = ""
    for fill in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = CONFIG_MAPPING[kind](**(_OPEN_OF.get(kind, {}) if fill else {}))
                if fill:
                    _fill(config.get_text_config())
                config.save_pretrained(folder)
            except Exception as fault:  # whatever a type's defaults raise: there is no model to try
                return said or f"{_NO_MODEL} ({_line(fault)})"
            try:
                HuggingFaceCausalLM.from_directory(Path(folder))
                return "exact"
            except ColledgeError as fault:
                found = _line(fault).replace(folder, kind)
                if "no causal language model" in found:
                    found = f"{_NO_MODEL} ({found.partition('(')[2]}"
                if not said or said.startswith(_NO_MODEL):
                    said = found
            except Exception as fault:  # a fault of ours, which the table shows
                said = f"fails ({type(fault).__name__}: {_line(fault)})"
    return said


def _fill(config: Any) -> None:
    """Give a configuration what it leaves open."""
    left_open = _OPEN | {
        "num_key_value_heads": getattr(config, "num_attention_heads", None),
        "layer_types": ["full_attention"] * getattr(config, "num_hidden_layers", 0),
    }
    for name, value in left_open.items():
        if getattr(config, name, value) is None:
            setattr(config, name, value)
    for name, value in config.to_dict().items():
        if name.endswith("moe_intermediate_size") and isinstance(value, int):
            setattr(config, name, -(-value // 16) * 16)  # the library's product of experts takes no others


def _line(fault: Exception) -> str:
    said = str(getattr(fault, "message", fault)).replace("|", "/")
    return shorten(said.rstrip("."), 300, placeholder=" ...")


def _tell(kind: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    pipe.send(outcome(kind))


def outcomes(kinds: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each type with its outcome, as they come; a process each, which may take some minutes at most."""
    spawn = multiprocessing.get_context("fork")
    waiting, running = list(kinds), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            kind = waiting.pop(0)
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_tell, args=(kind, theirs))
            process.start()
            theirs.close()
            running[kind] = (process, ours, time.monotonic())
        for kind, (process, ours, began_s) in list(running.items()):
            if ours.poll(0.05):
                try:
                    said = ours.recv()
                except EOFError:
                    said = "not known: the process that tried it died"
            elif time.monotonic() - began_s > LIMIT_S:
                said = f"not known: it took more than {LIMIT_S:.0f} s"
                process.kill()
            else:
                continue
            process.join()
            del running[kind]
            yield kind, said


def page(found: dict[str, str]) -> str:
    """Return the page."""
    import torch
    import transformers

    other = sorted(kind for kind, said in found.items() if "decoder-only" in said)
    none = sorted((kind, said) for kind, said in found.items() if said.startswith(_NO_MODEL))
    own = {kind: said for kind, said in found.items() if kind not in (*other, *dict(none))}
    exact = sorted(kind for kind, said in own.items() if said == "exact")
    refused = sorted((kind, said) for kind, said in own.items() if said != "exact")
    lines = [
        "# Model types",
        "",
        f"Of the {len(own)} decoder-only causal model types of transformers {transformers.__version__} (torch "
        f"{torch.__version__.partition('+')[0]}), colledge trains **{len(exact)} ({len(exact) / len(own):.0%})** "
        "exactly: a small copy with random weights, cut after every layer, gives the library's boundaries and "
        "gradients bit for bit. Of the others the table says why not: most are refused when a "
        "model is opened, before any device starts. "
        "Each type has its default configuration; sizes that this leaves open are filled in, and widths of experts "
        "that the library's kernels do not take are rounded up. "
        "Types of which transformers itself makes no model here are not counted: they are listed apart. "
        "`make model-types` writes this page.",
        "",
        "Exact: " + ", ".join(f"`{kind}`" for kind in exact) + ".",
        "",
        "| refused | why |",
        "|---|---|",
        *(f"| `{kind}` | {said} |" for kind, said in refused),
        "",
        "Not counted, as transformers' own defaults make no model, even with the sizes that they leave open "
        "filled in; a published model of such a type may well train, and is tried when it is opened:",
        "",
        "| no model | why |",
        "|---|---|",
        *(f"| `{kind}` | {said.removeprefix(_NO_MODEL).strip(' ()')} |" for kind, said in none),
        "",
        "No decoder-only models, and refused as such: " + ", ".join(f"`{kind}`" for kind in other) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the page, or print some types."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # once, for all processes

    import colledge.models  # noqa: F401

    transformers.logging.set_verbosity_error()
    found = {}
    for kind, said in outcomes(sys.argv[1:] or types()):
        found[kind] = said
        print(f"{kind}: {said}", flush=True)
    print(Counter("exact" if said == "exact" else "refused" for said in found.values()))
    if not sys.argv[1:]:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
