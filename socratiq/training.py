"""What the three training loops share: the folder of a run with its logs and checkpoint, the optimiser, the schedule.

Nothing here knows a loss. A run can be killed at any moment: the same command continues from the last checkpoint and
ends with the same bytes as a run that was never killed. What makes that hold:

- whatever is random is drawn from a generator seeded with (seed, purpose, number of the step or epoch), so that the
  random state of any step can be rebuilt from its number alone;
- metrics.jsonl is cut back to the length it had at the checkpoint, and holds nothing that depends on the clock (that
  is in timings.jsonl);
- a checkpoint is one file, written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from socratiq import distributed
from socratiq.errors import Stopped, UserError, warn
from socratiq.files import append_jsonl, atomic_write, remove, replacing, to_json

# Arguments that do not change the result: a resumed run may differ in them.
FREE_ARGUMENTS = {"out", "restart", "checkpoint_every"}
LOGS = ("metrics.jsonl", "timings.jsonl", "samples.jsonl")


class Run:
    """The folder of one stage: arguments, logs, the checkpoint to resume from, and the summary that ends it."""

    def __init__(self, args, stage: str):
        self.out, self.stage, self.checkpoint = Path(args.out), stage, Path(args.out) / "checkpoint.safetensors"
        self.arguments = {"stage": stage, **vars(args)}
        self.started = time.perf_counter()
        self.stopping = 0  # the signal that asked us to stop
        self.skipped = 0  # updates skipped for a non-finite number
        self.finished = distributed.first(self._open)
        if self.finished:
            print(f"{self.out} is finished already; --restart begins anew")
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _open(self) -> bool:
        """Make the folder ready, or refuse it. Returns whether the run in it is finished."""
        restart = self.arguments["restart"]
        if restart:
            for name in ("train_args.json", "summary.json", "checkpoint.safetensors", "best.safetensors", *LOGS):
                remove(self.out / name)
        known = self.out / "train_args.json"
        if known.exists():
            self._compare(json.loads(known.read_text()))
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.glob("[!.]*"))) and not restart:
            raise UserError(f"--out {self.out} exists and is not a run of train_{self.stage}.py; name another place")
        finished = (self.out / "summary.json").exists()
        if not finished and not known.exists():
            atomic_write(known, json.dumps(self.arguments, indent=2) + "\n")
        return finished

    def _compare(self, before: dict) -> None:
        if before.get("stage") != self.stage:
            raise UserError(f"--out {self.out} holds a run of train_{before.get('stage')}.py; name another place")
        for name in sorted(before.keys() | self.arguments.keys()):
            if name not in FREE_ARGUMENTS and before.get(name) != self.arguments.get(name):
                option = "--" + name.replace("_", "-")
                raise UserError(
                    f"{self.out} was begun with {option} {before.get(name)}, now it is {self.arguments.get(name)}; "
                    f"use the old value, --restart to begin anew, or another --out"
                )

    def _stop(self, number, frame) -> None:
        if self.stopping:  # the second Ctrl-C means it
            raise KeyboardInterrupt
        self.stopping = number

    # --- logs

    def log(self, step: int, **metrics) -> None:
        """One line of metrics.jsonl; tensors become numbers here."""
        self._append("metrics.jsonl", {"step": step, **metrics})

    def log_time(self, step: int, seconds: float, tokens: int) -> None:
        """One line of timings.jsonl: what the clock says stays out of metrics.jsonl, which is the same in every run."""
        line = {
            "step": step,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        self._append("timings.jsonl", line)

    def sample(self, **fields) -> None:
        """One line of samples.jsonl: a question the model asked."""
        self._append("samples.jsonl", fields)

    def _append(self, name: str, line: dict) -> None:
        if distributed.rank() == 0:
            append_jsonl(self.out / name, {key: _number(x) for key, x in line.items()})

    # --- checkpoint and resume

    def save(self, policy, optimizer, **state) -> None:
        """Write the checkpoint: trained weights, optimiser moments, and `state`, which JSON must hold exactly."""
        parameters = policy.trainable()
        tensors = {f"weight.{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors = distributed.gather(tensors)
        if distributed.rank() > 0:
            return
        lengths = {name: (self.out / name).stat().st_size for name in LOGS if (self.out / name).exists()}
        state = {**state, "skipped": self.skipped, "log_lengths": lengths}
        with replacing(self.checkpoint) as temporary:
            save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, {"state": to_json(state)})

    def load(self, policy, optimizer) -> dict:
        """Put the checkpoint back, if there is one, and return its `state`; {} for a new run."""
        lengths, state = {}, {}
        if distributed.first(self.checkpoint.exists):
            with safe_open(self.checkpoint, "pt", device=str(policy.device)) as file:
                state, names = json.loads(file.metadata()["state"]), file.keys()
                for name, parameter in policy.trainable().items():
                    parameter.data.copy_(distributed.part(file.get_tensor(f"weight.{name}"), parameter))
                    prefix = f"optimizer.{name}."
                    moments = {
                        key[len(prefix) :]: distributed.part(file.get_tensor(key), parameter)
                        for key in names
                        if key.startswith(prefix)
                    }
                    if moments:
                        optimizer.state[parameter] = moments
            lengths, self.skipped = state["log_lengths"], state["skipped"]
            print(f"continuing {self.out} from its checkpoint")
        for name in LOGS:  # what was logged after the checkpoint will be logged again
            if distributed.rank() == 0 and (self.out / name).exists():
                os.truncate(self.out / name, lengths.get(name, 0))
        return state

    def leave_if_asked(self, policy, optimizer, **state) -> None:
        """After SIGINT or SIGTERM: checkpoint and leave with the signal's exit status."""
        stopping = distributed.most(self.stopping)  # one process that was asked stops all
        if stopping:
            self.save(policy, optimizer, **state)
            name = signal.Signals(stopping).name
            raise Stopped(f"{name}: stopped at a checkpoint; the same command continues", 128 + stopping)

    def finish(self, **summary) -> None:
        """The end: summary.json marks the run as finished, the checkpoint is no longer needed."""
        if distributed.rank() > 0:
            return
        summary = {name: _number(x) for name, x in summary.items()}
        atomic_write(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        remove(self.checkpoint)
        remove(self.out / "best.safetensors")


def _number(x):
    """A value for JSON: tensors as Python numbers, floats cut to seven digits, NaN and infinity as null."""
    x = x.item() if isinstance(x, torch.Tensor) else x
    if isinstance(x, float):
        return float(f"{x:.7g}") if math.isfinite(x) else None
    return x


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB (on CUDA: the GPU's)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- optimiser and schedule -----------------------------------------------------------------------------------------


def make_optimizer(policy, lr: float, eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW without weight decay on whatever is trainable, as one fused kernel where there is one."""
    fused = policy.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        policy.trainable().values(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0, fused=fused
    )


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then linear decay to zero after step `steps` - 1. Steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / max(1, steps - warmup)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator whose stream depends on the seed and the purpose ("order", epoch) alone."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A number of 63 bits, a hash of seed and purpose."""
    text = ":".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_windows(rows: int, window: int, seed: int, epoch: int) -> list[list[int]]:
    """The row numbers of one epoch in a random order, cut into windows (the last may be short)."""
    order = torch.randperm(rows, generator=generator(seed, "order", epoch)).tolist()
    return [order[start : start + window] for start in range(0, rows, window)]


def update(run: Run, policy, optimizer, step: int, lr: float, loss, max_grad_norm: float, what: dict) -> torch.Tensor:
    """Clip the gradient, step the optimiser, clear the gradient. Returns the gradient norm before clipping.

    A loss or gradient that is not finite never reaches the weights: the run stops with the step, the rows and the
    ranges of the tensors in `what`, which are saved for replay, or skips the update while --skip-nonfinite allows.
    """
    parameters = list(policy.trainable().values())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = distributed.whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm, foreach=True)
    if math.isfinite(norm.item()) and math.isfinite(float(loss)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        refuse(run, step, f"loss {float(loss):g}, gradient norm {norm.item():g}", what)
    optimizer.zero_grad(set_to_none=True)
    return norm


def refuse(run: Run, step: int, found: str, what: dict) -> None:
    """Note a non-finite number: save the tensors in `what`, then stop, or count it while --skip-nonfinite allows."""
    tensors = {name: x.detach().contiguous().cpu() for name, x in what.items() if isinstance(x, torch.Tensor)}
    process = f"-process-{distributed.rank()}" if distributed.world() > 1 else ""  # each has rows of its own
    replay = run.out / f"nonfinite-step-{step}{process}.safetensors"
    with replacing(replay) as temporary:
        save_file(tensors, temporary)
    ranges = ", ".join(f"{name} {_range(x)}" for name, x in tensors.items() if x.is_floating_point())
    rows = f", rows {what['rows']}" if "rows" in what else ""
    line = f"{run.stage} step {step}{rows}: {found} ({ranges}); the batch is in {replay}"
    run.skipped += 1
    if run.skipped > run.arguments["skip_nonfinite"]:
        raise UserError(f"{line}; the weights were not touched; a lower --lr or --skip-nonfinite N may help")
    warn(f"{line}; skipped")


def _range(x: torch.Tensor) -> str:
    finite = x[x.isfinite()]
    bad = x.numel() - finite.numel()
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)
    return f"{low:.3g}..{high:.3g}" + (f" and {bad} not finite" if bad else "")
