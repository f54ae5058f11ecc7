"""Pairs from a real OpenAI-compatible server: `transformers serve` with the embedded model. Needs fastapi and uvicorn.

`make serve-test` installs both and runs this file; without them it is skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent
WORDINGS = {
    "Clarity": "What exactly do you mean by all {} being good?",
    "Analogy": "Are {} and clouds really alike in the way that matters?",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """-> address and model name of a running server; it is stopped at the end."""
    from socratiq.models import resolve

    folder = resolve("smollm2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    start = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as output, subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=output, stderr=output, env=environment
    ) as process:  # fmt: skip
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-2000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            process.kill()


def make_pairs(folder, address, model, *more):
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"context": f"I think {n} are good.", "question": wording.format(n), "type": type}) + "\n"
            for n in ("dogs", "trams", "schools", "taxes", "phones", "farms", "films", "wolves", "bikes", "books")
            for type, wording in WORDINGS.items()
        )
    )
    arguments = ["--data", rows, "--scorer", folder / "scorer", "--out", folder / "pairs.jsonl", "--base-url", address]
    arguments += ["--scorer-model", "none"]
    arguments += ["--api-model", model, "--api-max-tokens", "24", "--max-attempts", "2", "--timeout", "300", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    return subprocess.run(
        [sys.executable, ROOT / "make_pairs.py", *map(str, arguments)],
        env={**environment, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_real_server(server, tmp_path):
    address, model = server
    done = make_pairs(tmp_path, address, model, "--limit", "2", "--concurrency", "1")
    assert done.returncode in (0, 1), done.stderr  # 1: two answers of so small a model need not make a pair
    answers = [json.loads(line) for line in (tmp_path / "pairs.answers.jsonl").read_text().splitlines()]
    assert 2 <= len(answers) <= 4
    assert all(answer["text"] and answer["prompt_tokens"] > 50 for answer in answers)
    assert {answer["finish"] for answer in answers} <= {"stop", "length"}
    again = make_pairs(tmp_path, address, model, "--limit", "2")
    assert again.returncode == done.returncode and "0 requests now" in again.stdout


@pytest.mark.slow
def test_a_model_the_real_server_does_not_have(server, tmp_path):
    done = make_pairs(tmp_path, server[0], "no-such-model", "--limit", "8")
    assert done.returncode == 2 and "no-such-model" in done.stderr and "Traceback" not in done.stderr
