"""Two processes and one do the same: the same losses, the same weights, and each continues what the other began.

The processes are real ones that talk over gloo, as torchrun would start them. All is float32, but for one test.
"""

import json
import os
import random
import re
import signal
import socket
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import told
from test_resume import contents

TOLERANCE = 1e-5
COMMON = "--model tiny --device cpu --dtype float32 --held-out 0.3 --lr 3e-4"

# Odd numbers of rows, so that the processes never have the same number. A rank of 0 trains every weight.
SFT = "train_sft.py --data {inputs}/rows.jsonl --batch-size 3 --accumulate 2 --steps 4"
DPO = "train_dpo.py --pairs {inputs}/pairs.jsonl --batch-size 3 --steps 3 --sft-coef 0.1"
PPO = "train_ppo.py --data {inputs}/rows.jsonl --scorer {inputs}/scorer --allow-bare-scorer --batch-size 5 --steps 3 "
PPO += "--samples-per-prompt 2 --max-new-tokens 8 --kl-target 0.1 --eval-prompts 3 --eval-every 2"
STAGES = {
    f"{name}-{kind}": f"{arguments} {COMMON} --lora-rank {rank}"
    for name, arguments in (("sft", SFT), ("dpo", DPO), ("ppo", PPO))
    for kind, rank in (("lora", 4), ("full", 0))
}


def stop_at(last: int):
    """Called in the scripts' processes: the first of them is asked to stop during this step."""
    from socratiq.run.folder import Run

    end_step = Run.end_step

    def stop(self, step, *rest, **options):
        if step == last and os.environ.get("RANK", "0") == "0":
            self.asked_to_stop = signal.SIGTERM
        end_step(self, step, *rest, **options)

    Run.end_step = stop


stop_at_2, stop_at_3 = partial(stop_at, 2), partial(stop_at, 3)


def killed_among_the_parts():
    """Both processes die when the parts of step 2 are written, one of them by half, and the file that counts is not."""
    import torch.distributed.checkpoint as dcp

    from socratiq.engine import distributed

    save = dcp.save

    def save_and_die(tensors, storage_writer):
        save(tensors, storage_writer=storage_writer)
        folder = Path(storage_writer.path)
        if folder.name == "checkpoint-2":
            distributed.first(lambda: os.truncate(min(folder.iterdir()), 1000))
            distributed.first(lambda: (folder / "shard-00003-model-00001-of-00001.safetensors").touch())  # of a third
            os.kill(os.getpid(), signal.SIGKILL)

    dcp.save = save_and_die


