"""Pairs from a real OpenAI-compatible server: `transformers serve` with the embedded model. Needs fastapi and uvicorn.

`make serve-test` installs both and runs this file; without them it is skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


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
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", folder
        finally:
            process.kill()


@pytest.fixture
def make_pairs(server, inputs, scripts, tmp_path):
    """make_pairs(*more): exit status, output and errors of the script on the small rows, which asks the server."""
    options = f"--data {inputs}/rows.jsonl --scorer {inputs}/scorer --scorer-model none --out {tmp_path}/pairs.jsonl"
    options += f" --base-url {server[0]} --api-max-tokens 24 --max-attempts 2 --timeout 300"
    return lambda *more: scripts.run(["make_pairs.py", *options.split(), *more], env={"NO_PROXY": "127.0.0.1"})


@pytest.mark.slow
def test_a_real_server(server, make_pairs, tmp_path):
    status, _, complained = make_pairs("--api-model", server[1], "--limit", "2", "--concurrency", "1")
    assert status in (0, 1), complained  # 1: two answers of so small a model need not make a pair
    answers = [json.loads(line) for line in (tmp_path / "pairs.answers.jsonl").read_text().splitlines()]
    assert 2 <= len(answers) <= 4
    assert all(answer["text"] and answer["prompt_tokens"] > 50 for answer in answers)
    assert {answer["finish"] for answer in answers} <= {"stop", "length"}
    again, said, _ = make_pairs("--api-model", server[1], "--limit", "2")
    assert again == status and "0 requests now" in said


@pytest.mark.slow
def test_a_model_the_real_server_does_not_have(make_pairs):
    status, _, complained = make_pairs("--api-model", "no-such-model", "--limit", "8")
    assert status == 2 and "no-such-model" in complained and "Traceback" not in complained
