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


@pytest.fixture
def make_pairs(server, inputs, tmp_path):
    """make_pairs(model, more): the script on the small rows, asking the server; the finished process."""

    def run(model, more):
        options = (
            f"--data {inputs}/rows.jsonl --scorer {inputs}/scorer --scorer-model none --out {tmp_path}/pairs.jsonl"
        )
        options += f" --base-url {server[0]} --api-model {model} --api-max-tokens 24 --max-attempts 2 --timeout 300"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
        command = [sys.executable, ROOT / "make_pairs.py", *options.split(), *more.split()]
        return subprocess.run(command, env={**environment, "NO_PROXY": "127.0.0.1"}, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_a_real_server(server, make_pairs, tmp_path):
    done = make_pairs(server[1], "--limit 2 --concurrency 1")
    assert done.returncode in (0, 1), done.stderr  # 1: two answers of so small a model need not make a pair
    answers = [json.loads(line) for line in (tmp_path / "pairs.answers.jsonl").read_text().splitlines()]
    assert 2 <= len(answers) <= 4
    assert all(answer["text"] and answer["prompt_tokens"] > 50 for answer in answers)
    assert {answer["finish"] for answer in answers} <= {"stop", "length"}
    again = make_pairs(server[1], "--limit 2")
    assert again.returncode == done.returncode and "0 requests now" in again.stdout


@pytest.mark.slow
def test_a_model_the_real_server_does_not_have(make_pairs):
    done = make_pairs("no-such-model", "--limit 8")
    assert done.returncode == 2 and "no-such-model" in done.stderr and "Traceback" not in done.stderr
