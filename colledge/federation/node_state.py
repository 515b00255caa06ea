"""What a node keeps on disk between rounds, as one message."""

from __future__ import annotations

from pydantic import JsonValue
from torch import Tensor

from colledge.federation.message import Kind, Message, Payload
from colledge.records import Record

_STRATEGY, _ANSWER = "strategy/", "answer/"  # before the names of tensors
_LONGEST_VALUE = 100


class _Kept(Record):
    node: NodeState
    strategy: dict[str, JsonValue]
    answer: dict[str, JsonValue] | None


class NodeState(Record):
    """Where a node stands, beside its strategy's state and its last answer.

    `part` is where in a round it is, None between rounds; `task` the last one begun: whose, of which round and part.
    `left` are children that left after this was kept, and did not come back; `terms` is what must be the same at a
    restart. A state of round 0 is of a node that has not begun: there is nothing of its strategy to take up.
    """

    terms: dict[str, JsonValue]
    round: int = 0
    part: int | None = None
    finished: bool = False
    task: tuple[str, int, int] | None = None
    children: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def to_message(self, strategy: Payload, answer: Payload | None) -> Message:
        """Return all that a node keeps."""
        kept = _Kept(
            node=self, strategy=dict(strategy.fields), answer=None if answer is None else dict(answer.fields)
        )
        tensors: dict[str, Tensor] = {_STRATEGY + name: tensor for name, tensor in strategy.tensors.items()}
        if answer is not None:
            tensors |= {_ANSWER + name: tensor for name, tensor in answer.tensors.items()}
        return Message(Kind.ANSWER, payload=Payload(kept.model_dump(mode="json"), tensors))

    @staticmethod
    def from_message(message: Message) -> tuple[NodeState, Payload, Payload | None]:
        """Return a node's state, its strategy's, and its last answer.

        Raises:
            MessageError: The message is none that a node kept.
        """
        kept, tensors = message.payload.parse(_Kept), message.payload.tensors

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        answer = None if kept.answer is None else Payload(kept.answer, part(_ANSWER))
        return kept.node, Payload(kept.strategy, part(_STRATEGY)), answer


def difference(before: JsonValue, now: JsonValue, name: str = "") -> str | None:
    """Return a line about the first value that differs, by its path of keys; None where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        found = (difference(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
        return next(filter(None, found), None)
    if before == now:
        return None
    return f"{name} was {str(before)[:_LONGEST_VALUE]}, is {str(now)[:_LONGEST_VALUE]}"


_Kept.model_rebuild()
