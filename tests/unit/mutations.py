"""Ways to damage a file: of bytes, of text, of what JSON and YAML say, and of tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load, save

Format = Literal["json", "yaml", "jsonl", "text", "safetensors"]
Mutated = bytes | None  # None: the file is gone
Mutator = Callable[[bytes, random.Random], bytes]

_DEEP: Any = 0
for _ in range(300):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x",
    "../..", "a" * 5000, "\ud800", "null", "1", [], {}, [None], {"a": None}, [[1, 2], [3]], _DEEP,
)  # fmt: skip


# -- bytes ---------------------------------------------------------------------------------------------------------


def flip(content: bytes, random: random.Random) -> bytes:
    """Change one bit."""
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]


def cut_out(content: bytes, random: random.Random) -> bytes:
    """Take some bytes out."""
    at = random.randrange(len(content))
    return content[:at] + content[at + random.choice((1, 1, 7, 100)) :]


def put_in(content: bytes, random: random.Random) -> bytes:
    """Put some bytes in."""
    at = random.randrange(len(content))
    return content[:at] + random.choice((b"\0", b"\xff\xfe", b"}", b'"', b"\n", b"{{ x }}")) + content[at:]


def truncate(content: bytes, random: random.Random) -> bytes:
    """Keep the beginning."""
    return content[: random.randrange(len(content))]


def empty(content: bytes, random: random.Random) -> bytes:
    """Keep nothing, or blanks."""
    return random.choice((b"", b" \n", b"\0" * len(content)))


def junk(content: bytes, random: random.Random) -> bytes:
    """Put random bytes in its place."""
    return random.randbytes(random.choice((1, 16, 1000)))


def encode(content: bytes, random: random.Random) -> bytes:
    """Write the text in another encoding."""
    text = content.decode("utf-8", "replace")
    return text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")), "replace")


BYTES: tuple[Mutator, ...] = (flip, cut_out, put_in, truncate, empty, junk, encode)


# -- values --------------------------------------------------------------------------------------------------------


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield value, key
        yield from _places(child)


def change_value(value: Any, random: random.Random) -> Any:
    """Return a value of which one part is of another kind, gone, doubled or called otherwise; changes it in place."""
    places = list(_places(value))
    if not places or random.random() < 0.05:
        return random.choice(VALUES)
    containers = {id(container): container for container, _ in places}  # in their order
    container = random.choice(
        list(containers.values())
    )  # first, so that long lists are not all that is changed
    key = random.choice([key for one, key in places if one is container])
    match random.choice(("retype", "retype", "retype", "delete", "rename", "swap", "scale")):
        case "retype":
            container[key] = random.choice(VALUES)
        case "delete":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[random.choice((f"{key}x", "", f"_{key}", str(key).upper()))] = container.pop(key)
        case "swap":
            other, its = random.choice(places)
            container[key] = other[its] if not _holds(other[its], container) else None
        case "scale" if isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] = container[key] * random.choice((2, -1, 0.5, 1000))
        case _:
            container[key] = [container[key]]
    return value


def _holds(value: Any, container: Any) -> bool:
    return value is container or any(child[key] is container for child, key in _places(value))


def double_key(text: str, random: random.Random) -> str:
    """Return JSON or YAML in which a line with a key stands twice, the second time with another value."""
    lines = text.split("\n")
    keyed = [number for number, line in enumerate(lines) if ": " in line]
    if not keyed:
        return text + text
    at = random.choice(keyed)
    key = lines[at].partition(": ")[0]
    comma = "," if lines[at].rstrip().endswith(",") or "{" in text[:2] else ""
    return "\n".join([*lines[:at], f"{key}: {json.dumps(random.choice(VALUES[:8]))}{comma}", *lines[at:]])


def change_json(content: bytes, random: random.Random) -> bytes:
    """Change what a JSON file says; now and then a key stands twice."""
    value = json.loads(content)
    if random.random() < 0.08:
        return double_key(json.dumps(value, indent=1), random).encode()
    return json.dumps(change_value(value, random), indent=1).encode("utf-8", "surrogatepass")


def change_yaml(content: bytes, random: random.Random) -> bytes:
    """Change what a YAML file says; now and then a key stands twice, or there are anchors and tags."""
    value = yaml.safe_load(content)
    kind = random.random()
    if kind < 0.08:
        return double_key(yaml.safe_dump(value), random).encode()
    if kind < 0.12:
        return content + random.choice(
            (
                b"\nx: !!python/object/apply:os.getcwd []\n",
                b"\nx: *none\n",
                b"\n- a\n",
                b"\n\tx: 1\n",
                b"\n---\na: 1\n",
            )
        )
    return yaml.dump(change_value(value, random), allow_unicode=False).encode("utf-8", "surrogatepass")


def change_line(content: bytes, random: random.Random) -> bytes:
    """Change, double or drop a line of JSON."""
    lines = content.splitlines()
    at = random.randrange(len(lines))
    match random.choice(("change", "change", "change", "drop", "double", "join")):
        case "change":
            lines[at] = json.dumps(change_value(json.loads(lines[at]), random)).encode(
                "utf-8", "surrogatepass"
            )
        case "drop":
            del lines[at]
        case "double":
            lines.insert(at, lines[at])
        case _:
            lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    return b"\n".join(lines) + b"\n"


_OF_TEMPLATES = (
    "{% for %}", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[99].content }}", "{{", "}}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{{ messages + 1 }}", "{% include 'x' %}", "{% macro %}", "plain",
    "{{ messages.__class__.__mro__ }}", "{{ 'x' | nofilter }}", "{% set messages = 3 %}", "{{ none.a }}",
    "{% if messages is odd %}x{% endif %}", "{{ strftime_now('%Y') }}", "{{ ''.join(messages) }}",
)  # fmt: skip


def change_template(content: bytes, random: random.Random) -> bytes:
    """Put something into a template that fails, or says something else."""
    text = content.decode()
    at = random.choice([0, len(text), *(i for i in range(len(text)) if text.startswith(("{%", "{{"), i))])
    more = random.choice(_OF_TEMPLATES)
    return (text[:at] + more + text[at:]).encode()


# -- tensors -------------------------------------------------------------------------------------------------------


def change_header(content: bytes, random: random.Random) -> bytes:
    """Change what a safetensors file's header says, or how long it says that it is."""
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.2:
        wrong = random.choice((0, 1, length - 1, length + 8, 1 << 40, (1 << 64) - 1))
        return wrong.to_bytes(8, "little") + content[8:]
    header = change_json(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def change_tensors(content: bytes, random: random.Random) -> bytes:
    """Write other tensors in a file that is whole: fewer, more, others, no numbers, or those of other names."""
    tensors = load(content)
    name = random.choice(sorted(tensors))
    tensor = tensors[name]
    match random.choice(("drop", "rename", "reshape", "nan", "type", "more", "values", "swap", "none")):
        case "drop":
            del tensors[name]
        case "rename":
            tensors[random.choice((f"{name}x", f"model.{name}", name.removeprefix("model.") + "_", "x"))] = (
                tensors.pop(name)
            )
        case "reshape":
            tensors[name] = random.choice(
                (tensor.reshape(-1), tensor[:-1].clone(), tensor[None], tensor.reshape(-1)[:0])
            )
        case "nan":
            tensor.view(-1)[random.randrange(tensor.numel())] = random.choice(
                (float("nan"), float("inf"), -float("inf"))
            )
        case "type":
            wanted = random.choice(
                (torch.float16, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8)
            )
            tensors[name] = tensor.to(wanted)
        case "more":
            tensors[random.choice(("x", "model.layers.9.mlp.up_proj.weight", f"{name}.bias"))] = torch.ones(3)
        case "values":
            tensor.view(-1)[random.randrange(tensor.numel())] += 1
        case "swap":
            other = random.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
        case _:
            tensors = {}
    return save(tensors, {"format": "pt"})


OF_FORMAT: dict[Format, tuple[Mutator, ...]] = {
    "json": (change_json,),
    "yaml": (change_yaml,),
    "jsonl": (change_line,),
    "text": (change_template,),
    "safetensors": (change_tensors, change_tensors, change_header),
}


def mutate(content: bytes, format: Format, others: list[bytes], random: random.Random) -> tuple[str, Mutated]:
    """Return what a file holds after it was damaged, and a word for how.

    Args:
        content: Of the file.
        format: Of the content; half of all mutations know it.
        others: What other files hold, one of which may stand in its place.
        random: Decides all.
    """
    kind = random.random()
    if kind < 0.02:
        return "gone", None
    if kind < 0.06:
        return "another file", random.choice(others)
    mutator = random.choice(OF_FORMAT[format] if kind < 0.7 else BYTES)
    return mutator.__name__, mutator(content, random)
