"""docs/plan.md: its commands run, and what it quotes is what they print."""

from __future__ import annotations

import functools
import importlib.util
import shlex
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest

from colledge.launch import advice
from colledge.launch.cli import main

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
STALE = "run `make examples`"
SLOW = "--advise"


def load_quotes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quotes", ROOT / "docs" / "quotes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


quotes = load_quotes()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each command of the page prints, in a copy of the examples; advice on one change only."""
    folder, found = tmp_path_factory.mktemp("docs"), {}
    shutil.copytree(ROOT / "examples", folder / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(advice, "advise", functools.partial(advice.advise, most_changes=1))
        for command in quotes.commands(GUIDE):
            patch.setattr("sys.argv", shlex.split(command))
            with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as exit:
                main()
            assert exit.value.code == 0, command
            found[command] = out.getvalue()
        yield found


def test_commands_run_and_quotes_are_what_they_print(printed: dict[str, str]) -> None:
    (advised,) = (command for command in printed if SLOW in command)
    kept = {command: text for command, text in printed.items() if command != advised}
    fresh = quotes.refreshed(GUIDE, ROOT, lambda command: kept.get(command, printed[advised]))
    before, after = quotes.quoted(GUIDE), quotes.quoted(fresh)
    assert len(before) > 10
    for (head, shown), (same_head, now) in zip(before, after, strict=True):
        assert head == same_head
        if '" change "' in head:  # of the advice the test plans one change only
            rows = {" ".join(line.split()) for line in shown.splitlines()}
            planned = [line for line in now.splitlines() if "%" in line or "as it is" in line]
            assert len(planned) == 2
            assert rows.issuperset(" ".join(line.split()) for line in planned), STALE
        else:
            assert shown == now, f"{head}: {STALE}"


def test_what_the_page_says_of_its_commands_is_so(printed: dict[str, str]) -> None:
    by_option = {command.partition("run.yaml ")[2]: text for command, text in printed.items()}
    assert "prove that no other plan with regular warm-up depths is better" in by_option["--without pi"]
    assert "jetson-orin-nano-1: assumed" in by_option["--with catalog:jetson-orin-nano"]
    assert "costing" in by_option["--deadline 35min --electricity 0.30/kWh --carbon 350g/kWh"]
    assert Path("out/llama/plan.json").is_file()
