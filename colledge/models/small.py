"""Small copies of a model, as configurations: the first blocks, few heads of the same width, narrow MLPs, few tokens.

Nothing says which number of a configuration is a size, nor which sizes hang together: a library checks them against
each other, each model's in its own way. So there are several copies to try, the smallest first; what one breaks, a
larger one keeps. What is not known to be a size stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colledge.models.huggingface import HuggingFaceCausalLM

_MLP_WIDTH, _MLP_WIDTHS = 48, ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_MOST = {  # how much there is of what a name that ends so counts
    "lora_rank": 32,
    "linear_head_dim": 32,
    "chunk_size": 16,  # of a scan, which takes whole chunks however short rows are
} | dict.fromkeys(_MLP_WIDTHS, _MLP_WIDTH)
_VOCABULARY = 64
_WIDTHS = ("word_embed_proj_dim", "embedding_dim", "attention_hidden_size")
_HEAD_SHARE = 16  # of the hidden size, where heads have a width of their own
_HEAD_WIDTH = 32  # of a model that names no heads
_KV_HEADS = ("num_kv_heads", "num_key_value_heads")
_MIXER_HEADS = (
    "mamba_n_heads",
    "mamba_num_heads",
    "n_mamba_heads",
    "linear_num_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_DEPTHS = (
    "num_hidden_layers",
    "depth",
    "num_layers",
    "n_layers",
    "num_blocks",
    "encoder_layers",
    "num_global_layers",
)


def small_configs(model: HuggingFaceCausalLM) -> Iterator[dict[str, Any]]:
    """Yield configurations of small copies of a model, smallest first."""
    config: dict[str, Any] = model.config.to_dict()
    text = model.config.get_text_config()
    whole = text is model.config
    key = None if whole else next(name for name, value in vars(model.config).items() if value is text)
    hidden_name = getattr(text, "attribute_map", {}).get("hidden_size", "hidden_size")
    for widths in ("own", "few", "more", "all"):
        small = _small_text(text, model, widths)
        hidden = (getattr(text, hidden_name, None), small.get(hidden_name))
        parts = small if key is None else {name: value for name, value in config.items() if name != key}
        thin = {name: _thin(value, hidden) for name, value in parts.items()}
        yield thin if key is None else thin | {key: small}


def unnumbered(name: str) -> str:
    """Return a parameter's name without the numbers of blocks and experts."""
    return re.sub(r"\d+", "", name)


def _num_blocks(model: HuggingFaceCausalLM, lists: list[list[Any]]) -> int:
    """Return so many blocks that every kind is among the first of them, and more; at least 3 if there are."""
    kinds = []
    for index in range(len(model.layer_names) - 2):
        parameters = model.layer_parameters(index + 1).items()
        shapes = frozenset((name.partition(f".{index}.")[2], shape) for name, shape in parameters)
        kinds.append((shapes, *(str(values[index]) for values in lists)))
    least = min(max(3, 2 + max(map(kinds.index, kinds))), len(kinds))
    # Some libraries set the last block apart: the small copy ends with a block of its kind.
    return next(number for number in range(least, len(kinds) + 1) if kinds[number - 1] == kinds[-1])


def _small_text(text: Any, model: HuggingFaceCausalLM, widths: str) -> dict[str, Any]:
    """Return the configuration of fewer blocks, and, but for `widths` "all", of fewer heads."""
    config: dict[str, Any] = text.to_dict()
    depth = len(model.layer_names) - 2
    lists = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == depth}
    by_block = {name: value for name, value in config.items() if _is_by_block(value)}
    chosen = [[_of_block(value, index) for index in range(depth)] for value in by_block.values()]
    num_blocks = _num_blocks(model, [*lists.values(), *chosen])
    names = getattr(text, "attribute_map", {})
    heads_name = names.get("num_attention_heads", "num_attention_heads")
    small = config | {name: value[:num_blocks] for name, value in lists.items()}
    small |= {n: {k: v for k, v in value.items() if int(k) < num_blocks} for n, value in by_block.items()}
    depth_name = names.get("num_hidden_layers", "num_hidden_layers")
    sublayers = max(getattr(text, depth_name, depth) // depth, 1)  # some count the parts of a block
    small[depth_name] = num_blocks * sublayers
    small |= {name: num_blocks for name in _DEPTHS if config.get(name) == depth}
    hidden_name = names.get("hidden_size", "hidden_size")
    heads, few = _fewer_heads(config, heads_name, hidden_name, widths)
    for name, value in config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        most = next((most for ending, most in _MOST.items() if name.endswith(ending)), None)
        if most is not None:
            small[name] = min(value, most)
        elif name.startswith("vocab_size"):
            small[name] = min(value, _VOCABULARY)
        elif name.endswith("_token_id"):
            small[name] = 0
        elif few == heads:
            continue
        elif name == heads_name:
            small[name] = few
        elif name in _KV_HEADS:
            small[name] = min(value, few if widths == "more" else 2)
        elif name == hidden_name or name in _WIDTHS:
            own = widths == "own" and config.get("head_dim") is not None
            small[name] = _HEAD_SHARE * few if own else value * few // heads
        elif name in _MIXER_HEADS:
            small[name] = max(1, value * few // heads)
    return small


def _fewer_heads(
    config: Mapping[str, Any], heads_name: str, hidden_name: str, widths: str
) -> tuple[int, int]:
    """Return how many heads there are, and how many a small copy has: some for two groups of keys and values."""
    heads, hidden = config.get(heads_name), config.get(hidden_name)
    if heads is None and isinstance(hidden, int):
        heads = hidden // _HEAD_WIDTH  # as many as it could have
    if not isinstance(heads, int) or widths == "all":
        return 1, 1
    found = (config.get(name) for name in _KV_HEADS)
    groups = next((value for value in found if isinstance(value, int) and value > 0), heads)
    few = min(groups, 2) * min(max(heads // groups, 1), 2) * (4 if widths == "more" else 1)
    return heads, min(few, heads)


def _thin(value: Any, hidden: tuple[Any, Any]) -> Any:
    """Return the configuration of a tower that text never runs, with one narrow layer.

    Args:
        value: Of a configuration: not always a tower's.
        hidden: The text's hidden size before and after: what a tower gives to the text is as wide.
    """
    if not isinstance(value, dict):
        return value
    depths = {name: value[name] for name in _DEPTHS if isinstance(value.get(name), int)}
    if not depths:
        return value
    thin = value | dict.fromkeys(depths, 1)
    for name, part in value.items():
        if isinstance(part, list) and len(part) in depths.values():
            thin[name] = part[:1]
        elif _is_by_block(part):
            thin[name] = {key: own for key, own in part.items() if int(key) < 1}
        elif isinstance(part, int) and name.endswith(_MLP_WIDTHS):
            thin[name] = min(part, _MLP_WIDTH)
        elif "out" in name and part == hidden[0]:
            thin[name] = hidden[1]
    return thin


def _is_by_block(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def _of_block(values: Mapping[Any, Any], index: int) -> Any:
    return values.get(index, values.get(str(index)))
