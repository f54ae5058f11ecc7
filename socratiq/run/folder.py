"""The folder of a training run: its arguments, its logs, its checkpoint. The run can be killed at any moment.

The same command continues from the last checkpoint and ends with the same bytes as a run that was never killed (on the
same machine with as many threads; on a GPU with --deterministic, otherwise up to rounding). Four rules make that hold:

- every random number comes from a generator seeded with (seed, purpose, number of the step or epoch), so that a step
  can be computed again from its number alone;
- a checkpoint is written beside its place and renamed;
- the logs are cut back to their length at the checkpoint, and metrics.jsonl holds nothing that depends on the clock
  (timings.jsonl does);
- a changed argument is refused, and so is a model, a scorer or a file of rows whose content has changed.

Torch is imported only where tensors are written or read: a finished run says so, and a changed argument is refused, at
once. Several processes share a run through the subclass in engine/distributed.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from socratiq.run.errors import Stopped, UserError, bar, stop_now, warn
from socratiq.run.files import append_jsonl, atomic_write, lock, remove, replacing, sync, to_json
from socratiq.run.options import check

# Arguments that do not change the result: the command that continues a run may differ in them.
FREE_ARGUMENTS = {"out", "restart", "checkpoint_every", "grad_checkpoint"}
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")
# Removed when the run is finished. Parts of a checkpoint come after the file that counts on them; .tmp and six letters
# is the name of a file that safetensors was writing when a kill came.
WORK = ("checkpoint.safetensors", "checkpoint-*", ".lock", ".tmp*")
MODEL = ("config.json", "model*.safetensors*", "adapter")

# Arguments that name a file or folder, and the endings of the files in such a folder that count.
INPUTS = ("model", "data", "pairs", "scorer", "reward")
BUILT_IN = {"sample", "socratiq", "smollm2", "tiny"}
ENDINGS = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".safetensors", ".model"}


class Run:
    """One stage in its --out folder.

        run = Run(args, "sft")                        # refuses a folder that does not fit
        if run.finished: return
        state = run.load(policy, optimizer)           # the folder is made here; {} if the run is new
        for step in run.steps(state.get("step", 0), steps):
            ...
            run.end_step(step + 1, policy, optimizer, metrics, state, seconds=..., tokens=...)
        run.finish(steps=steps)

    Raises UserError if --out cannot take this run: it is a file, a folder of something else, or a run with other
    arguments.
    """

    writes = True  # False in all but the first of several processes

    def __init__(self, args, stage: str):
        self.out, self.stage, self.restart = Path(args.out), stage, args.restart
        self.arguments_file = self.out / "train_args.json"
        self.checkpoint_file = self.out / "checkpoint.safetensors"
        self.arguments = {"stage": stage, **vars(args)}
        own_reward = bool(vars(args).get("reward"))  # PPO then reads no scorer
        for name in INPUTS:
            value = vars(args).get(name)
            if value and not (own_reward and name == "scorer") and (content := fingerprint(value)):
                self.arguments[f"content of --{name}"] = content
        self.then = f"; the same command {'without --restart ' if args.restart else ''}continues"
        self.asked_to_stop = 0  # the signal
        self.in_step = False
        self.finished = self._in_first(self._check_folder)
        if self.finished:
            print(f"{self.out} is finished already; --restart begins anew")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _check_folder(self) -> bool:
        """Refuse --out unless it is free, or a run of this stage with these arguments. Is the run in it finished?"""
        existing = next(path for path in (self.out, *self.out.absolute().parents) if path.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        check(writable, f"--out {self.out}: {existing} is not a folder that can be written; name another place")
        not_model = self.out.resolve() != Path(self.arguments["model"]).resolve()
        check(not_model, f"--out {self.out} is the folder of --model; name another place")
        if not any(self.out.glob("[!.]*")):
            return False
        before, now = {}, self.arguments
        with contextlib.suppress(OSError, ValueError, TypeError):
            before = dict(json.loads(self.arguments_file.read_text()))
        ours = before.get("stage") == self.stage
        check(ours, f"--out {self.out} exists and is no run of train_{self.stage}.py; name another place")
        if self.restart:
            return False
        # An argument that only one of them knows belongs to another version of this project.
        for name in sorted(before.keys() & now.keys() - FREE_ARGUMENTS):
            differs = f"--{name.replace('_', '-')} {before[name]}, now it is {now[name]}"
            says = f"{self.out} was begun with {f'other {name}' if name.startswith('content') else differs}"
            check(before[name] == now[name], f"{says}; use the old one, --restart to begin anew, or another --out")
        finished = (self.out / "summary.json").exists()
        if finished:
            self._remove(*WORK)  # a kill may have come between the summary and this
        return finished

    # --- steps

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The numbers of the steps from `first` to `last` - 1, under a progress bar."""
        self.progress = bar(total=last, initial=first, desc=self.stage)
        self.last_step, self.in_step = last, True
        began, cpu_began = time.monotonic(), time.process_time()
        for step in range(first, last):
            yield step
            self.progress.update()
            if step == first + 2:
                self._say_how_long(last - first, time.monotonic() - began, time.process_time() - cpu_began)
        self.in_step = False
        self.progress.close()

    def _say_how_long(self, steps: int, seconds: float, cpu_seconds: float) -> None:
        """After three steps, which took this long: say how long all will take, if that is more than a minute."""
        import torch

        minutes, cores, threads = seconds / 3 * steps / 60, cpu_seconds / seconds, torch.get_num_threads()
        if minutes > 1:
            self.progress.write(f"{self.stage}: {steps} steps will take about {minutes:.0f} minutes")
            if threads > 1 and cores < 0.75 * threads:
                got = f"{cores:.1f} of {threads} cores"
                warn(f"other programs are busy: this one gets {got}; OMP_NUM_THREADS=1 may be several times as fast")

    def end_step(self, step, policy, optimizer, metrics, state, *, seconds, tokens, show=None, checkpoint=False):
        """End step number `step`, counted from 1: log it, write a checkpoint if one is due, leave if a signal asked.

        Args:
            metrics: the line of metrics.jsonl, a dict.
            state: the dict that `load` returns after a kill, beside "step"; JSON must hold it exactly.
            seconds, tokens: the line of timings.jsonl.
            show: figures for the progress bar.
            checkpoint: write one now, beside those every --checkpoint-every steps and after the last step.
        """
        self.log(step, **metrics)
        memory = peak_memory_mb(self.arguments.get("device", "auto"))
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory_mb": memory}
        self._append("timings.jsonl", {"step": step, **speed})
        self.progress.set_postfix({name: float(x) for name, x in (show or {}).items()})
        number = self._in_first(lambda: self.asked_to_stop)  # a signal to torchrun reaches every process
        if checkpoint or number or step == self.last_step or step % self.arguments["checkpoint_every"] == 0:
            self.save(policy, optimizer, {**state, "step": step})
        if number:
            self.progress.close()
            name = signal.Signals(number).name
            raise Stopped(f"{name}: stopped at a checkpoint{self.then}", 128 + number)

    def _on_signal(self, number: int, frame) -> None:
        """SIGINT and SIGTERM wait for the end of a step; outside of steps, and the second time, they do not."""
        if self.asked_to_stop or not self.in_step:
            stop_now(number, frame, self.then)
        self.asked_to_stop = number
        if sys.stderr.isatty():
            os.write(2, b"\nfinishing the step (again to leave at once)\n")  # print is not safe in a signal handler

    def log(self, step: int, **metrics) -> None:
        """One line of metrics.jsonl; tensors become numbers here."""
        self._append("metrics.jsonl", {"step": step, **metrics})

    def log_sample(self, **fields) -> None:
        """One line of samples.jsonl: a question that the model asked."""
        self._append("samples.jsonl", fields)

    def _append(self, name: str, line: dict) -> None:
        if self.writes:
            append_jsonl(self.out / name, {key: _number(value) for key, value in line.items()})

    # --- checkpoint

    def load(self, policy, optimizer) -> dict:
        """Take the folder, put back what the checkpoint holds, and return its `state`; {} for a new run."""
        from safetensors import SafetensorError

        try:
            state = self._in_first(self._open_folder)
            if "step" not in state:
                return {}
            parameters, moments = policy.trainable(), []
            tensors = self._read_tensors(state, parameters, policy.device)
            kinds = {name.partition(".")[0] for name in tensors} - {"weight"}
            for name, parameter in parameters.items():
                parameter.data.copy_(tensors[f"weight.{name}"])
                moments.append({kind: tensors[key] for kind in kinds if (key := f"{kind}.{name}") in tensors})
        except (SafetensorError, KeyError, FileNotFoundError) as error:
            raise UserError(f"{self.checkpoint_file} cannot be read ({error}); --restart begins anew") from None
        # The optimiser puts moments and step counts on the right device, in the right type.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(moments))})
        print(f"continuing {self.out} after step {state['step']}")
        return state

    def _open_folder(self) -> dict:
        """Make the folder this run's own and cut its logs; the state in its checkpoint, {} if there is none.

        Nothing is written before this, so a mistake in the inputs leaves no trace.
        """
        from safetensors import safe_open

        self.out.mkdir(parents=True, exist_ok=True)
        self._locked = open(self.out / ".lock", "ab")  # noqa: SIM115 (open, and so locked, until the process ends)
        check(lock(self._locked), f"--out {self.out}: another process is at work there; wait for it or stop it")
        if self.restart:
            # The arguments last: a kill on the way leaves the old run without a checkpoint, or the new run.
            self._remove("summary.json", *MODEL, "checkpoint*", *LOGS)
        if self.restart or not self.arguments_file.exists():
            atomic_write(self.arguments_file, json.dumps(self.arguments, indent=2) + "\n")
        state = {"log_lengths": {}}
        if self.checkpoint_file.exists():
            with safe_open(self.checkpoint_file, "pt") as file:
                state = json.loads(file.metadata()["state"])
        for log in (self.out / name for name in LOGS):
            length, size = state["log_lengths"].get(log.name, 0), log.stat().st_size if log.exists() else 0
            check(length <= size, f"{log} is shorter than at the checkpoint; put it back, or --restart to begin anew")
            if length < size:
                os.truncate(log, length)
        return state

    def save(self, policy, optimizer, state: dict) -> None:
        """Write a checkpoint: trained weights, optimiser moments, and `state`."""
        tensors = {}
        for name, parameter in policy.trainable().items():
            tensors[f"weight.{name}"] = parameter.detach()
            for kind, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{kind}.{name}"] = value
        self._write_checkpoint(tensors, state)

    def _write_checkpoint(self, tensors: dict, state: dict) -> None:
        from safetensors.torch import save_file

        logs = [self.out / name for name in LOGS if (self.out / name).exists()]
        for log in logs:
            sync(log)  # the checkpoint counts on these lines: they must be on the disk before it
        state = {**state, "log_lengths": {log.name: log.stat().st_size for log in logs}}
        with replacing(self.checkpoint_file) as temporary:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, {"state": to_json(state)})

    def finish(self, **summary) -> None:
        """The end: summary.json marks the run as finished, and files that only served the work are removed."""
        if self.writes:
            summary = {name: _number(value) for name, value in summary.items()}
            atomic_write(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
            self._remove(*WORK)

    def _remove(self, *patterns: str) -> None:
        for path in (path for pattern in patterns for path in self.out.glob(pattern)):
            remove(path)

    # --- what several processes do in another way (engine/distributed.py)

    def _in_first(self, function):
        """Call `function` in the first process; all get what it returns, or the UserError that it raises."""
        return function()

    def _read_tensors(self, state: dict, parameters: dict, device) -> dict:
        """The tensors of the checkpoint with this state, by name, each spread as its parameter is."""
        from safetensors.torch import load_file

        return load_file(self.checkpoint_file, device=str(device))


def _number(x):
    """A value for JSON: a tensor as a Python number, a float cut to seven digits, NaN and infinity as null."""
    x = x.item() if hasattr(x, "item") else x
    if isinstance(x, float):
        return float(f"{x:.7g}") if math.isfinite(x) else None
    return x


def peak_memory_mb(device: str = "auto") -> float:
    """The most memory this process has held so far, in MB; the GPU's where it computes on one (--device)."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- inputs ---------------------------------------------------------------------------------------------------------

READ_LAST = 64 << 20  # bytes of a file of weights: training changes weights everywhere


def fingerprint(name: str) -> str | None:
    """Sixteen hexadecimal digits: a hash of the file or folder `name`, or of the module in MODULE:FUNCTION.

    None where there is no such file: a Hub id, an address or a built-in name stands for its content.
    """
    if name in BUILT_IN:
        return None
    path, module = Path(name), Path(name.partition(":")[0].replace(".", "/") + ".py")
    found = (file for file in [path, *sorted(path.rglob("*"))] if file.suffix.lower() in ENDINGS)
    files = [file for file in [module, *found] if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            if file.suffix == ".safetensors":
                stream.seek(max(0, size - READ_LAST))
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16] if files else None
