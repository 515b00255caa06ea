"""The trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from colledge.parallel import Engine
from colledge.records import write_atomically

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack")


def save_model(engine: Engine, source: Path, target: Path) -> None:
    """Write the trained model as a Hugging Face folder: the source's configuration and tokenizer, new weights.

    The folder is written beside its place and renamed into it.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for path in source.iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
        tensors = {name: value for layer in engine.state_dict().values() for name, value in layer.items()}
        path = partial / "model.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(0o644)
        config = json.loads((partial / "config.json").read_text())
        config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        write_atomically(partial / "config.json", json.dumps(config, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
