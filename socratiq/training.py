"""What the three training loops share beside their folder (run/folder.py): optimiser, schedule, order of the rows.

Nothing here knows a loss. Whatever is random comes from a generator seeded with (seed, purpose, number of the step or
epoch), so that any step can be computed again from its number alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from socratiq.batch import Batch, make_batch
from socratiq.engine import distributed
from socratiq.run.errors import UserError, warn
from socratiq.run.files import replacing, to_json
from socratiq.run.folder import Run

# --- optimiser and schedule -----------------------------------------------------------------------------------------


def repeatable(wanted: bool) -> None:
    """Choose kernels that add in a fixed order, as those of the CPU do; where a GPU has none, PyTorch raises.

    It would only warn if asked to, but then leaves attention as it is.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrices are multiplied
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)


def make_optimizer(policy, lr: float, eps: float = 1e-8) -> torch.optim.Optimizer:
    """AdamW without weight decay on whatever is trainable, as one fused kernel where there is one."""
    fused = policy.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        policy.trainable().values(), lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=0.0, fused=fused
    )
    # What PyTorch would make in the first update, amid that step's activations, whose places then remain as holes.
    for parameter in policy.trainable().values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else None),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


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


def perplexity(loss: float) -> float:
    """exp(loss); infinity where no float can hold it."""
    return math.exp(loss) if not loss > 700 else math.inf


# --- updates, and numbers that are not finite -----------------------------------------------------------------------


class Suspect(NamedTuple):
    """One row of an update, looked at alone: what its loss is made of."""

    name: str  # where the row is from: "rows.csv row 12"
    prompt: list[int]
    completions: list[list[int]]
    tensors: dict[str, torch.Tensor]  # by name: log-probs, advantages, ...
    loss: torch.Tensor | None = None


def update(
    run: Run, policy, optimizer, step: int, lr: float, loss, max_grad_norm: float, rows: list, alone: Callable
) -> torch.Tensor | None:
    """Clip the gradient, step the optimiser, clear the gradient. Returns the gradient norm before clipping.

    A loss or gradient that is not finite never reaches the weights: `refuse` stops the run, or lets it skip the update,
    which returns None. To name the rows at fault, `alone(row)` computes the Suspect of each of `rows` once more.
    """
    parameters = list(policy.trainable().values())
    norm = gradient_norm(parameters)
    finite = math.isfinite(norm.item()) and math.isfinite(float(loss))
    if finite:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        suspects = at_fault(policy, rows, alone) if distributed.world() == 1 else []
        refuse(run, step, f"loss {float(loss):g}, gradient norm {norm.item():g}", suspects)
    return norm if finite else None


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return distributed.full_tensor(torch.nn.utils.get_total_norm(gradients))


def at_fault(policy, rows: list, alone: Callable) -> list[Suspect]:
    """The rows whose own loss or gradient is not finite; all of them if only their sum is not."""
    suspects, guilty = [alone(row) for row in rows], []
    for suspect in suspects:
        if suspect.loss.requires_grad:
            suspect.loss.backward()
        norm = gradient_norm(policy.trainable().values())
        if not (suspect.loss.isfinite() and norm.isfinite()):
            guilty.append(suspect)
        policy.zero_grad(set_to_none=True)
    return guilty or suspects


def refuse(run: Run, step: int, found: str, suspects: list[Suspect]) -> None:
    """A number that is not finite: write down the rows at fault, then stop, or warn while --skip-nonfinite allows.

    The file nonfinite/step-N.safetensors holds their token ids and tensors; `replay` reads it. The step as a whole is
    replayed by the same command: it continues from the last checkpoint and computes the same numbers again.
    """
    process = f"-process-{distributed.rank()}" if distributed.world() > 1 else ""  # each has rows of its own
    file = run.out / "nonfinite" / f"step-{step}{process}.safetensors"
    tensors, notes = {}, []
    for number, suspect in enumerate(suspects):
        notes.append({"name": suspect.name, "prompt": suspect.prompt, "completions": suspect.completions})
        tensors |= {f"{number}.{name}": x.detach().cpu().contiguous() for name, x in suspect.tensors.items()}
    with replacing(file) as temporary:
        save_file(tensors, temporary, {"step": str(step), "found": found, "rows": to_json(notes)})
    names = ", ".join(suspect.name for suspect in suspects[:3]) or "a row of this process"
    names += f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
    ranges = ", ".join(f"{name} {span(x)}" for name, x in suspects[0].tensors.items()) if suspects else "unknown"
    line = f"{run.stage} step {step}, {names}: {found} ({ranges}); the batch is in {file}"
    run.skipped += 1
    if run.skipped > run.arguments["skip_nonfinite"]:
        raise UserError(f"{line}; the weights are as before; --skip-nonfinite N goes on without it")
    warn(f"{line}; skipped")


def replay(file: str | Path) -> Iterator[tuple[str, Batch, dict[str, torch.Tensor]]]:
    """What `refuse` wrote: of each row at fault its name, its batch, and the tensors computed from it at that time.

    policy = load_policy("runs/sft", lora_rank=16)
    for name, batch, tensors in replay("runs/sft/nonfinite/step-7.safetensors"):
        print(name, tensors["logprobs"], token_logprobs(policy, batch)["logprobs"])
    """
    with safe_open(file, "pt") as stored:
        names = stored.keys()
        for number, row in enumerate(json.loads(stored.metadata()["rows"])):
            own = [name for name in names if name.startswith(f"{number}.")]
            tensors = {name.partition(".")[2]: stored.get_tensor(name) for name in own}
            yield row["name"], make_batch([row["prompt"]], [row["completions"]]), tensors


def span(x: torch.Tensor) -> str:
    """Smallest and largest finite number, and how many are not finite."""
    finite = x[x.isfinite()]
    bad = x.numel() - finite.numel()
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)
    return f"{low:.3g}..{high:.3g}" + (f" and {bad} not finite" if bad else "")
