"""docs/fine-tune.md: its files are read, and its commands run one after another, as a user would run them."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from colledge.launch.demo import make_model
from colledge.report import read_metrics
from tests.multiproc.commands import forked_colledge

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "fine-tune.md").read_text(encoding="utf-8")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


GIVEN = ["data", "profile", "plan", "train", "train", "generate", "generate", "export"]


def commands() -> list[list[str]]:
    spec = importlib.util.spec_from_file_location("quotes", ROOT / "docs" / "quotes.py")
    assert spec is not None
    assert spec.loader is not None
    quotes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quotes)
    return [shlex.split(command) for command in quotes.commands(GUIDE)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the page says that a user brings, and the files that it shows."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"{a + b}"},
            ]
        }
        for a in range(10)
        for b in range(6)
    ]
    lines = [json.dumps(chat) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    make_model(tmp_path / "my-model", lines, vocabulary=280, hidden_size=32, num_blocks=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "my-model")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "my-model")
    files = re.findall(r"^`(\S+\.yaml)`[^\n]*:\n\n```yaml\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["run.yaml", "pool.yaml"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_command_of_the_page_runs(folder: Path) -> None:
    printed = {}
    asked = commands()
    assert [words[1] for words in asked] == GIVEN
    for words in asked:
        result = forked_colledge(folder, *words[1:], timeout_s=120)
        assert result.returncode == 0, (words, result.stderr)
        printed[" ".join(words[1:])] = result.stdout
    metrics = read_metrics(folder / "out" / "metrics.jsonl")
    assert len(metrics) == 12
    assert metrics[-1].loss < metrics[0].loss
    assert (
        "60 of messages"
        in printed["data check chats.jsonl --model my-model --loss-on answers --sequence-length 64"]
    )
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    alone, pooled = (text for words, text in printed.items() if words.startswith("generate"))
    assert alone == pooled
    (python,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    check = (
        "from transformers import AutoModelForCausalLM\nimport torch\nids = torch.arange(12)[None]\n"
        "merged = AutoModelForCausalLM.from_pretrained('merged')\n"
        "a, b = (m.eval()(input_ids=ids).logits for m in (model, merged))\n"
        "assert torch.allclose(a, b, atol=1e-4), (a - b).abs().max()\n"
        "base = AutoModelForCausalLM.from_pretrained('my-model')\n"
        "assert not torch.allclose(b, base(input_ids=ids).logits, atol=1e-3)\n"
    )
    subprocess.run([sys.executable, "-c", python + check], cwd=folder, check=True, timeout=100)
