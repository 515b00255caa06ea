"""Keep docs/plan.md true: it quotes lines of the examples' files and of what its own commands print.

    <!-- quote examples/home/plan.md "FIRST" -->               the first line that contains FIRST
    <!-- quote examples/home/plan.md "FIRST" ... "LAST" -->    from it to the next line that contains LAST
    <!-- quote command "FIRST" ... -->                         from it to the next empty line
    <!-- quote examples/home/plan.md "## TITLE" -->            the section that begins so, without its title
    (the lines)
    <!-- end -->

`command` is what the last command above it prints. `python docs/quotes.py` writes all quotes anew; `make examples`
does that after it has written the examples.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "plan.md"

_QUOTE = re.compile(
    r'(?P<head><!-- quote (?P<source>\S+) "(?P<first>[^"]+)"(?P<more> \.\.\.( "(?P<last>[^"]+)")?)? -->\n)'
    r"(?P<body>.*?)<!-- end -->",
    re.DOTALL,
)
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)

Run = Callable[[str], str]


def commands(text: str) -> list[str]:
    """Return the colledge commands of a page, in order, without the comments behind them."""
    lines = (line for block in _SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines())
    return [shlex.join(words) for line in lines for words in [shlex.split(line, comments=True)] if words]


def quoted(text: str) -> list[tuple[str, str]]:
    """Return the quotes of a page: what each one quotes, and its lines."""
    return [(match["head"].strip(), match["body"].strip()) for match in _QUOTE.finditer(text)]


def refreshed(text: str, folder: Path, run: Run) -> str:
    """Return a page with its quotes written anew.

    Args:
        text: The page.
        folder: Where the files that it quotes are.
        run: Answers what a command prints.
    """

    def quote(match: re.Match[str]) -> str:
        source = match["source"]
        if source == "command":
            shown = _excerpt(run(commands(text[: match.start()])[-1]), match)
            return f"{match['head']}```text\n{shown}\n```\n<!-- end -->"
        shown = _excerpt((folder / source).read_text(encoding="utf-8"), match)
        return f"{match['head']}\n{shown}\n\n<!-- end -->"

    return _QUOTE.sub(quote, text)


def _excerpt(text: str, match: re.Match[str]) -> str:
    lines = [line.rstrip() for line in text.splitlines()]
    start = next((i for i, line in enumerate(lines) if match["first"] in line), None)
    if start is None:
        raise SystemExit(f"docs/quotes.py: nothing to quote for {match['head'].strip()}")
    stop = start + 1
    if match["first"].startswith("## "):
        ends = (i for i in range(stop, len(lines)) if lines[i].startswith("## "))
        return "\n".join(lines[stop : next(ends, len(lines))]).strip()
    if match["last"]:
        stop += next(i for i, line in enumerate(lines[start:]) if match["last"] in line)
    elif match["more"]:
        stop = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return "\n".join(lines[start:stop])


def main() -> None:
    """Write the quotes of docs/plan.md anew."""
    printed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder, "examples"))

        def run(command: str) -> str:
            if command not in printed:
                program = Path(sys.executable).with_name("colledge")
                done = subprocess.run(
                    [program, *shlex.split(command)[1:]],
                    cwd=folder,
                    env={**os.environ, "PYTHONUTF8": "1"},
                    stdout=subprocess.PIPE,
                    encoding="utf-8",
                    check=True,
                )
                printed[command] = done.stdout
            return printed[command]

        text = GUIDE.read_text(encoding="utf-8")
        for command in commands(text):
            run(command)
        GUIDE.write_text(refreshed(text, ROOT, run), encoding="utf-8")


if __name__ == "__main__":
    main()
