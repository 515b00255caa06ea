"""Chats as templates write them: what is learnt equals TRL's assistant_only_loss, and nothing is lost in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from colledge.data import read_examples, tokenize
from colledge.data.text.reading.examples import Noticed
from colledge.errors import DataError, ModelError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
CHATS: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "kettle?"},
        {"role": "assistant", "content": "moss"},
        {"role": "user", "content": "lantern"},
        {"role": "assistant", "content": "tide over"},
    ],
    [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four "}],
]
# Where TRL marks more than the answer: the assistant's header, or the line end behind it; and where it loses text.
HEADER_LEARNT = {"deepseek_r1_distill", "deepseekv3", "gptoss", "muse_glimmer", "qwen2_5"}
TEXT_LOST = {"idefics3", "smolvlm", "llava_next"}
TRAINING = sorted(path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja"))
AGENT = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}({{ c.function.arguments }})</call>"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think></think>{% endif %}{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a few special ones; a text gets BOS in front."""
    special = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {
        token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def marked(
    folder: Path,
    tokenizer: Any,
    template: Any,
    *entries: dict[str, Any],
    loss_on: Any = "answers",
    seen: Any = None,
) -> list[str]:
    """Return examples as text; what is learnt stands in [ ]."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    tokenizer.chat_template = template
    shown = []
    for one in tokenize(read_examples(path, noticed=seen), tokenizer, loss_on, noticed=seen):
        text, last = "", False
        mask = one.learnt.tolist() if one.learnt is not None else [False] * len(one.ids)
        for token, learnt in zip(one.ids.tolist(), mask, strict=True):
            text += ("[" if learnt else "]") * (learnt != last) + tokenizer.decode([token])
            last = learnt
        shown.append(text + "]" * last)
    return shown


def ours(
    tokenizer: Any, template: str, folder: Path, chat: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    path = folder / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}), encoding="utf-8")
    tokenizer.chat_template = template
    (one,) = tokenize(read_examples(path), tokenizer, "answers")
    assert one.learnt is not None
    return one.ids.tolist(), one.learnt.astype(int).tolist()


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in TEXT_LOST])
def test_masks_are_those_of_assistant_only_loss(name: str, tokenizer: Any, tmp_path: Path) -> None:
    template = (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    for chat in CHATS:
        encoded = tokenizer.apply_chat_template(
            chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        wanted = encoded["input_ids"], encoded["assistant_masks"]
        assert sum(wanted[1]) > 0
        assert ours(tokenizer, template, tmp_path, chat) == wanted
        unmarked = MARKS.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", template)
        ids, mask = ours(tokenizer, unmarked, tmp_path, chat)  # found without the marks
        assert ids == wanted[0]
        if name in HEADER_LEARNT:
            assert all(a <= b for a, b in zip(mask, wanted[1], strict=True))
            assert sum(mask) < sum(wanted[1])
        else:
            assert mask == wanted[1]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_published_templates_lose_no_answer(path: Path, tokenizer: Any, tmp_path: Path) -> None:
    for chat in CHATS:
        ids, mask = ours(tokenizer, path.read_text(encoding="utf-8"), tmp_path, chat)
        learnt = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if m])
        read = tokenizer.decode([token for token, m in zip(ids, mask, strict=True) if not m])
        for message in chat:
            said = message["content"].strip()
            answer = message["role"] == "assistant"
            assert (said in learnt, said in read) == (answer, not answer)


def test_a_template_that_changes_earlier_turns_is_learnt_as_it_writes_the_whole_chat(
    tokenizer: Any, tmp_path: Path
) -> None:
    (text,) = marked(tmp_path, tokenizer, THINKING, {"messages": CHATS[0]})
    first, second = "<|user|>kettle?<|end|><|assistant|>[moss<|end|>]", "<|user|>lantern<|end|><|assistant|>"
    assert text == f"{first}{second}[<think></think>tide over<|end|>]"


def test_everything_that_a_template_reads_reaches_it(tokenizer: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Bergen"}'}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "wea"}, {"type": "text", "text": "ther?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "ask"},
        {"role": "tool", "content": "rain", "tool_call_id": "7"},
        {"role": "assistant", "content": "It rains."},
    ]
    wanted = (
        "<tools>weather</tools><|user|>weather?<|end|><|assistant|>[<think>ask</think>"
        '<call>weather({"place": "Bergen"})</call><|end|>]<|tool|>rain<|end|><|assistant|>[It rains.<|end|>]'
    )
    seen = Noticed()
    texts = marked(
        tmp_path, tokenizer, AGENT,
        {"messages": chat, "tools": [tool]}, {"messages": chat, "tools": json.dumps([tool])}, seen=seen,
    )  # fmt: skip
    assert texts == [wanted, wanted]
    assert seen.sentences() == ["Keys that are not read: messages' tool_call_id (2)."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, ["messages[1]", "tool_calls"]),
        ({"reasoning_content": "two twos"}, ["messages[1]", "reasoning_content"]),
        ({"thoughts": "two twos"}, ["messages[1]", "thoughts"]),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, ["messages[1]", "image_url", "text"]),
        ({"train": False}, ["messages[1]", "train", "weight: 0"]),
        ({"weight": 0.5}, ["messages[1]", "weight", "0.5", "0 or 1"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_would_be_lost_is_refused_by_name(
    change: dict[str, Any], words: list[str], tokenizer: Any, tmp_path: Path
) -> None:
    chat = [CHATS[1][0], CHATS[1][1] | change]
    for loss_on in ("all", "answers"):
        with pytest.raises(DataError) as error:
            marked(tmp_path, tokenizer, PLAIN, {"messages": chat}, loss_on=loss_on)
        assert all(word in str(error.value) for word in ["line 1", *words])


@pytest.mark.parametrize("key", ["tools", "documents", "images", "system"])
def test_columns_that_no_template_reads_are_refused_or_said(key: str, tokenizer: Any, tmp_path: Path) -> None:
    value = "be kind" if key == "system" else [{"title": "x"}]
    with pytest.raises(DataError, match=f"line 1: key '{key}' is not read"):
        marked(tmp_path, tokenizer, PLAIN, {"messages": CHATS[1], key: value})
    seen = Noticed()
    marked(
        tmp_path, tokenizer, PLAIN, {"messages": CHATS[1], "id": 3}, {"text": "a", "lang": "no"}, seen=seen
    )
    assert seen.sentences() == ["Keys that are not read: id (1), lang (1)."]


def calling(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "abc", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "sky?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Wet."},
    ]


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
SYSTEM = {"role": "system", "content": "two"}


@pytest.mark.parametrize(
    ("template", "entry", "lost"),
    [
        (AGENT.replace("c.function.", "c."), {"messages": calling({"place": "B"})}, "'tool_calls' of messages[1]"),
        (AGENT.replace("({{ c.function.arguments }})", ""), {"messages": calling({"n": 7})}, "'tool_calls'"),
        (
            PLAIN.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            {"messages": calling('{"place": "B"}')},
            "'tool_calls'",
        ),
        (
            PLAIN.replace("{{ m.content }}", "{% if m.reasoning_content %}!{% endif %}{{ m.content }}"),
            {"messages": [CHATS[1][0], CHATS[1][1] | {"thinking": "two"}]},
            "'thinking' of messages[1]",
        ),
        (
            PLAIN.replace("<|{{ m.role }}|>", "{% if m.role != 'system' or not m.content %}<|{{ m.role }}|>")
            .replace("<|end|>{% endfor %}", "<|end|>{% endif %}{% endfor %}"),
            {"messages": [SYSTEM, *CHATS[1]]},
            "'content' of messages[0], whose role is 'system'",
        ),
        ("{% if tools %}!{% endif %}" + PLAIN, {"messages": CHATS[1], "tools": [TOOL]}, "'tools'"),
        ("{% set role = 1 %}" + PLAIN, {"messages": CHATS[1], "system_message": "be kind"}, "'system_message'"),
        (PLAIN, {"messages": [CHATS[1][0], {"role": "assistant", "content": None, "refusal": "no"}]}, "'refusal'"),
        (
            {"default": PLAIN, "rag": PLAIN + "{{ documents }}"},
            {"messages": CHATS[1], "documents": [{"text": "x"}]},
            "'documents'",
        ),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_a_template_only_looks_at_is_lost_and_named(
    template: Any, entry: dict[str, Any], lost: str, tokenizer: Any, tmp_path: Path
) -> None:
    for loss_on in ("all", "answers"):
        with pytest.raises(DataError) as error:
            marked(tmp_path, tokenizer, template, entry, loss_on=loss_on)
        assert lost in str(error.value)


@pytest.mark.parametrize("arguments", [{"place": "B"}, '{"place": "B"}', "{}", {}])
@pytest.mark.parametrize(
    "call",
    [
        "{{ c.function.name + '(' + c.function.arguments + ')' }}",
        "{{ c.function.name }}({{ c.function.arguments | tojson }})",
        "{{ c.function.name }}({{ c.function.arguments }})",
        '{{ c.function.name }}({% raw %}{{% endraw %}{% for k, v in c.function.arguments.items() %}"{{ k }}": "{{ v }}"'
        "{% endfor %}{% raw %}}{% endraw %})",
    ],
    ids=["text", "tojson", "as it is", "items"],
)
def test_arguments_reach_a_template_as_it_takes_them(
    call: str, arguments: Any, tokenizer: Any, tmp_path: Path
) -> None:
    template = AGENT.replace("{{ c.function.name }}({{ c.function.arguments }})", call)
    (text,) = marked(tmp_path, tokenizer, template, {"messages": calling(arguments)})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert f"[<call>weather({written})</call><|end|>]<|tool|>rain" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("m.content", "m.content | upper"),
        ("{% for m in messages %}", "{% for n in messages %}{% set m = n.copy() %}"),
        ("{% for m in messages %}", "{% for m in messages %}{% set m = dict(m, content=m.content) %}"),
        ("{% for m in messages %}", "{% for i in range(messages | length) %}{% set m = messages[i] %}"),
        ("{{ m.content }}", "{{ m.content if loop.last else m.content.split('[/T]')[-1] }}"),
    ],
    ids=["upper", "copy", "dict", "range", "other thinking"],
)
def test_templates_may_change_what_they_write(old: str, new: str, tokenizer: Any, tmp_path: Path) -> None:
    chat = [{**one, "content": one["content"].replace("moss", "[T]hm[/T]moss")} for one in CHATS[0]]
    if "T]" not in new:
        chat = CHATS[0]
    (text,) = marked(tmp_path, tokenizer, THINKING.replace(old, new), {"messages": chat})
    assert text.lower() == (
        "<|user|>kettle?<|end|><|assistant|>[moss<|end|>]<|user|>lantern<|end|><|assistant|>"
        "[<think></think>tide over<|end|>]"
    )


def test_a_template_that_looks_into_texts_is_judged_by_the_texts_themselves(
    tokenizer: Any, tmp_path: Path
) -> None:
    strict = (
        "{% for m in messages %}{% if m.content not in ['two', 'four '] %}{{ 1 // 0 }}{% endif %}{% endfor %}"
    )
    (text,) = marked(tmp_path, tokenizer, strict + PLAIN, {"messages": CHATS[1]})
    assert text == "<|user|>two<|end|><|assistant|>[four <|end|>]"
    with pytest.raises(DataError, match=r"'content' of messages\[0\]"):
        marked(
            tmp_path,
            tokenizer,
            strict + PLAIN.replace("messages %}", "messages[1:] %}", 1),
            {"messages": CHATS[1]},
        )


def test_results_of_tools_are_not_learnt_where_a_template_writes_them_into_an_answer(
    tokenizer: Any, tmp_path: Path
) -> None:
    template = (TEMPLATES / "gemma4_v5.jinja").read_text(encoding="utf-8")
    (text,) = marked(tmp_path, tokenizer, template, {"messages": calling({"place": "B"}), "tools": [TOOL]})
    assert ">]<|tool_response>response:" in text
    assert text.count("[") == 2
    assert "[Wet." in text


def test_what_only_asks_is_not_learnt_and_needs_no_weight(tokenizer: Any, tmp_path: Path) -> None:
    entry = {"prompt": [*CHATS[1], CHATS[1][0]], "completion": [CHATS[1][1] | {"train": True}]}
    seen = Noticed()
    (text,) = marked(tmp_path, tokenizer, PLAIN, entry, seen=seen)
    asked = "<|user|>two<|end|><|assistant|>"
    assert text == f"{asked}four <|end|>{asked}[four <|end|>]"
    assert seen.unread == {"messages' train": 1}
    (text,) = marked(tmp_path, tokenizer, PLAIN, entry, loss_on="all")
    assert "[" not in text


def test_answers_of_weight_zero_are_not_learnt(tokenizer: Any, tmp_path: Path) -> None:
    chat = [CHATS[0][0], CHATS[0][1] | {"weight": 0}, CHATS[0][2], CHATS[0][3] | {"weight": 1}]
    answer = "<|assistant|>moss<|end|><|user|>lantern<|end|><|assistant|>[tide over<|end|>]"
    assert marked(tmp_path, tokenizer, PLAIN, {"messages": chat}) == [f"<|user|>kettle?<|end|>{answer}"]
    own = PLAIN.replace("{{ m.content }}<|end|>", "{% generation %}{{ m.content }}<|end|>{% endgeneration %}")
    assert "[moss" not in marked(tmp_path, tokenizer, own, {"messages": chat})[0]
    with pytest.raises(DataError, match=r"messages\[1\]: key 'weight' is 0, and data.loss_on: all"):
        marked(tmp_path, tokenizer, PLAIN, {"messages": chat}, loss_on="all")


def test_a_chat_may_begin_with_the_assistant(tokenizer: Any, tmp_path: Path) -> None:
    (text,) = marked(tmp_path, tokenizer, PLAIN, {"messages": [{"role": "assistant", "content": "hello"}]})
    assert text == "<|assistant|>[hello<|end|>]"


def test_where_nothing_prompts_an_answer_what_is_learnt_with_it_is_said(
    tokenizer: Any, tmp_path: Path
) -> None:
    headed = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    for template, learnt, said in ((headed, "[<|assistant|>four <|end|>]", 1), (PLAIN, "[four <|end|>]", 0)):
        seen = Noticed()
        (text,) = marked(tmp_path, tokenizer, template, {"messages": CHATS[1]}, seen=seen)
        assert text.endswith(learnt)
        assert seen.unprompted == said
        assert ("writes nothing to prompt an answer" in " ".join(seen.sentences())) == bool(said)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[0]['content'] + 5 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.nothing.at.all }}", "no attribute"),
        ("{% for m in messages %}", "endfor"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages[0].__class__.__mro__ }}", "refuses"),
    ],
)
def test_whatever_a_template_raises_names_the_line(
    template: str, why: str, tokenizer: Any, tmp_path: Path
) -> None:
    for loss_on in ("all", "answers"):
        with pytest.raises(DataError, match="line 1: the chat template") as error:
            marked(tmp_path, tokenizer, template, {"messages": CHATS[1]}, loss_on=loss_on)
        assert why in str(error.value) or "does not write" in str(error.value)


def test_templates_by_name(tokenizer: Any, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    named = {"default": PLAIN, "tool_use": AGENT}
    first, second = marked(
        tmp_path, tokenizer, named, {"messages": CHATS[1]}, {"messages": CHATS[1], "tools": [tool]}
    )
    assert first == "<|user|>two<|end|><|assistant|>[four <|end|>]"
    assert second == f"<tools>weather</tools>{first}"
    with pytest.raises(ModelError, match="other, and none called default"):
        marked(tmp_path, tokenizer, {"other": PLAIN}, {"messages": CHATS[1]})


def test_marks_that_end_on_spaces_that_the_tokenizer_strips(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "kettle", "moss", "lantern", "tide", "user", "assistant", ":"]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    )
    chat = [{**message, "content": message["content"].split()[0].strip("?")} for message in CHATS[0]]
    (text,) = marked(tmp_path, fast, template, {"messages": chat})
    assert text == "user:kettleassistant:[moss]user:lanternassistant:[tide]"


def test_documents_begin_as_the_tokenizer_has_it_and_chats_as_their_template_says(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts = marked(
        tmp_path, tokenizer, PLAIN, {"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": CHATS[1]}
    )
    assert texts[:2] == ["<|bos|>a<|end|>", "<|bos|>b[c<|end|>]"]
    assert not texts[2].startswith("<|bos|>")


RANGE = (
    "{% for i in range(messages|length) %}<|{{ messages[i].role }}|>{% if messages[i].role == 'assistant' %}"
    "{% generation %}{{ messages[i].content }}<|end|>{% endgeneration %}{% else %}{{ messages[i].content }}<|end|>"
    "{% endif %}{% endfor %}"
)
NESTED = (  # what tools answer stands within the assistant's turn
    "{% for m in messages %}{% if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}"
    "{% for t in messages[loop.index0 + 1:] %}{% if t.role != 'tool' %}{% break %}{% endif %}<result>{{ t.content }}"
    "</result>{% endfor %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LATE = (  # writes each message when the next one comes
    "{% set ns = namespace(last=none) %}{% for m in messages %}{% if ns.last %}<|{{ ns.last.role }}|>"
    "{{ ns.last.content }}<|end|>{% endif %}{% set ns.last = m %}{% endfor %}<|{{ ns.last.role }}|>"
    "{{ ns.last.content }}<|end|>{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS_LAST = PLAIN.replace(
    "{{ m.content }}<|end|>",
    "{% if loop.last and m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|end|>{% endif %}",
)


def test_templates_that_hide_who_speaks_are_learnt_right_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    weighted = [CHATS[0][0], CHATS[0][1] | {"weight": 0}, *CHATS[0][2:]]
    with pytest.raises(
        DataError, match=r"does not tell where messages\[1\] stands, which is not to be learnt"
    ):
        marked(tmp_path, tokenizer, RANGE, {"messages": weighted})
    assert marked(tmp_path, tokenizer, RANGE, {"messages": CHATS[1]}) == [
        "<|user|>two<|end|><|assistant|>[four <|end|>]"
    ]
    chat = [
        CHATS[0][0],
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "OUT"},
        *CHATS[0][2:],
    ]
    (text,) = marked(tmp_path, tokenizer, NESTED, {"messages": chat})
    assert (
        "<|assistant|>[call<result>]OUT[</result><|end|>]" in text
        or "[call]<result>OUT</result>[<|end|>]" in text
    )
    (text,) = marked(tmp_path, tokenizer, LATE, {"messages": CHATS[0]})
    assert (
        text
        == "<|user|>kettle?<|end|><|assistant|>[moss<|end|>]<|user|>lantern<|end|><|assistant|>[tide over<|end|>]"
    )
    (text,) = marked(tmp_path, tokenizer, MARKS_LAST, {"messages": CHATS[0][:3]})
    assert "[" not in text  # as the template says


@pytest.mark.parametrize(
    ("template", "change", "said"),
    [
        ("{% if m.tool_calls %}calls{% endif %}", {"tool_calls": "weather"}, "'tool_calls' of messages[1]"),
        (
            "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}",
            {"tool_calls": "weather"},
            "'tool_calls' of messages[1]",
        ),
        (
            "{% if m.reasoning_content %}(thought){% endif %}",
            {"reasoning_content": "WHY"},
            "'reasoning_content'",
        ),
        ("{% if tools %}You have tools.{% endif %}", {"tools": "weather"}, "'tools'"),
    ],
)
def test_what_is_tested_and_not_written_is_lost(
    template: str, change: dict[str, str], said: str, tokenizer: Any, tmp_path: Path
) -> None:
    ((key, value),) = change.items()
    function = {"type": "function", "function": {"name": value, "arguments": {"place": "Bergen"}}}
    columns = {"tools": [function]} if key == "tools" else {}
    more = {} if key == "tools" else {key: [function] if key == "tool_calls" else value}
    entry = {"messages": [CHATS[1][0], CHATS[1][1] | more], **columns}
    with pytest.raises(DataError) as error:
        marked(tmp_path, tokenizer, PLAIN.replace("<|end|>", f"{template}<|end|>"), entry)
    assert said in str(error.value)
