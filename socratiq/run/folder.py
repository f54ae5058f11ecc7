"""The folder of a training run: its arguments, its logs, its checkpoint. It can be killed at any moment.

The same command continues from the last checkpoint and ends with the same bytes as a run that was never killed (on the
same machine and as many threads; on a GPU with --deterministic, else but for rounding). What makes that hold:

- whatever is random is drawn from a generator seeded with (seed, purpose, number of the step or epoch), so that the
  random state of any step can be rebuilt from its number alone;
- a checkpoint is one file, written beside its place and renamed; what several processes hold in parts, each has written
  into a folder before that, and the file says that it counts;
- the logs are cut back to the length they had at the checkpoint, and metrics.jsonl holds nothing that depends on the
  clock (that is in timings.jsonl);
- a changed argument is refused, and so is a model, a scorer or a file of rows whose content has changed.

Imports no torch: a finished run says so, and a changed argument is refused, at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from socratiq.data import SAMPLE, SUFFIXES
from socratiq.engine import distributed
from socratiq.run.errors import Stopped, UserError, bar
from socratiq.run.files import append_jsonl, atomic_write, lock, remove, replacing, sync, to_json

# Arguments that do not change the result: the command that continues a run may differ in them.
FREE_ARGUMENTS = {"out", "restart", "checkpoint_every", "skip_nonfinite", "grad_checkpoint"}
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
# Gone when the run is finished. The folders of parts come after the file that they belong to.
WORK = ("checkpoint.safetensors", "checkpoint-*", "best.safetensors", "reference.safetensors")

# Arguments that name a file or folder, and which files of such a folder the result depends on.
INPUTS = {
    "model": ("config.json", "tokenizer*", "model*.safetensors"),
    "data": tuple(f"**/*{suffix}" for suffix in SUFFIXES),
    "pairs": (),
    "scorer": ("scorer.*",),
    "reward": (),
}
BUILT_IN = {"smollm2", "tiny", "socratiq"}  # no folders, even where a folder has that name


class Run:
    """One stage in its --out folder.

        run = Run(args, "sft")                        # refuses a folder that is not fit for it
        if run.finished: return
        state = run.load(policy, optimizer)           # here the folder is made; {} if the run is new
        for step in run.steps(state.get("step", 0), steps):
            ...
            run.log(step + 1, loss=loss)
            run.save(policy, optimizer, step=step + 1)
        run.finish(steps=steps)

    Raises UserError if --out is no place for this run: a file, a folder of something else, a run with other arguments.
    """

    def __init__(self, args, stage: str):
        self.out, self.stage, self.restart = Path(args.out), stage, args.restart
        self.known, self.checkpoint = self.out / "train_args.json", self.out / "checkpoint.safetensors"
        given = {name: value for name, value in vars(args).items() if name in INPUTS and value is not None}
        contents = {name: fingerprint(name, value) for name, value in given.items()}
        self.arguments = {"stage": stage, **vars(args), "contents": contents}
        self.stopping = 0  # the signal that asked us to stop
        self.in_step = False
        self.saved = None  # the step of the last checkpoint
        self.skipped = 0  # updates skipped for a non-finite number
        self.finished = distributed.first(self._check_place)
        if self.finished:
            print(f"{self.out} is finished already; --restart begins anew")
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _check_place(self) -> bool:
        """Refuse --out unless it is free, or a run of this stage with these arguments. Is the run in it finished?"""
        model = Path(self.arguments["model"])
        if self.out.is_dir() and model.is_dir() and model.samefile(self.out) and str(model) not in BUILT_IN:
            raise UserError(
                f"--out {self.out} is the folder of --model; name another place for what is trained from it"
            )
        there = next(place for place in (self.out, *self.out.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"--out {self.out}: {there} is a file, not a folder; name another place")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"--out {self.out}: {there} cannot be written; name another place")
        if not self.known.exists():
            if self.out.exists() and any(self.out.glob("[!.]*")):
                raise UserError(f"--out {self.out} exists and is no run of train_{self.stage}.py; name another place")
            return False
        try:
            before = json.loads(self.known.read_text())
            other = before["stage"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{self.known} was not written by train_{self.stage}.py; name another --out") from None
        if other != self.stage:
            raise UserError(f"--out {self.out} holds a run of train_{other}.py; name another place")
        if self.restart:
            return False
        self._compare(before)
        finished = (self.out / "summary.json").exists()
        if finished:
            self._tidy()  # a kill may have come between the summary and this
        return finished

    def _compare(self, before: dict) -> None:
        mend = "--restart to begin anew, or another --out"
        now, contents = self.arguments, before.pop("contents", {})
        # An argument that only one of them knows belongs to another version of this project.
        for name in sorted((before.keys() & now.keys()) - FREE_ARGUMENTS - {"contents"}):
            if before[name] != now[name]:
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.out} was begun with {option} {before[name]}, now it is {now[name]}; "
                    f"use the old value, {mend}"
                )
        for name, content in now["contents"].items():
            if None not in (content, contents.get(name)) and content != contents[name]:
                raise UserError(
                    f"{self.out} was begun with what --{name} {now[name]} held then, and it has changed; "
                    f"put the old content back, or use {mend}"
                )

    # --- signals

    def _stop(self, number: int, frame) -> None:
        """SIGINT and SIGTERM wait for the end of a step; outside of steps, and the second time, they do not."""
        if self.stopping or not self.in_step:
            raise Stopped(f"{signal.Signals(number).name}: stopped; the same command continues", 128 + number)
        self.stopping = number
        if sys.stderr.isatty():
            os.write(2, b"\nfinishing the step (again to leave at once)\n")  # print is not safe in a signal handler

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The numbers of the steps from `first` to `last` - 1, under a progress bar."""
        self.progress = bar(total=last, initial=first, desc=self.stage)
        self.in_step = True
        for step in range(first, last):
            yield step
            self.progress.update()
        self.in_step = False
        self.progress.close()

    def leave_if_asked(self, policy, optimizer, **state) -> None:
        """After SIGINT or SIGTERM: checkpoint and leave with the signal's exit status."""
        stopping = distributed.most(self.stopping)  # one process that was asked stops all
        if stopping:
            self.save(policy, optimizer, **state)
            self.progress.close()
            name = signal.Signals(stopping).name
            raise Stopped(f"{name}: stopped at a checkpoint; the same command continues", 128 + stopping)

    # --- logs

    def log(self, step: int, **metrics) -> None:
        """One line of metrics.jsonl; tensors become numbers here."""
        self._append("metrics.jsonl", {"step": step, **metrics})

    def log_time(self, step: int, seconds: float, tokens: int) -> None:
        """One line of timings.jsonl: what the clock says stays out of metrics.jsonl, which is the same in every run."""
        memory = peak_memory_mb(self.arguments.get("device", "auto"))
        line = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory_mb": memory}
        self._append("timings.jsonl", {"step": step, **line})

    def sample(self, **fields) -> None:
        """One line of samples.jsonl: a question the model asked."""
        self._append("samples.jsonl", fields)

    def _append(self, name: str, line: dict) -> None:
        if distributed.rank() == 0:
            append_jsonl(self.out / name, _numbers(line))

    # --- checkpoint

    def load(self, policy, optimizer) -> dict:
        """Take the folder, put back what the checkpoint holds, and return its `state`; {} for a new run.

        What was logged after the checkpoint is cut off the logs: it will be logged again.
        """
        from safetensors import SafetensorError, safe_open

        distributed.first(self._take)
        if not distributed.first(self.checkpoint.exists):
            return {}
        parameters = policy.trainable()
        moments = {}  # number of the parameter -> what the optimiser knows of it
        try:
            with safe_open(self.checkpoint, "pt", device=str(policy.device)) as file:
                state = json.loads(file.metadata()["state"])
                parts = distributed.load_parts(self._folder(state), parameters) if state["processes"] > 1 else {}
                names = {*file.keys(), *parts}
                kinds = sorted({name.partition(".")[0] for name in names})
                for number, (name, parameter) in enumerate(parameters.items()):
                    moments[number] = {
                        kind: parts.pop(key) if key in parts else distributed.part(file.get_tensor(key), parameter)
                        for kind in kinds
                        if (key := f"{kind}.{name}") in names
                    }
                    parameter.data.copy_(moments[number].pop("weight"))
        except (SafetensorError, KeyError, FileNotFoundError) as error:
            raise UserError(f"{self.checkpoint} cannot be read ({error}); --restart begins anew") from None
        # The optimiser itself knows on which device and in which type it wants its moments and step counts.
        moments = {number: known for number, known in moments.items() if known}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        distributed.first(lambda: self._cut_logs(state["log_lengths"]))
        self.saved, self.skipped = state["step"], state["skipped"]
        print(f"continuing {self.out} after step {state['step']}")
        return state

    def _cut_logs(self, lengths: dict[str, int]) -> None:
        """What was logged after the checkpoint will be logged again."""
        for log in (self.out / name for name in LOGS):
            length = lengths.get(log.name, 0)
            if length > (log.stat().st_size if log.exists() else 0):
                raise UserError(f"{log} is shorter than at the checkpoint; put it back, or --restart to begin anew")
            if log.exists():
                os.truncate(log, length)

    def _take(self) -> None:
        """Make the folder this run's own. Nothing is written before: a mistake in the inputs leaves no trace."""
        self._lock()
        if self.restart:
            # First what makes the folder a finished run and a model, last the arguments: a kill on the way leaves a
            # run with the old arguments and no checkpoint, or the new run.
            for name in ("summary.json", "config.json", "model*.safetensors*", "adapter", "nonfinite", *WORK, *LOGS):
                for path in self.out.glob(name):
                    remove(path)
        if self.restart or not self.known.exists():
            atomic_write(self.known, json.dumps(self.arguments, indent=2) + "\n")
            self._lock()
        if not self.checkpoint.exists():
            self._cut_logs({})

    def _lock(self) -> None:
        """Let no second process work in the folder. The lock dies with the process."""
        if self.known.exists():
            self._locked = open(self.known, "r+b")  # noqa: SIM115 (it stays open, and so locked)
            if not lock(self._locked):
                raise UserError(f"--out {self.out}: another process is at work there; wait for it or stop it")

    def save(self, policy, optimizer, **state) -> None:
        """Write the checkpoint: trained weights, optimiser moments, and `state`, which JSON must hold exactly."""
        from safetensors.torch import save_file

        if state["step"] == self.saved:  # asked to stop just after a checkpoint, whose parts must stay as they are
            return
        parameters = policy.trainable()
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value
        tensors = distributed.save_parts(tensors, self._folder(state))
        self.saved = state["step"]
        if distributed.rank() > 0:
            return
        lengths = {}
        for log in (self.out / name for name in LOGS):
            if log.exists():
                sync(log)  # what the checkpoint counts on is on the disk before it
                lengths[log.name] = log.stat().st_size
        state = {**state, "processes": distributed.world(), "skipped": self.skipped, "log_lengths": lengths}
        with replacing(self.checkpoint) as temporary:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, {"state": to_json(state)})
        for folder in self.out.glob("checkpoint-*"):
            if folder != self._folder(state):
                remove(folder)

    def _folder(self, state: dict) -> Path:
        """Where several processes put their parts. Every checkpoint has its own, so that the one before stays whole."""
        return self.out / f"checkpoint-{state['step']}"

    def finish(self, **summary) -> None:
        """The end: summary.json marks the run as finished, and what only served the work on it goes."""
        if distributed.rank() > 0:
            return
        if self.skipped:
            summary["skipped"] = self.skipped
        atomic_write(self.out / "summary.json", json.dumps(_numbers(summary), indent=2) + "\n")
        self._tidy()

    def _tidy(self) -> None:
        for path in (path for name in (*WORK, ".tmp*") for path in self.out.glob(name)):
            remove(path)  # .tmp and six letters is what a kill leaves of a file that safetensors was writing


