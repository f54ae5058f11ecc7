"""Killed at any moment, restarted with the same command: the same bytes in the end.

Scripts are real processes killed by real signals (tests/scripts.py). A kill comes either at a random time or at one
disk operation, counted: before it, after it, or when half of a line or of a file is written. `make soak` tries other
moments ($SEED), again and again.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import told

# Weights, logs and figures; timings.jsonl tells what the clock said.
SAME = ("model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "summary.json",
        "train_args.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")  # fmt: skip
WHILE_AT_WORK = {"checkpoint.safetensors"}
SECRET = "sk-a-secret-that-nobody-should-read"
UNREWARDED = "warning: ppo step 1: every score is 0, so nothing is learnt of the task\n"  # true of an untrained model

CASES = {
    "sft": "train_sft.py --epochs 2 --batch-size 5",
    "sft full bfloat16": "train_sft.py --steps 4 --batch-size 2 --accumulate 2 --lora-rank 0 --dtype bfloat16",
    "dpo": "train_dpo.py --epochs 2 --batch-size 5 --sft-coef 0.1",
    "dpo full": "train_dpo.py --steps 5 --batch-size 3 --accumulate 2 --lora-rank 0 --checkpoint-every 3",
    "ppo": "train_ppo.py --steps 3 --kl-target 0.01 --kl-horizon 20 --scorer {inputs}/deep_scorer",
    "ppo full": "train_ppo.py --steps 3 --lora-rank 0 --reward patches:wordy --deterministic",
}


def command(case: str, inputs: Path, out: Path | str = "out") -> list[str]:
    """The case's command line; what it names more than once, the last one counts."""
    script, *own = CASES[case].format(inputs=inputs).split()
    common = f"--model tiny --out {out} --lr 1e-3 --held-out 0.2 --device cpu --dtype float32 --checkpoint-every 2"
    data = f"--pairs {inputs}/pairs.jsonl" if script == "train_dpo.py" else f"--data {inputs}/rows.jsonl"
    if script == "train_ppo.py":
        data += f" --scorer {inputs}/scorer --batch-size 5 --samples-per-prompt 2 --max-new-tokens 6 --eval-every 2"
        data += " --allow-bare-scorer --eval-prompts 3 --checkpoint-every 1"
    return [script, *common.split(), *data.split(), *own]


def contents(out: Path) -> dict[str, bytes]:
    """What must be the same after any number of kills."""
    return {name: (out / name).read_bytes() for name in SAME if (out / name).exists()}


def left_over(out: Path) -> set[str]:
    """Files of a finished run that only served the work on it."""
    names = {path.name for path in out.iterdir()}
    return names & WHILE_AT_WORK | {name for name in names if name.startswith(".")}


@pytest.fixture(scope="session")
def uninterrupted(scripts, inputs, tmp_path_factory):
    """uninterrupted(case): what a run leaves that nothing stops, how many disk operations it took, and its folder."""
    known = {}

    def run(case):
        if case not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            secrets = {"OPENAI_API_KEY": SECRET, "HF_TOKEN": SECRET}
            status, said, complained = scripts.run(command(case, inputs), cwd=folder, at=-1, env=secrets)
            assert status == 0 and complained in ("", UNREWARDED) and SECRET not in said
            assert not left_over(folder / "out")
            known[case] = contents(folder / "out"), told(said), folder
        return known[case]

    return run


