"""Other people's shapes of examples, turned into ours: ShareGPT, Alpaca, prompt and completion as messages.

    {"conversations": [{"from": "human", "value": ...}, ...]}     ShareGPT  ->  {"messages": [...]}
    {"instruction": ..., "input": ..., "output": ...}             Alpaca    ->  {"prompt": ..., "completion": ...}
    {"prompt": [...], "completion": [...]}, of messages  ->  {"messages": [...]}, of which the prompt's are not learnt

What is recognised and not read yet is refused by its own name, so that nobody renames keys until it is learnt wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from colledge.errors import DataError
from colledge.records import kind_of

Entry = dict[str, Any]

SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
PROMPTED = "prompt and completion as messages"

_ROLES = {
    **dict.fromkeys(("system", "user", "assistant", "tool"), None),
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_CALL = "function_call"  # in ShareGPT: the assistant calls a tool, as JSON
_PREFERENCES = ("chosen", "rejected", "preferred_output", "non_preferred_output")
_BOTH = ("chosen", "rejected")  # parts of keys that say so together, such as chosen_response

# The wording of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca), which its models are asked with.
_ALPACA = (
    "Below is an instruction that describes a task{context}. "
    "Write a response that appropriately completes the request."
)
_EMPTY = (
    "history",
    "system",
)  # keys that Alpaca's examples may have, and that are read only where they are empty
_ALPACA_INPUT = ", paired with an input that provides further context"


def canonical(entry: Mapping[str, Any], where: str) -> tuple[Entry, str | None]:
    """Return an entry in one of our own shapes, and the name of the format that it was in, None for ours.

    Args:
        entry: Of a data file; keys that hold null are those that it has not.
        where: File and line, for messages.

    Raises:
        DataError: The entry is of a kind that is not read yet, or a message of it is malformed.
    """
    own: Entry = _without_null(entry)
    _refuse_unread(own, where)
    if "conversations" in own:
        return _sharegpt(own, own["conversations"], where), "ShareGPT"
    if "messages" in own:
        if _is_sharegpt(own["messages"]):
            return _sharegpt(own, own["messages"], where), "ShareGPT"
        return own, None
    if "instruction" in own and "output" in entry and "prompt" not in own:
        return _alpaca(own, where), "Alpaca"
    lists = [key for key in ("prompt", "completion") if isinstance(own.get(key), list)]
    if len(lists) == 2:
        return _joined(own), PROMPTED
    if lists:
        raise DataError(
            f"{where}: key {lists[0]!r} holds a list, wanted a string, or prompt and completion both as messages.",
            fix="write both as text, or both as lists of messages.",
        )
    return own, None


def _without_null(value: Any) -> Any:
    """Return JSON without the keys that hold null, which tables write where a row has no such key, as TRL does."""
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_null(inner) for inner in value]
    return value


def null_arguments(value: Any) -> int:
    """Return how many calls of tools in a JSON value have an argument that is null."""
    if isinstance(value, dict):
        own = value.get("arguments")
        return int(own != _without_null(own)) + sum(map(null_arguments, value.values()))
    return sum(map(null_arguments, value)) if isinstance(value, list) else 0


def _refuse_unread(entry: Entry, where: str) -> None:
    """Refuse what other trainers learn from and this one does not."""
    seen = [key for key in _PREFERENCES if key in entry]
    likely = [[key for key in entry if word in key] for word in _BOTH]
    seen = seen or ([*likely[0], *likely[1]] if all(likely) else [])
    if seen:
        raise DataError(
            f"{where}: preference data ({', '.join(seen)}) are not read yet.",
            fix="write the preferred answers alone, as messages or as prompt and completion.",
        )
    label = entry.get("label")
    answered = "completion" in entry or ("messages" in entry and isinstance(label, bool))
    if answered and label in (0, 1):
        raise DataError(
            f"{where}: KTO's data (answers with a label of true or false) are not read yet.",
            fix="keep the examples whose label is true, without the key.",
        )
    if isinstance(entry.get("completions"), list):
        raise DataError(
            f"{where}: data with several completions of one prompt are not read yet.",
            fix="write one prompt and completion a line.",
        )
    if "input_ids" in entry and not {"text", "prompt", "messages"} & entry.keys():
        raise DataError(f"{where}: tokens (input_ids) are not read.", fix=f"give text: {SHAPES}.")


# -- ShareGPT ----------------------------------------------------------------------------------------------------


def _is_sharegpt(messages: object) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and (
        ("from" in first and "role" not in first) or _ROLES.get(str(first.get("role"))) is not None
    )


def _sharegpt(entry: Entry, turns: object, where: str) -> Entry:
    if not isinstance(turns, list) or not turns:
        seen = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(
            f"{where}: key 'conversations' holds {seen}, wanted a list of turns.",
            fix='write [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}].',
        )
    messages = [_message(turn, f"{where}, conversations[{number}]") for number, turn in enumerate(turns)]
    rest = {key: value for key, value in entry.items() if key not in ("conversations", "messages", "system")}
    twice = [key for key in ("messages", "conversations") if key in entry]
    if len(twice) > 1 or (entry.get("system") and messages[0].get("role") == "system"):
        what = " and ".join(twice) if len(twice) > 1 else "'system' and a first turn of the system"
        raise DataError(f"{where}: has {what}, of which one would be lost.", fix="take one of them out.")
    if entry.get("system"):
        messages.insert(0, {"role": "system", "content": entry["system"]})
    return {**rest, "messages": messages}


def _message(turn: object, where: str) -> Entry:
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        return {**turn, "role": _ROLES.get(str(turn["role"])) or turn["role"]}
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or "value" not in turn:
        seen = ", ".join(map(repr, list(turn)[:8])) if isinstance(turn, dict) else kind_of(turn)
        raise DataError(
            f'{where}: saw {seen}, wanted {{"from": ..., "value": ...}}.',
            fix='write {"from": "human", "value": ...} or {"from": "gpt", "value": ...}.',
        )
    sender, rest = turn["from"], {key: value for key, value in turn.items() if key not in ("from", "value")}
    own = [key for key in ("role", "content", "tool_calls") if key in rest]
    if own:
        raise DataError(
            f"{where}: has 'from' and 'value' and {own[0]!r} too, of which one would be lost.",
            fix=f"take {own[0]!r} out, or write the turn with role and content.",
        )
    if sender == _CALL:
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(turn["value"], where)}
    if sender not in _ROLES:
        raise DataError(
            f"{where}: key 'from' is {sender!r}, wanted one of {', '.join((*_ROLES, _CALL))}.",
            fix="name who speaks with one of these.",
        )
    return {**rest, "role": _ROLES[sender] or sender, "content": turn["value"]}


def _calls(value: object, where: str) -> list[Entry]:
    """Return the calls of tools in a function_call's value, which is JSON."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    calls: list[Any] = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(
            f"{where}: a function_call's value is no call of a tool in JSON.",
            fix='write "{\\"name\\": ..., \\"arguments\\": {...}}".',
        )
    strange = sorted(
        {key for call in calls for key in call} - {"name", "arguments", "parameters", "id", "type"}
    )
    if strange:
        raise DataError(
            f"{where}: a function_call has key {strange[0]!r}, which is not read.",
            fix="write name and arguments.",
        )
    if any("arguments" in call and "parameters" in call for call in calls):
        raise DataError(
            f"{where}: a function_call has 'arguments' and 'parameters', of which one would be lost.",
            fix="take one of them out.",
        )
    return [
        {
            **({"id": call["id"]} if "id" in call else {}),
            "type": "function",
            "function": {
                "name": call["name"],
                "arguments": call.get("arguments", call.get("parameters", {})),
            },
        }
        for call in calls
    ]