def _numbers(values: dict) -> dict:
    """Values for JSON: tensors as Python numbers, floats cut to seven digits, NaN and infinity as null."""

    def number(x):
        x = x.item() if hasattr(x, "item") else x
        if isinstance(x, float):
            return float(f"{x:.7g}") if math.isfinite(x) else None
        return x

    return {name: number(x) for name, x in values.items()}


def peak_memory_mb(device: str = "auto") -> float:
    """The most memory this process has held so far, in MB; the GPU's where it computes on one (--device)."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- inputs ---------------------------------------------------------------------------------------------------------

WHOLE = 64 << 20  # bytes; of a larger file of weights only samples are read: training changes them everywhere
SAMPLES = 1024


def fingerprint(argument: str, name: str) -> str | None:
    """Sixteen digits that stand for what the file or folder `name`, the value of this argument, holds.

    None if it holds nothing here: a Hub id, an address or a built-in name stands for its content by itself.
    """
    if argument == "reward":  # MODULE:FUNCTION
        name = name.partition(":")[0].replace(".", "/") + ".py"
    path = SAMPLE if (argument, name) == ("data", "sample") else Path(name)
    files = [path] if path.is_file() else []
    if path.is_dir() and name not in BUILT_IN:
        files = sorted(file for pattern in INPUTS[argument] for file in path.glob(pattern) if file.is_file())
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            if file.suffix != ".safetensors" or size <= WHOLE:
                while block := stream.read(1 << 20):
                    digest.update(block)
            else:
                for index in range(SAMPLES):
                    stream.seek(index * (size - 4096) // (SAMPLES - 1))
                    digest.update(stream.read(4096))
    return digest.hexdigest()[:16]
