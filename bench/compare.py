"""This project beside TRL, step by step in turns: seconds, tokens, memory, losses.

    python bench/compare.py sft --trl-python .venv-trl/bin/python
    python bench/compare.py dpo --lora-rank 16 --batch 4
    python bench/compare.py ppo --trl-python .venv-trl-ppo/bin/python --batch 16
    python bench/compare.py generate --batch 16

Each side is a process of its own, in an environment of its own (bench/requirements.txt), with the same weights, token
ids, batches, precision, threads and allocator settings. The sides take turns, one step each, and sleep while the other
works, so that whatever else the machine does hits both. The first --warm-up steps are not counted.

Tokens are those of the rows, prompt and completion, without padding; what a side saves by not running a token twice is
its merit and not taken off. Share of the matrix-multiply peak: floating-point operations that the rows ask for, over
seconds, over the speed of the largest matrix product measured in the same run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=["sft", "dpo", "ppo", "generate"])
    parser.add_argument("--trl-python", default=".venv-trl/bin/python", help='its interpreter; "" runs our side alone')
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="sample")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains every weight")
    parser.add_argument("--batch", type=int, default=None, help="rows a step (sft 8, dpo 4, ppo and generate 16)")
    parser.add_argument("--samples", type=int, default=1, help="K, completions per prompt (ppo, generate)")
    parser.add_argument("--new-tokens", type=int, default=None, help="tokens written (ppo 32, generate 64)")
    parser.add_argument("--epochs", type=int, default=4, help="ppo: passes over a rollout")
    parser.add_argument("--minibatches", type=int, default=4, help="ppo: updates in a pass")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plain", action="store_true", help="our side without its engine")
    parser.add_argument("--default-allocator", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--json", default=None, metavar="FILE", help="append the figures to this file")
    args = parser.parse_args()
    if args.trl_python and not shutil.which(args.trl_python):
        sys.exit(f'error: --trl-python {args.trl_python}: not there; `make bench` makes it, "" runs our side alone')
    args.batch = args.batch or {"sft": 8, "dpo": 4, "ppo": 16, "generate": 16}[args.work]
    args.new_tokens = args.new_tokens or {"ppo": 32, "generate": 64}.get(args.work, 0)
    return args


def make_rows(args) -> tuple[list[dict], str]:
    """Token ids of prompt, chosen and rejected (another text's question), and the folder of the model."""
    import random

    from socratiq.data import load_rows
    from socratiq.models import load_tokenizer, resolve
    from socratiq.prompts import encode_completion, encode_prompt

    rows = [row for row in load_rows(args.data) if row.type != "others"]
    random.Random(0).shuffle(rows)
    tokenizer = load_tokenizer(args.model)
    count = args.batch * (args.steps + args.warm_up)
    asked = [encode_completion(tokenizer, rows[i % len(rows)].question) for i in range(count + 1)]
    prompts = [encode_prompt(tokenizer, row.context, row.type, 512) for row in (rows * count)[:count]]
    made = [{"prompt": prompts[i], "chosen": asked[i], "rejected": asked[i + 1]} for i in range(count)]
    return made, resolve(args.model)


class Side:
    """One process that runs a step when told to."""

    def __init__(self, name: str, python: str, script: str, plan: Path, log: Path, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.steps: list[dict] = []
        self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the side {self.name} ended early:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def tell(self, word: str) -> dict:
        print(word, file=self.process.stdin, flush=True)
        return self.answer() if word != "end" else {}


def tokens_of(args, rows: list[dict]) -> tuple[int, int]:
    """(tokens without padding, scored tokens) of one step's rows, as a trainer without any sharing would run them."""
    if args.work == "sft":
        scored = sum(len(row["chosen"]) for row in rows)
        return sum(len(row["prompt"]) for row in rows) + scored, scored
    if args.work == "dpo":
        scored = sum(len(row["chosen"]) + len(row["rejected"]) for row in rows)
        return 2 * sum(len(row["prompt"]) for row in rows) + scored, scored
    scored = len(rows) * args.samples * args.new_tokens
    return args.samples * sum(len(row["prompt"]) for row in rows) + scored, scored


def operations(args, folder: str, rows: list[dict]) -> float:
    """Floating-point operations that one step of training must do on rows without sharing.

    A weight costs 2 per token forward, 2 for the gradient of its input, 2 for its own gradient (not where it is
    frozen). The head counts on scored tokens alone. Attention: q k^T and weights times v, causal, twice that backward.
    DPO's reference adds a forward pass.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or width // heads
    layer = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * config["intermediate_size"]
    tokens, scored = tokens_of(args, rows)
    passes = (2 if args.lora_rank else 3) + (1 if args.work == "dpo" else 0)  # in units of one forward pass
    lengths = [len(row["prompt"]) + len(row[kind]) for row in rows for kind in ("chosen", "rejected")]
    lengths = lengths if args.work == "dpo" else lengths[::2]
    attention = layers * sum(2 * heads * head_dim * length**2 for length in lengths)
    attention *= 3 + (1 if args.work == "dpo" else 0)
    return passes * 2 * (layers * layer * tokens + width * config["vocab_size"] * scored) + attention


def median_and_spread(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"


def main():
    args = parse_arguments()
    rows, folder = make_rows(args)
    with tempfile.TemporaryDirectory() as temporary:
        plan = Path(temporary) / "plan.json"
        plan.write_text(
            json.dumps(
                {**vars(args), "allocator": not args.default_allocator, "rows": rows, "model": folder}
                | {"folder": temporary}
            )
        )
        sides = [Side("ours", sys.executable, "ours.py", plan, Path(temporary) / "ours.log", args.threads)]
        if args.trl_python:
            log = Path(temporary) / "trl.log"
            sides.append(Side("trl", args.trl_python, "trl_side.py", plan, log, args.threads))
        peaks = []
        for step in range(args.steps + args.warm_up):
            if step >= args.warm_up:
                peaks.append(sides[0].tell("peak")["peak"])
            for side in sides if step % 2 == 0 else sides[::-1]:  # the one that goes first changes
                told = side.tell("go")
                side.steps.append(told)
                loss = f", loss {told['loss']:.6f}" if told.get("loss") else ""
                print(f"step {step} {side.name}: {told['seconds']:.2f} s{loss}", file=sys.stderr, flush=True)
        for side in sides:
            side.tell("end")

    peak = max(peaks)
    lora = f"LoRA {args.lora_rank}" if args.lora_rank else "full"
    where = f"{args.threads} threads" if args.device == "cpu" else args.device
    print(f"{args.work}, {lora}, {args.dtype}, {args.batch} rows, K {args.samples}, {where}")
    print(f"matrix-multiply peak {peak / 1e9:.0f} GFLOP/s (measured {median_and_spread([x / 1e9 for x in peaks])})")
    figures = {"peak_gflops": peak / 1e9, **{name: getattr(args, name) for name in vars(args) if name != "json"}}
    seconds = {}
    for side in sides:
        counted = side.steps[args.warm_up :]
        seconds[side.name] = [step["seconds"] for step in counted]
        speeds, shares = [], []
        for i, step in enumerate(counted, args.warm_up):
            chunk = rows[i * args.batch : (i + 1) * args.batch]
            tokens = tokens_of(args, chunk)[args.work == "generate"]
            speeds.append(tokens / step["seconds"])
            if args.work in ("sft", "dpo"):
                shares.append(operations(args, folder, chunk) / step["seconds"] / peak)
        losses = [step["loss"] for step in side.steps if step.get("loss")]
        figures[side.name] = {
            "seconds": seconds[side.name],
            "cpu_seconds": [step["cpu_seconds"] for step in counted],
            "tokens_per_second": speeds,
            "share_of_peak": shares,
            "peak_mb": side.steps[-1]["peak_mb"],
            "losses": losses,
        }
        print(
            f"  {side.name:5s} {median_and_spread(seconds[side.name])} s a step, {median_and_spread(speeds)} tokens/s"
        )
        print(f"        peak memory {side.steps[-1]['peak_mb']:.0f} MB")
        if shares:
            print(f"        {statistics.median(shares):.0%} of the peak")
        if losses:
            print(f"        first loss {losses[0]:.5f}, last {losses[-1]:.5f}")
    if len(sides) == 2:
        pairs = list(zip(seconds["trl"], seconds["ours"], strict=True))
        figures["ratio"] = [theirs / ours for theirs, ours in pairs]
        cpu = [t / o for t, o in zip(figures["trl"]["cpu_seconds"], figures["ours"]["cpu_seconds"], strict=True)]
        figures["cpu_ratio"] = cpu
        memory = figures["ours"]["peak_mb"] / figures["trl"]["peak_mb"]
        print(f"  ours is {median_and_spread(figures['ratio'])} times as fast by the clock,")
        print(f"  {median_and_spread(cpu)} times by processor seconds, in {memory:.2f} of the memory")
    if args.json:
        with open(args.json, "a") as file:
            file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
