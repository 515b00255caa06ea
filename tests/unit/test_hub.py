"""A model that is not there and cannot be fetched: offline, gated or unknown, in one line with what to do."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

FIND = (
    "import sys; from colledge.errors import ColledgeError\n"
    "from colledge.launch.inputs import find_model\n"
    "try: print(find_model(sys.argv[1]))\n"
    "except ColledgeError as fault: print(fault); sys.exit(fault.exit_code)\n"
)


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does of a gated model, and of one that is unknown."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to this model is restricted." if gated else "Not found.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def _find(name: str, tmp_path: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FIND, name],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "5", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        ("org/any-model", {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE", "./any-model"]),
        (
            "org/gated-model",
            {"HF_TOKEN": "hf_secret"},
            ["gated", "huggingface.co/org/gated-model", "HF_TOKEN"],
        ),
        ("org/unknown-model", {}, ["no model of that name", "./unknown-model"]),
    ],
)
def test_a_model_out_of_reach_is_one_line_that_says_why(
    name: str, environment: dict[str, str], words: list[str], hub: str, tmp_path: object
) -> None:
    result = _find(name, tmp_path, **{"HF_ENDPOINT": hub, **environment})
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stdout.strip().splitlines()
    assert f"model {name!r}" in line
    for word in words:
        assert word in line
    assert "hf_secret" not in line + result.stderr