# -- Alpaca, and prompts that are chats ----------------------------------------------------------------------------


def _alpaca(entry: Entry, where: str) -> Entry:
    for key in ("instruction", "input", "output"):
        if not isinstance(entry.get(key, "" if key == "input" else None), str):
            raise DataError(
                f"{where}: key {key!r} holds {kind_of(entry.get(key))}, wanted a string.", fix="write text."
            )
    if "completion" in entry:
        raise DataError(
            f"{where}: has 'output' and 'completion', of which one would be lost.",
            fix="take one of them out.",
        )
    for key in _EMPTY:
        if entry.get(key):
            raise DataError(
                f"{where}: Alpaca's examples with {key!r} are not read.",
                fix='write them as {"messages": [...]}.',
            )
    context = entry.get("input", "")
    parts = [
        _ALPACA.format(context=_ALPACA_INPUT if context else ""),
        f"### Instruction:\n{entry['instruction']}",
    ]
    parts += [f"### Input:\n{context}"] if context else []
    rest = {
        key: value for key, value in entry.items() if key not in ("instruction", "input", "output", *_EMPTY)
    }
    return {**rest, "prompt": "\n\n".join([*parts, "### Response:\n"]), "completion": entry["output"]}


def _joined(entry: Entry) -> Entry:
    """Return one chat of a prompt and a completion that are messages."""
    rest = {key: value for key, value in entry.items() if key not in ("prompt", "completion")}
    return {**rest, "messages": [*entry["prompt"], *entry["completion"]]}