@pytest.fixture(scope="module")
def launch(scripts, inputs):
    """launch(world, command, out) starts `world` processes of one script, as torchrun does.

    `victim` is the one that `at` and `how` (tests/scripts.py) are for.
    """

    def launch(world, command, out, patch=None, victim=None, **kill):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = [*command.format(inputs=inputs).split(), "--out", out]
        return [
            scripts.start(
                arguments,
                env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {},
                patch=patch,
                **(kill if rank == victim else {}),
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


def assert_same(one, other, tolerance=TOLERANCE):
    """Two runs logged the same numbers and ended with the same weights, but for rounding."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    for mine, theirs in zip(*logs, strict=True):
        for name, x in mine.items():
            # Up to the first update policy and reference are the same: every pair is a draw, and rounding decides it.
            if name.endswith("rewards/accuracies") and abs(mine[name.replace("accuracies", "margins")]) < tolerance:
                continue
            # A norm is a float32 sum over every weight: its own rounding is relative to its size.
            assert x == pytest.approx(theirs[name], abs=tolerance, rel=tolerance), f"{name} in step {mine['step']}"
    files = [path.relative_to(one) for path in one.rglob("*model.safetensors")]  # the model's and the adapter's
    assert files
    for file in files:
        torch.testing.assert_close(load_file(one / file), load_file(other / file), atol=tolerance, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_what_one_does(launch, folder, alone, stage):
    (_, said, _), (_, other_said, other_complained) = finish(launch(2, STAGES[stage], folder / "two" / stage))
    assert_same(alone / stage, folder / "two" / stage)
    assert "model in" in said
    assert other_said == other_complained == "", "the first process alone speaks"


def test_two_processes_that_compute_activations_again(launch, folder, alone):
    finish(launch(2, STAGES["sft-lora"] + " --grad-checkpoint", folder / "again"))
    assert_same(alone / "sft-lora", folder / "again")


def test_two_processes_in_bfloat16(launch, folder):
    """Frozen weights in bfloat16 beside adapters in float32: equal but for the rounding of other partial sums."""
    rounded = STAGES["sft-lora"] + " --dtype bfloat16"
    for world in (1, 2):
        finish(launch(world, rounded, folder / "rounded" / str(world)))
    assert_same(folder / "rounded" / "1", folder / "rounded" / "2", tolerance=2e-3)
    written = load_file(folder / "rounded" / "2" / "model.safetensors")
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    adapter = load_file(folder / "rounded" / "2" / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in adapter.values()} == {torch.float32}
    assert any(x.abs().max() > 1e-4 for name, x in adapter.items() if "lora_B" in name), "learnt, not merely loaded"


@pytest.mark.parametrize(
    "stage, worlds", [("sft-full", (2, 1, 1)), ("dpo-lora", (2, 1)), ("dpo-lora", (1, 2)), ("ppo-full", (2, 3))]
)
def test_a_run_continues_on_another_number_of_processes(launch, folder, alone, stage, worlds):
    out = folder / "-".join(map(str, worlds)) / stage
    for at, world in enumerate(worlds[:-1], 2):
        finish(launch(world, STAGES[stage], out, patch=f"test_distributed:stop_at_{at}"), expect=143)
        assert (out / "checkpoint.safetensors").exists()
    ((_, said, _), *_) = finish(launch(worlds[-1], STAGES[stage], out))
    assert f"continuing {out} after step {len(worlds)}" in said
    assert_same(alone / stage, out)


def test_no_process_writes_more_than_its_part(launch, folder):
    out = folder / "parts"
    arguments = STAGES["ppo-full"] + " --checkpoint-every 1"
    finish(launch(2, arguments, out, patch="test_distributed:stop_at_2"), expect=143)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"], "the one before is gone"
    assert not load_file(out / "checkpoint.safetensors"), "it holds the state alone"
    files = sorted((out / "checkpoint-2").iterdir())
    parts = [{}, {}]
    for file in files:
        assert file.suffix == ".safetensors" and file.read_bytes()[8:9] == b"{", "a header in JSON, nothing pickled"
        number = int(re.match(r"shard-0000([12])-model", file.name)[1]) - 1
        parts[number] |= load_file(file)  # in which every number is accounted for: there is no room for a pickle
    assert len(files) == 2 * -(-len(parts[0] | parts[1]) // 64)
    steps = [{name for name in part if name.startswith("step.")} for part in parts]
    assert len(steps[0] | steps[1]) == len(steps[0]) + len(steps[1]), "a number that is not spread is written once"
    parts = [{name: x for name, x in part.items() if not name.startswith("step.")} for part in parts]
    kinds = Counter(name.partition(".")[0] for name in parts[0])
    assert parts[0].keys() >= parts[1].keys() and kinds.keys() == {"weight", "exp_avg", "exp_avg_sq"}
    assert len(set(kinds.values())) == 1 and kinds["weight"] == len(steps[0] | steps[1])
    for name, part in parts[0].items():
        assert part.numel() == 1 or part.shape[1:] == parts[1][name].shape[1:], name
        assert part.numel() == 1 or abs(len(part) - len(parts[1][name])) <= 1, name

    large = [file for file in files if "model-00001" in file.name]  # one of each process
    for damage in (large[1].unlink, lambda: os.truncate(large[0], 1000)):
        damage()
        for world in (1, 2):
            (_, _, complained), *_ = finish(launch(world, arguments, out), expect=2)
            assert complained.startswith(f"error: {out / 'checkpoint.safetensors'} cannot be read")
            assert complained.count("\n") == 1


@pytest.mark.parametrize("after", [1, 2])
def test_a_checkpoint_without_its_file_does_not_count(launch, folder, alone, after):
    out = folder / "killed" / str(after)
    arguments = STAGES["sft-full"] + " --checkpoint-every 1"
    jobs = launch(2, arguments, out, patch="test_distributed:killed_among_the_parts")
    assert -signal.SIGKILL in [job.wait()[0] for job in jobs]  # whoever sees the other go before may give up instead
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    ((_, said, _), *_) = finish(launch(after, arguments, out))
    assert "after step 1" in said
    assert_same(alone / "sft-full", out)
    assert not list(out.glob("checkpoint*"))


def test_a_full_disk_leaves_the_last_checkpoint_of_two_processes_good(launch, folder, alone):
    out = folder / "full-disk"
    finish(launch(2, STAGES["dpo-full"], out, patch="test_distributed:stop_at_2"), expect=143)
    before = {file: file.read_bytes() for file in out.rglob("*.safetensors")}
    ended = finish(launch(2, STAGES["dpo-full"], out, patch="patches:small_disk"), expect=1)
    assert [said.count("\n") for *_, said in ended] == [1, 0] and "error: no space left on the disk" in ended[0][2]
    assert all(file.read_bytes() == content for file, content in before.items())
    finish(launch(2, STAGES["dpo-full"], out))
    assert_same(alone / "dpo-full", out)


def test_kills_of_one_of_two_processes(launch, folder):
    """At whatever operation on the disk; the other is killed as torchrun would. In the end the same bytes."""
    arguments, out = STAGES["sft-full"] + " --checkpoint-every 1", folder / "kills"
    counts = []
    for victim in (0, 1):
        said = finish(launch(2, arguments, out / f"whole-{victim}", victim=victim, at=-1))[victim][1]
        counts.append(told(said))
    chance, kills = random.Random(0), 0
    for victim, how in [(0, "after"), (1, "before"), (0, "before"), (0, "file"), (1, "after"), (0, "before")]:
        at = int(counts[victim][how] * chance.random() * 0.2)  # what is left of a run has fewer operations
        jobs = launch(2, arguments, out / "killed", victim=victim, at=at, how=how)
        jobs[victim].until(lambda: False)
        for job in jobs:
            job.kill(signal.SIGKILL)
        kills += [job.wait()[0] for job in jobs][victim] == -signal.SIGKILL  # the other may have given up before
    assert kills > 4
    finish(launch(2, arguments, out / "killed"))
    ours, wanted = contents(out / "killed"), contents(out / "whole-0")
    assert ours.pop("train_args.json") and wanted.pop("train_args.json") and ours == wanted
    assert not list((out / "killed").glob("checkpoint*"))


@pytest.mark.parametrize("stage", ["sft-lora", "dpo-lora", "ppo-lora"])
def test_a_process_without_rows_keeps_in_step(launch, folder, stage):
    """Two rows, two prompts, one pair at a time among three processes."""
    few = STAGES[stage] + " --steps 2 --batch-size 2" + (" --accumulate 1" if stage == "sft-lora" else "")
    for world in (1, 3):
        finish(launch(world, few, folder / f"few-{world}" / stage))
    assert_same(folder / "few-1" / stage, folder / "few-3" / stage)


def test_a_reward_of_ones_own_is_asked_once(launch, folder):
    finish(launch(2, STAGES["ppo-lora"] + " --reward patches:wordy", folder / "own-reward"))


def test_a_mistake_is_told_once(launch, tmp_path):
    (tmp_path / "file").touch()
    (_, _, complained), (_, _, other) = finish(launch(2, STAGES["sft-lora"], tmp_path / "file"), expect=2)
    assert complained.startswith("error: --out") and complained.count("\n") == 1
    assert other == ""
