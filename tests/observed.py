"""What a training script does, written down while it does it (a `patch` of tests/scripts.py).

Every call of the functions below appends one entry to observed.pt: name, arguments by name, result, whether gradients
were on, and whether it was the reference's. Tensors are kept as they were at the time of the call.
"""

import functools
import inspect
from pathlib import Path

WATCHED = {
    "losses": ("sequence_logps", "sft_loss", "dpo_loss", "missing_eos_penalty", "shape_rewards", "gae", "whiten",
               "policy_loss", "value_loss"),
    "policy": ("token_logprobs",),
    "sampling": ("sample",),
    "training": ("make_optimizer", "update"),
}  # fmt: skip


def watch():
    import importlib

    import torch

    entries = []

    def kept(x):
        if isinstance(x, torch.Tensor):
            return x.detach().clone()
        if isinstance(x, dict):
            return {name: kept(value) for name, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [kept(value) for value in x]
        return x if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__

    def watched(function):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args, **options):
            call = signature.bind(*args, **options)
            call.apply_defaults()
            result = function(*args, **options)
            entry = {name: kept(value) for name, value in call.arguments.items()}
            policy = call.arguments.get("policy")
            adapters = [m.enabled for m in policy.modules() if hasattr(m, "lora_A")] if policy is not None else []
            entries.append(
                entry
                | {"name": function.__name__, "result": kept(result), "gradients": torch.is_grad_enabled()}
                | {"reference": bool(adapters) and not any(adapters)}
            )
            torch.save(entries, "observed.pt")
            return result

        return wrapper

    for module_name, names in WATCHED.items():
        module = importlib.import_module(f"socratiq.{module_name}")
        for name in names:
            setattr(module, name, watched(getattr(module, name)))


def observations(folder: Path):
    """The entries of a run: names -> list of entries in order, and all of them in order under ""."""
    import torch

    entries = torch.load(folder / "observed.pt", weights_only=True)
    named = {"": entries}
    for entry in entries:
        named.setdefault(entry["name"], []).append(entry)
    return named
