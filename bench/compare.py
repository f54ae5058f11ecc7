"""This project beside TRL, step by step in turns: seconds, memory, losses.

    python bench/compare.py sft --trl-python .venv-trl/bin/python
    python bench/compare.py dpo --lora-rank 16 --batch 4
    python bench/compare.py ppo --trl-python .venv-trl-ppo/bin/python --batch 16
    python bench/compare.py generate --batch 16

Each side is a process of its own, in an environment of its own (bench/requirements.txt), with the same weights, token
ids, batches, precision and threads. The sides take turns, one step each, and sleep while the other works, so that
other work on the machine hits both. The first --warm-up steps are not counted.
"""

import argparse
import json
import os
import random
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
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()
    if args.trl_python and not shutil.which(args.trl_python):
        sys.exit(f'error: --trl-python {args.trl_python}: not there; `make bench` makes it, "" runs our side alone')
    args.batch = args.batch or {"sft": 8, "dpo": 4, "ppo": 16, "generate": 16}[args.work]
    args.new_tokens = args.new_tokens or {"ppo": 32, "generate": 64}.get(args.work, 0)
    return args


def make_rows(args) -> tuple[list[dict], str]:
    """Token ids of prompt, chosen and rejected (another text's question), and the folder of the model."""
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

    def __init__(self, name: str, python: str, script: str, plan: Path, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.name, self.log = name, plan.with_name(f"{name}.log")
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
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

    def step(self) -> dict:
        """Let it run a step -> seconds, cpu_seconds, peak_mb and, where there is one, loss."""
        print("go", file=self.process.stdin, flush=True)
        self.steps.append(self.answer())
        return self.steps[-1]

    def end(self) -> None:
        print("end", file=self.process.stdin, flush=True)


def median_and_range(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})"


def report(args, sides: list[Side]) -> None:
    """The figures of the counted steps: a row of the table in RESULTS.md, processor time, first and last losses."""
    counted = [side.steps[args.warm_up :] for side in sides]
    clock, processor = "-", ""
    if len(sides) == 2:
        clock, processor = (
            median_and_range([theirs[kind] / ours[kind] for ours, theirs in zip(*counted, strict=True)])
            for kind in ("seconds", "cpu_seconds")
        )
    what = f"LoRA {args.lora_rank}" if args.lora_rank else "every weight"
    cells = [
        f"{args.work}, {what}, {args.dtype}, {args.batch} x {args.samples}, {args.threads} threads",
        " / ".join(f"{statistics.median(step['seconds'] for step in steps):.2f}" for steps in counted),
        clock,
        " / ".join(f"{steps[-1]['peak_mb']:.0f}" for steps in counted),
    ]
    print("| " + " | ".join(cells) + " |")
    if processor:
        print(f"by processor seconds: {processor} times as fast")
    for side in sides:
        losses = [step["loss"] for step in side.steps if step.get("loss")]
        if losses:
            print(f"losses, {side.name}: first {losses[0]:.6f}, last {losses[-1]:.6f}")


def main():
    args = parse_arguments()
    rows, folder = make_rows(args)
    with tempfile.TemporaryDirectory() as temporary:
        plan = Path(temporary) / "plan.json"
        plan.write_text(json.dumps({**vars(args), "rows": rows, "model": folder, "folder": temporary}))
        sides = [Side("ours", sys.executable, "ours.py", plan, args.threads)]
        if args.trl_python:
            sides.append(Side("trl", args.trl_python, "trl_side.py", plan, args.threads))
        for number in range(args.steps + args.warm_up):
            for side in sides if number % 2 == 0 else sides[::-1]:  # the one that goes first changes
                told = side.step()
                loss = f", loss {told['loss']:.6f}" if told.get("loss") else ""
                print(f"step {number} {side.name}: {told['seconds']:.2f} s{loss}", file=sys.stderr, flush=True)
        for side in sides:
            side.end()
    report(args, sides)


if __name__ == "__main__":
    main()
