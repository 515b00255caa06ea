"""What nodes of a federation say to each other: plain fields and tensors, as bytes and back, never pickle.

    magic "clg1" | bytes of the JSON | JSON: kind, round, part, fields | tensors, in the safetensors format

A message is read only after its size was checked against the limit; whatever does not parse is one `MessageError`.
Strategies validate `fields` and the tensors' shapes (`Payload.parse`), since a peer can be wrong or hostile.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from colledge.errors import ColledgeError, one_line
from colledge.records import Record, RecordT, describe_validation_error
from colledge.units import format_bytes

DEFAULT_LIMIT_BYTES = 2 * 1024**3
_MAGIC = b"clg1"
_HEADER = struct.Struct("<4sQ")
_MOST_JSON_BYTES = 16 * 1024**2
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MessageError(ColledgeError):
    """Bytes or a payload that are not what was agreed; the peer's message is dropped, the run goes on."""

    exit_code = 4


class Kind(str, Enum):
    """What a message is for."""

    JOIN = "join"  # child to parent: here I am, since this round
    LEAVE = "leave"  # child to parent: do not wait for me
    TASK = "task"  # parent to child: a round's work
    ANSWER = "answer"  # child to parent: what came of it
    STOP = "stop"  # parent to child: there are no more rounds


@dataclass(frozen=True)
class Payload:
    """What a strategy sends: JSON fields, and tensors by name. Fields and tensors are never mixed."""

    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def parse(self, record: type[RecordT]) -> RecordT:
        """Return the fields as a record.

        Raises:
            MessageError: A field is missing, unknown or malformed.
        """
        try:
            return record.model_validate(self.fields)
        except ValidationError as fault:
            raise MessageError(f"a malformed payload: {describe_validation_error(fault)}") from None

    def tensor(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of an agreed shape, whose numbers are finite; None is any length, or any precision.

        Raises:
            MessageError: It is missing or something else.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise MessageError(f"a malformed payload: tensor {name!r} is missing.")
        fits = tensor.dim() == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.dtype not in (_FLOATS if dtype is None else (dtype,)):
            wanted = ["any" if size is None else size for size in shape]
            raise MessageError(
                f"a malformed payload: tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, wanted {wanted}"
                f" {'numbers with a fraction' if dtype is None else dtype}."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise MessageError(f"a malformed payload: tensor {name!r} holds NaN or infinity.")
        return tensor


@dataclass(frozen=True)
class Message:
    """One message. `round` and `part` are the sender's parent's count, by which an answer finds its task."""

    kind: Kind
    round: int = 0
    part: int = 0
    payload: Payload = Payload()


class _Envelope(Record):
    schema_tag: Literal["colledge/message/1"] = Field(default="colledge/message/1", alias="schema")
    kind: Kind
    round: int = Field(ge=0, le=10**9)
    part: int = Field(ge=0, le=10**9)
    fields: dict[str, JsonValue]


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    envelope = _Envelope(
        kind=message.kind, round=message.round, part=message.part, fields=dict(message.payload.fields)
    )
    text = envelope.model_dump_json().encode()
    tensors, seen = {}, set()
    for name, tensor in message.payload.tensors.items():
        tensors[name] = tensor.detach().cpu().contiguous()
        if (storage := tensors[name].untyped_storage().data_ptr()) in seen:
            tensors[name] = tensors[name].clone()  # safetensors refuses what shares memory
        seen.add(storage)
    return _HEADER.pack(_MAGIC, len(text)) + text + (save(tensors) if tensors else b"")


def decode(data: bytes, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Message:
    """Return the message in some bytes.

    Raises:
        MessageError: They are too many, or no message.
    """
    if len(data) > limit_bytes:
        raise MessageError(
            f"a message of {format_bytes(len(data))}, the limit is {format_bytes(limit_bytes)}.",
            fix="raise message_limit in federation.yaml, if the peer is right.",
        )
    try:
        magic, length = _HEADER.unpack_from(data)
        if magic != _MAGIC or length > min(len(data) - _HEADER.size, _MOST_JSON_BYTES):
            raise MessageError("bytes that are no message of colledge's.")
        body = _HEADER.size + length
        value: Any = json.loads(data[_HEADER.size : body])
        envelope = _Envelope.model_validate(value)
        tensors = load(data[body:]) if len(data) > body else {}
    except (struct.error, ValueError, KeyError, RecursionError, SafetensorError) as fault:
        raise MessageError(
            f"bytes that are no message of colledge's ({one_line(fault, most=120)})."
        ) from None
    return Message(envelope.kind, envelope.round, envelope.part, Payload(envelope.fields, tensors))
