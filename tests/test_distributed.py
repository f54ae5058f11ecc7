"""Two processes and one do the same: the same losses, the same weights, and each continues what the other began.

The processes are real ones that talk over gloo, as torchrun would start them. Everything is float32.
"""

import json
import os
import signal
import socket

import pytest
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
COMMON = ("--model", "tiny", "--device", "cpu", "--dtype", "float32", "--held-out", "0.3", "--lr", 3e-4)

# Odd numbers of rows, so that the processes never have the same number. A rank of 0 trains every weight.
SFT = ("train_sft.py", "--data", "{inputs}/rows.jsonl", "--batch-size", 3, "--accumulate", 2, "--steps", 4)
DPO = ("train_dpo.py", "--pairs", "{inputs}/pairs.jsonl", "--batch-size", 3, "--steps", 3, "--sft-coef", 0.1)
PPO = (
    *("train_ppo.py", "--data", "{inputs}/rows.jsonl", "--scorer", "{inputs}/scorer", "--batch-size", 5, "--steps", 3),
    *("--samples-per-prompt", 2, "--max-new-tokens", 8, "--kl-target", 0.1, "--eval-prompts", 3, "--eval-every", 2),
)
STAGES = {
    f"{name}-{kind}": (*arguments, *COMMON, "--lora-rank", rank)
    for name, arguments in (("sft", SFT), ("dpo", DPO), ("ppo", PPO))
    for kind, rank in (("lora", 4), ("full", 0))
}


def stop_at_2():
    """Called in the scripts' processes: the first of them is asked to stop during its second step."""
    from socratiq.run import Run

    leave = Run.leave_if_asked

    def leave_if_asked(self, policy, optimizer, **state):
        if state["step"] == 2 and os.environ.get("RANK", "0") == "0":
            self.stopping = signal.SIGTERM
        leave(self, policy, optimizer, **state)

    Run.leave_if_asked = leave_if_asked


@pytest.fixture(scope="module")
def launch(scripts, inputs):
    """launch(world, arguments, out) starts `world` processes of one script, as torchrun does."""

    def launch(world, arguments, out, patch=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = [str(argument).format(inputs=inputs) for argument in arguments]
        return [
            scripts.start(
                [*arguments, "--out", out],
                env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {},
                patch=patch,
            )
            for rank in range(world)
        ]

    return launch


def finish(jobs, expect=0):
    """Wait for the processes; what they wrote to stdout and stderr."""
    ended = [job.wait() for job in jobs]
    assert [status for status, _, _ in ended] == [expect] * len(jobs), "\n".join(said for *_, said in ended)
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(launch, folder):
    """Every stage on one process."""
    for name, arguments in STAGES.items():
        finish(launch(1, arguments, folder / "alone" / name))
    return folder / "alone"


def assert_same(one, other):
    """Two runs logged the same numbers and ended with the same weights, but for rounding."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for mine, theirs in zip(*logs, strict=True):
        for name, x in mine.items():
            # A norm is a float32 sum over every weight: its own rounding is relative to its size.
            assert x == pytest.approx(theirs[name], abs=TOLERANCE, rel=TOLERANCE), f"{name} in step {mine['step']}"
    files = [path.relative_to(one) for path in one.rglob("*model.safetensors")]  # the model's and the adapter's
    assert files
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=TOLERANCE, rtol=0, msg=f"{file} {name}")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_what_one_does(launch, folder, alone, stage):
    (_, said, _), (_, other_said, other_complained) = finish(launch(2, STAGES[stage], folder / "two" / stage))
    assert_same(alone / stage, folder / "two" / stage)
    assert "model in" in said
    assert other_said == other_complained == "", "the first process alone speaks"


@pytest.mark.parametrize("stage", ["sft-full", "dpo-lora", "ppo-full"])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_continues_on_another_number_of_processes(launch, folder, alone, stage, before, after):
    out = folder / f"{before}-to-{after}" / stage
    finish(launch(before, STAGES[stage], out, patch="test_distributed:stop_at_2"), expect=143)
    assert (out / "checkpoint.safetensors").exists()
    ((_, said, _), *_) = finish(launch(after, STAGES[stage], out))
    assert "continuing" in said
    assert_same(alone / stage, out)


def test_a_process_without_rows_keeps_in_step(launch, folder):
    """Two rows, two prompts, one pair at a time among three processes."""
    few = {"sft": SFT, "dpo": DPO, "ppo": PPO}
    for name, arguments in few.items():
        arguments = (*arguments, *COMMON, "--lora-rank", 4, "--steps", 2, "--batch-size", 2)
        if name == "sft":
            arguments += ("--accumulate", 1)
        finish(launch(1, arguments, folder / "one" / name))
        finish(launch(3, arguments, folder / "three" / name))
        assert_same(folder / "one" / name, folder / "three" / name)


def test_a_mistake_is_told_once(launch, tmp_path):
    (tmp_path / "file").touch()
    (_, _, complained), (_, _, other) = finish(launch(2, STAGES["sft-lora"], tmp_path / "file"), expect=2)
    assert complained.startswith("error: --out") and complained.count("\n") == 1
    assert other == ""
