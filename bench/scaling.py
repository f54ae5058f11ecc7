"""How time and memory grow: with the completions of a prompt, the length of the context, the batch, and the data.

    python bench/scaling.py --model smollm2 --out bench/plots
    python bench/scaling.py data scorer pairs                     # only these sweeps
    python bench/scaling.py data scorer pairs --rows 1000         # and only this size

completions, context, batch   one training step (adapters of rank 16: forward, backward, update) on random tokens
data                          rows read from a CSV file and checked
scorer                        strengths of so many questions for every type, by n-grams alone
pairs                         make_pairs.py on so many rows: graded, written by a server with 64 requests under way (on
                              this machine, and answering at once), verified

Every point is a process of its own; of a training step it is the middle one of --repeat measurements. Memory is the
peak of that process, less what it held before. Writes one picture for each sweep and all numbers as scaling.json.
"""

import argparse
import contextlib
import csv
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SWEEPS = {
    # name: (what is varied, its values, (rows, context, completions) of a value)
    "completions": ("completions per prompt, 4 prompts of 200 tokens", [1, 2, 4, 8, 16], lambda n: (4, 200, n)),
    "context": ("tokens of context, 2 rows", [64, 128, 256, 512, 1024, 2048], lambda n: (2, n, 1)),
    "batch": ("rows of 200 + 16 tokens", [1, 2, 4, 8, 16], lambda n: (n, 200, 1)),
}
ROWS = [1_000, 10_000, 100_000]
ROW_SWEEPS = {
    "data": "rows of a CSV file",
    "scorer": "questions",
    "pairs": "rows, 64 requests under way",
}
QUESTION = 16  # tokens of a completion
SAMPLE_ROWS = 680  # as many as ship


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*SWEEPS, *ROW_SWEEPS]
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="sizes of data, scorer and pairs")
    parser.add_argument("--out", default="bench/plots")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)  # measure this size of the one sweep and say so
    args = parser.parse_args()
    args.sweeps = args.sweeps or names
    for name in args.sweeps:
        if name not in names:
            parser.error(f"no sweep {name!r}; there are {', '.join(names)}")
    return args


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
    """`count` rows, made from those that ship; every context is a text of its own.

    One at a time: what Python once held it keeps, and would use again where memory is measured.
    """
    from socratiq.data import load_rows

    rows = load_rows("sample")
    for i in range(count):
        row = rows[i % len(rows)]
        yield row._replace(context=f"{row.context} ({i})")


def write_rows(count: int, folder: str) -> str:
    """A CSV file of `count` rows."""
    path = Path(folder) / f"{count}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["context", "question", "type"])
        writer.writerows((row.context, row.question, row.type) for row in many_rows(count))
    return str(path)


def load_many(count: int, folder: str) -> dict:
    from socratiq.data import load_rows

    path = write_rows(count, folder)
    return measure(lambda: load_rows(path), 1)


def score_many(count: int) -> dict:
    from socratiq.scorer import Scorer

    scorer = Scorer.fit(list(many_rows(SAMPLE_ROWS)))
    rows = list(many_rows(count))
    contexts, questions = [row.context for row in rows], [row.question for row in rows]
    return measure(lambda: scorer.strengths(contexts, questions), 1)


def pair_many(count: int, folder: str) -> dict:
    import openai.resources.chat  # noqa: F401  (loaded at the first request otherwise)

    import make_pairs
    from socratiq.data import load_rows
    from socratiq.scorer import Scorer

    Scorer.fit(load_rows("sample")).save(Path(folder) / "scorer")  # none of the texts that follow, which are numbered
    with answering() as url:
        arguments = ["--data", write_rows(count, folder), "--scorer", f"{folder}/scorer", "--out", f"{folder}/p.jsonl"]
        sys.argv = ["make_pairs.py", *arguments, "--base-url", url, "--concurrency", "64"]
        point = measure(make_pairs.run, 1)
    lines = {name: (Path(folder) / f"{name}.jsonl").read_bytes().count(b"\n") for name in ("p", "p.answers")}
    return {**point, "pairs": lines["p"], "requests": lines["p.answers"]}


@contextlib.contextmanager
def answering():
    """The address of a server that answers at once, in a process of its own: what it takes is not counted."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    server = [sys.executable, str(ROOT / "tests" / "fault_server.py")]
    process = subprocess.Popen(server, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def measure_point(name: str, size: int, args) -> dict:
    """In the point's own process."""
    import torch

    torch.set_num_threads(args.threads)
    if name in SWEEPS:
        step_of = training_steps(args)
        step_of(1, 64, 1)()  # the first step makes the optimiser's moments
        return measure(step_of(*SWEEPS[name][2](size)), args.repeat)
    if name == "scorer":
        return score_many(size)
    with tempfile.TemporaryDirectory() as folder:
        return (load_many if name == "data" else pair_many)(size, folder)


def point_of(name: str, size: int, args) -> dict:
    """What a process of its own found out about this size."""
    settings = ["--model", args.model, "--dtype", args.dtype, "--threads", args.threads, "--repeat", args.repeat]
    command = [sys.executable, __file__, name, "--point", size, *settings]
    done = subprocess.run([str(x) for x in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {name} with {size:,} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


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
    if args.point:
        print("\n" + json.dumps(measure_point(args.sweeps[0], args.point, args)))
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = json.loads((out / "scaling.json").read_text()) if (out / "scaling.json").exists() else {}
    for name in args.sweeps:
        label, sizes = SWEEPS[name][:2] if name in SWEEPS else (ROW_SWEEPS[name], args.rows)
        points: dict[int, dict] = {}
        for size in sizes:
            points[size] = point = point_of(name, size, args)
            done = point.get("requests", size)
            unit = "requests" if "requests" in point else "rows"
            speed = f" {done / point['seconds']:9,.0f} {unit} a second" if name in ROW_SWEEPS else ""
            print(f"{name:12s} {size:7,d}: {point['seconds']:8.2f} s {point['mb']:7.0f} MB{speed}", flush=True)
        if len(points) > 1:
            plot(name, label, points, out)
        results[name] = points
        (out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
