"""How time and memory grow: with the completions of a prompt, the length of the context, the batch, and the data.

    python bench/scaling.py --model smollm2 --out bench/plots

Every point is one training step (adapters of rank 16: forward, backward, update) on random tokens, or one pass over so
many rows; the middle one of --repeat measurements. Memory is the peak of the process while the point is measured, less
what it held before. Writes one picture for each sweep and all numbers as scaling.json.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sweeps", nargs="+", default=["completions", "context", "batch", "data", "scorer"])
    parser.add_argument("--out", default="bench/plots")
    return parser.parse_args()


SWEEPS = {
    # name: (what is varied, its values, (rows, context, completions) of a value)
    "completions": ("completions per prompt, 4 prompts of 200 tokens", [1, 2, 4, 8, 16], lambda n: (4, 200, n)),
    "context": ("tokens of context, 2 rows", [64, 128, 256, 512, 1024, 2048], lambda n: (2, n, 1)),
    "batch": ("rows of 200 + 16 tokens", [1, 2, 4, 8, 16], lambda n: (n, 200, 1)),
}
ROWS = [1_000, 10_000, 100_000]
QUESTION = 16  # tokens of a completion


def held(field: str) -> float:
    """MB this process holds ("VmRSS") or has held at most since the last reset ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(function, repeat: int) -> dict:
    """Median seconds of `function`, and the memory it needs at its peak, in MB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, seconds = held("VmRSS"), []
    for _ in range(repeat):
        started, worked = time.perf_counter(), time.process_time()
        function()
        seconds.append((time.perf_counter() - started, time.process_time() - worked))
    return {
        "seconds": statistics.median(wall for wall, _ in seconds),
        "cpu_seconds": statistics.median(cpu for _, cpu in seconds),
        "mb": held("VmHWM") - before,
    }


def training_steps(args):
    """A function that makes a training step for (rows, context, completions)."""
    import torch

    torch.set_num_threads(args.threads)
    from socratiq import losses, training
    from socratiq.batch import make_batch
    from socratiq.model import load_policy, token_logprobs

    policy = load_policy(args.model, device="cpu", dtype=args.dtype, lora_rank=16)
    optimizer = training.make_optimizer(policy, 1e-5)
    random = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(3, policy.lm.config.vocab_size, (count,), generator=random).tolist()

    def step_of(rows, context, completions):
        prompts = [tokens(context) for _ in range(rows)]
        batch = make_batch(prompts, [[tokens(QUESTION) for _ in range(completions)] for _ in range(rows)])

        def step():
            losses.sft_loss(token_logprobs(policy, batch)["logprobs"], batch.mask).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return step_of


def many_rows(count: int):
    """`count` rows, made from those that ship; every context is a text of its own."""
    from socratiq.data import load_rows

    rows = load_rows("sample")
    return [rows[i % len(rows)]._replace(context=f"{rows[i % len(rows)].context} ({i})") for i in range(count)]


def load_many(count: int, folder: str) -> dict:
    import csv

    from socratiq.data import load_rows

    path = Path(folder) / f"{count}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["context", "question", "type"])
        writer.writerows((row.context, row.question, row.type) for row in many_rows(count))
    return measure(lambda: load_rows(str(path)), 1)


def score_many(count: int, scorer) -> dict:
    rows = [row for row in many_rows(count + count // 5) if row.type != "others"][:count]
    columns = [row.context for row in rows], [row.question for row in rows], [row.type for row in rows]
    return measure(lambda: scorer.reward(*columns), 1)


def plot(name: str, label: str, points: dict[int, dict], out: Path) -> None:
    """Time and memory against size, with the straight line through the first point for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(points)
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), dpi=80, layout="constrained")
    for axis, field, unit in zip(axes, ("cpu_seconds", "mb"), ("processor seconds", "MB at the peak"), strict=True):
        values = [points[size][field] for size in sizes]
        axis.plot(sizes, values, "o-", label="measured")
        axis.plot(sizes, [values[0] * size / sizes[0] for size in sizes], ":", color="grey", label="proportional")
        axis.set(xscale="log", yscale="log", ylabel=unit)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.supxlabel(label, fontsize="medium")
    figure.savefig(out / f"{name}.png")
    plt.close(figure)


def main():
    args = parse_arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = json.loads((out / "scaling.json").read_text()) if (out / "scaling.json").exists() else {}
    step_of = scorer = None
    for name in args.sweeps:
        points: dict[int, dict] = {}
        if name in SWEEPS:
            label, sizes, shape = SWEEPS[name]
            step_of = step_of or training_steps(args)
            step_of(1, 64, 1)()  # the first step makes the optimiser's moments
        else:
            label, sizes = "rows", ROWS
        for size in sizes:
            if name in SWEEPS:
                points[size] = measure(step_of(*shape(size)), args.repeat)
            elif name == "data":
                with tempfile.TemporaryDirectory() as folder:
                    points[size] = load_many(size, folder)
            else:
                if scorer is None:
                    from socratiq.scorer import Scorer

                    scorer = Scorer.fit(many_rows(680))
                points[size] = score_many(size, scorer)
            point = points[size]
            print(f"{name:12s} {size:7,d}: {point['seconds']:8.2f} s {point['mb']:7.0f} MB", flush=True)
        plot(name, label, points, out)
        results[name] = points
        (out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