@pytest.mark.parametrize("case", ["sft", "dpo", "ppo"])
def test_nothing_outside_out_is_written_and_no_secret_inside(case, inputs, uninterrupted):
    *_, folder = uninterrupted(case)
    assert [path.name for path in folder.iterdir()] == ["out"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    began = min(path.stat().st_mtime_ns for path in files)
    assert all(path.stat().st_mtime_ns < began for path in inputs.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_kills(case, scripts, inputs, uninterrupted, tmp_path):
    """Four to six kills on the way, then the end: the same bytes, and nothing left lying about."""
    wanted, counts, _ = uninterrupted(case)
    chance = random.Random(case + os.environ.get("SEED", ""))
    # The first after a checkpoint, with a step left; then early ones, which find the run where the one before has left
    # it. All these come whatever the seed. Of the last two, one tries the saving of the model, one is by the clock.
    moments = [("after", 0.35, 0.5), ("line", 0, 0.1), ("before", 0, 0.1), ("file", 0, 0.2), ("after", 0.2, 0.6)]
    kills = 0
    for how, *share in (*moments, ("time",)):
        at = int(counts[how] * chance.uniform(*share)) if share else None
        job = scripts.start(command(case, inputs), cwd=tmp_path, at=at, how=how)
        if how == "time":
            time.sleep(chance.random() * 0.5)
            job.kill(signal.SIGKILL)
        status, _, complained = job.wait()
        assert status in (0, -signal.SIGKILL), complained
        if status and not (tmp_path / "out" / "summary.json").exists():  # by the clock it may come when all is done
            kills += 1
            assert (tmp_path / "out" / "checkpoint.safetensors").exists()
            (tmp_path / "out" / ".tmpk1LLed").write_text("what a kill leaves of a file that safetensors was writing")
    assert kills > 3
    status, said, complained = scripts.run(command(case, inputs), cwd=tmp_path)
    assert status == 0 and complained in ("", UNREWARDED) and said
    assert contents(tmp_path / "out") == wanted
    assert not left_over(tmp_path / "out")


# --- signals


@pytest.mark.parametrize(
    ("case", "number", "status"),
    [("sft", signal.SIGINT, 130), ("dpo", signal.SIGTERM, 143), ("ppo full", signal.SIGINT, 130)],
)
def test_a_polite_stop_finishes_the_step(case, number, status, scripts, inputs, uninterrupted, tmp_path):
    """One line, the signal's exit status, and a checkpoint of the very step that was under way."""
    out, metrics = tmp_path / "out", tmp_path / "out" / "metrics.jsonl"
    job = scripts.start(command(case, inputs), cwd=tmp_path, patch="patches:slow_steps")
    job.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 1)
    job.kill(number)
    left, _, complained = job.wait()
    says = f"{signal.Signals(number).name}: stopped at a checkpoint; the same command continues\n"
    assert (left, complained) == (status, says)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    left, said, complained = scripts.run(command(case, inputs), cwd=tmp_path)
    assert left == 0 and f"continuing out after step {steps[-1]}\n" in said
    assert contents(out) == uninterrupted(case)[0]


def test_the_second_ctrl_c_leaves_at_once(scripts, inputs, uninterrupted, tmp_path):
    job = scripts.start(command("ppo full", inputs), cwd=tmp_path, patch="patches:endless_step")
    job.until(lambda: "endless" in Path(job.out).read_text())
    job.kill(signal.SIGINT)
    time.sleep(0.2)
    assert not job.ended()
    job.kill(signal.SIGINT)
    status, _, complained = job.wait()
    assert (status, complained) == (130, "SIGINT: stopped; the same command continues\n")
    assert scripts.run(command("ppo full", inputs), cwd=tmp_path)[0] == 0
    assert contents(tmp_path / "out") == uninterrupted("ppo full")[0]


def test_while_the_model_is_being_loaded_a_signal_ends_the_run_at_once(scripts, inputs, tmp_path):
    job = scripts.start(command("sft", inputs), cwd=tmp_path, patch="patches:endless_loading")
    job.until(lambda: "loading" in Path(job.out).read_text())
    job.kill(signal.SIGINT)
    status, _, complained = job.wait()
    assert (status, complained) == (130, "SIGINT: stopped; the same command continues\n")
    assert not (tmp_path / "out").exists()


# --- the same command, another command, the same place


def begun(scripts, case, inputs, folder):
    """A run of this case, stopped after its first checkpoint."""
    job = scripts.start(command(case, inputs), cwd=folder, patch="patches:slow_steps")
    job.until(lambda: (folder / "out" / "checkpoint.safetensors").exists())
    job.kill(signal.SIGTERM)
    assert job.wait()[0] == 143


def refused(scripts, arguments, folder) -> str:
    """The one line with which the script refuses; nothing in the folder is changed by it."""

    def state():
        return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    before = state()
    status, said, complained = scripts.run(arguments, cwd=folder)
    assert status == 2 and said == "" and complained.startswith("error: ") and complained.count("\n") == 1
    assert state() == before
    return complained


def test_changed_arguments_and_inputs_are_refused_by_name(scripts, inputs, uninterrupted, tmp_path):
    own, model = tmp_path / "inputs", tmp_path / "model"
    shutil.copytree(inputs, own)
    shutil.copytree(uninterrupted("sft")[2] / "out", model)
    arguments = [*command("ppo", own), "--model", str(model)]
    status, _, _ = scripts.run(arguments, cwd=tmp_path, at=60)
    assert status == -signal.SIGKILL and (tmp_path / "out" / "checkpoint.safetensors").exists()

    says = refused(scripts, [*arguments, "--lr", "2e-3"], tmp_path)
    assert "out was begun with --lr 0.001, now it is 0.002" in says and "--restart" in says
    assert "--steps 3, now it is 4" in refused(scripts, [*arguments, "--steps", "4"], tmp_path)
    assert "out exists and is no run of train_sft.py" in refused(scripts, command("sft", own), tmp_path)

    changes = {"--data": own / "rows.jsonl", "--scorer": own / "deep_scorer" / "scorer.json"}
    for option, path in (changes | {"--model": model / "model.safetensors"}).items():
        before = path.read_bytes()
        path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        assert f"was begun with other content of {option}; " in refused(scripts, arguments, tmp_path)
        path.write_bytes(before)

    (model / "README.md").write_text("says nothing of the model")
    assert scripts.run([*arguments, "--checkpoint-every", "7"], cwd=tmp_path)[0] == 0

    before = (own / "rows.jsonl").read_bytes()  # of a finished run too: its model is not that of the new rows
    (own / "rows.jsonl").write_bytes(before + before.splitlines(keepends=True)[0].replace(b"good", b"bad"))
    assert "other content of --data; " in refused(scripts, arguments, tmp_path)


def test_a_finished_run_says_so_and_does_nothing(inputs, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted("sft")[2], tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / "checkpoint.safetensors").write_text("left by a kill between the summary and its removal")
    probe = (
        "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    script, *arguments = command("sft", inputs)
    before = contents(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", probe, str(Path(__file__).parent.parent / script), *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "out is finished already; --restart begins anew\nFalse\n" and done.returncode == 0
    assert contents(tmp_path / "out") == before and not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_restart_begins_anew(scripts, inputs, tmp_path):
    """When the pairs have changed, which are refused otherwise; also if it is killed at any of its first steps."""
    own = tmp_path / "inputs"
    shutil.copytree(inputs, own)
    begun(scripts, "dpo", own, tmp_path)
    (tmp_path / "out" / "config.json").write_text("{}")  # as if an earlier model were there
    (tmp_path / "out" / "samples.jsonl").write_text("{}\n")
    lines = (own / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    (own / "pairs.jsonl").write_bytes(b"".join(lines[::-1]))  # another order: the reference is another one too
    assert "other content of --pairs; " in refused(scripts, command("dpo", own), tmp_path)
    assert scripts.run(command("dpo", own, "anew"), cwd=tmp_path)[0] == 0
    for at in (0, 1, 2, 4, 7, 8, 9, 10, 14, 18):
        status, _, complained = scripts.run([*command("dpo", own), "--restart"], cwd=tmp_path, at=at)
        assert status == -signal.SIGKILL, complained
        assert not ((tmp_path / "out" / "config.json").exists() and at > 1), "the old model under new arguments"
    assert scripts.run(command("dpo", own), cwd=tmp_path)[0] == 0
    ours, wanted = contents(tmp_path / "out"), contents(tmp_path / "anew")
    assert b'"restart": true' in ours.pop("train_args.json") and wanted.pop("train_args.json") and ours == wanted


def test_two_processes_do_not_share_a_folder(scripts, inputs, tmp_path):
    job = scripts.start(command("sft", inputs), cwd=tmp_path, patch="patches:slow_steps")
    job.until(lambda: (tmp_path / "out" / "metrics.jsonl").exists())
    status, _, complained = scripts.run(command("sft", inputs), cwd=tmp_path)
    assert status == 2 and "another process is at work there" in complained
    job.kill(signal.SIGKILL)
    assert job.wait()[0] == -signal.SIGKILL
    assert scripts.run(command("sft", inputs), cwd=tmp_path)[0] == 0


# --- full disks, and other places that cannot be written


@pytest.mark.parametrize("case", ["sft", "ppo full"])
def test_a_full_disk_leaves_the_last_checkpoint_good(case, scripts, inputs, uninterrupted, tmp_path):
    """Neither checkpoint nor model can be written; later they can."""
    begun(scripts, case, inputs, tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    status, _, complained = scripts.run(command(case, inputs), cwd=tmp_path, patch="patches:small_disk")
    assert status == 1 and complained.startswith("error: no space left on the disk") and complained.count("\n") == 1
    assert checkpoint.read_bytes() == before
    assert scripts.run(command(case, inputs), cwd=tmp_path)[0] == 0
    assert contents(tmp_path / "out") == uninterrupted(case)[0]


def test_a_damaged_checkpoint_or_log_is_named(scripts, inputs, tmp_path):
    begun(scripts, "sft", inputs, tmp_path)
    out = tmp_path / "out"
    log, checkpoint = (out / "metrics.jsonl").read_bytes(), (out / "checkpoint.safetensors").read_bytes()
    (out / "metrics.jsonl").write_bytes(log[:10])
    status, _, complained = scripts.run(command("sft", inputs), cwd=tmp_path)
    assert status == 2 and "out/metrics.jsonl is shorter than at the checkpoint" in complained
    (out / "metrics.jsonl").write_bytes(log)
    (out / "checkpoint.safetensors").write_bytes(checkpoint[:1000])
    status, _, complained = scripts.run(command("sft", inputs), cwd=tmp_path)
    assert status == 2 and "out/checkpoint.safetensors cannot be read" in complained
    assert scripts.run([*command("sft", inputs), "--restart"], cwd=tmp_path)[0] == 0
