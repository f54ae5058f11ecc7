"""Predicted against measured memory: socratiq/memory.py beside the peak of real runs on the CPU.

    python bench/memory_check.py                              # the whole table, both models
    python bench/memory_check.py --model smollm2 --stage sft dpo --dtype float32

Every line is one process that runs the real script for three updates on rows of equal length. What is measured is the
resident memory at its peak between loading the model and saving it (VmHWM, set back once the model is loaded), less
what the interpreter and the libraries took before. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The allocator gives freed tensors back to the system at once, so that what is resident is what is in use.
GIVE_BACK = {"SOCRATIQ_MALLOC": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
# oneDNN compiles a kernel for every new shape and keeps up to 1024: some 100 MB that no tensor takes.
GIVE_BACK["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "8"
PARTS = ("weights", "reference", "adapters", "optimiser", "gradients", "activations", "logits", "cache")
TYPE = "Clarity"
SIZES = {  # enough tokens for the weights not to hide the rest
    "tiny": {"rows": 256, "prompt": 240, "completion": 24},
    "smollm2": {"rows": 4, "prompt": 256, "completion": 24},
}
CASES = [
    {"stage": stage, "rank": rank, "half": half, "grad_checkpoint": checkpoint}
    for stage in ("sft", "dpo", "ppo", "sampling")
    for rank, half, checkpoint in (
        (16, True, False),
        (16, False, False),
        (16, True, True),
        (0, True, False),
        (0, False, False),
    )
    if not (stage == "sampling" and (rank == 0 or checkpoint))
]


def work_of(model: str, case: dict):
    from socratiq.memory import Work

    size = SIZES[model]
    samples = {"sft": 1, "dpo": 2, "ppo": 2, "sampling": 2}[case["stage"]]
    if case["stage"] == "sampling":
        size = {**size, "rows": 4 * size["rows"]}
    short = size["prompt"] + samples * size["completion"] <= 512
    return Work(**case, **size, samples=samples, copies_rows=short, packs_weights=True)


def resident(field: str) -> float:
    """A field of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_case(model: str, case: dict) -> dict:
    """In a process of its own: run the stage, say what it took and what was predicted."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train_dpo
    import train_ppo
    import train_sft
    from socratiq import memory, prompts, rewards, run, sampling, training
    from socratiq import model as models
    from socratiq.batch import make_batch

    work, stage = work_of(model, case), case["stage"]
    tokenizer = models.load_tokenizer(model)
    words = random.Random(0)
    contexts = [
        " ".join(words.choice(("dog", "tram", "tax", "farm", "film")) for _ in range(600))
        for _ in range(3 * work.rows + 8)
    ]
    question = "Why?"
    while len(prompts.encode_completion(tokenizer, question)) < work.completion:
        question = "Why " + question
    completion = prompts.encode_completion(tokenizer, question)
    encoded = [prompts.encode_prompt(tokenizer, context, TYPE, work.prompt) for context in contexts]
    shared = next(i for i in range(work.prompt) if len({prompt[i] for prompt in encoded}) > 1)
    length = round(sum(map(len, encoded)) / len(encoded))  # a cut context may come out a token or two shorter
    work = work._replace(prompt=length, completion=len(completion), shared=shared)

    # What is imported or compiled when it is first used belongs to the baseline: one short row, forward and backward.
    warm = models.load_policy("tiny", "cpu", "bfloat16" if work.half else "float32", work.rank, True)
    row = make_batch([[1] * 40] * 2, [[[5] * 9] * work.samples] * 2)
    sum(x.sum() for x in models.token_logprobs(warm, row).values()).backward()
    training.gradient_norm(warm.trainable().values())
    training.make_optimizer(warm, 1e-6).step()
    sampling.sample(warm, [[1] * 40] * 2, work.samples, 4, eos_id=-1)
    del warm, row
    gc.collect()
    baseline = resident("VmRSS")

    def set_back():
        Path("/proc/self/clear_refs").write_text("5")

    if stage == "sampling":
        policy = models.load_policy(model, "cpu", "bfloat16" if work.half else "float32", trainable=False)
        set_back()
        sampling.sample(policy, encoded[: work.rows], work.samples, work.completion, eos_id=-1)
        taken = resident("VmHWM")
    else:
        folder = Path(tempfile.mkdtemp())
        rows = [{"context": context, "question": question, "type": TYPE} for context in contexts]
        pairs = [
            {
                "prompt": prompts.build_prompt(row["context"], TYPE),
                "chosen": question,
                "rejected": question + " ",
                **row,
            }
            for row in rows
        ]
        for pair in pairs:
            pair["rejected"] = question.replace("Why", "How")
        for name, lines in (("rows", rows), ("pairs", pairs)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments = {
            "sft": ["--data", folder / "rows.jsonl", "--batch-size", work.rows],
            "dpo": ["--pairs", folder / "pairs.jsonl", "--batch-size", work.rows],
            "ppo": [
                *(
                    "--data",
                    folder / "rows.jsonl",
                    "--batch-size",
                    2 * work.rows,
                    "--minibatches",
                    2,
                    "--ppo-epochs",
                    1,
                ),
                *(
                    "--samples-per-prompt",
                    work.samples,
                    "--max-new-tokens",
                    work.completion,
                    "--eval-prompts",
                    work.rows,
                ),
            ],
        }[stage]
        arguments += ["--model", model, "--device", "cpu", "--dtype", "bfloat16" if work.half else "float32"]
        arguments += [
            "--lora-rank",
            work.rank,
            "--max-prompt-tokens",
            SIZES[model]["prompt"],
            "--steps",
            3,
            "--lr",
            1e-6,
        ]
        arguments += ["--out", folder / "out"] + ["--grad-checkpoint"] * work.grad_checkpoint
        taken = 0.0

        def save_policy(*_):
            nonlocal taken
            taken = resident("VmHWM")

        load = run.Run.load

        def load_and_set_back(self, policy, optimizer):
            set_back()
            return load(self, policy, optimizer)

        def no_reward(contexts, questions, types):
            return torch.zeros(len(questions)), {}

        sample = sampling.sample
        models.save_policy, run.Run.load = save_policy, load_and_set_back
        rewards.load_reward = lambda *_: rewards.Reward(no_reward, [TYPE])
        sampling.sample = lambda policy, prompts, samples, length, eos, **rest: sample(
            policy, prompts, samples, length, -1, **rest
        )
        sys.argv = [stage, *map(str, arguments)]
        {"sft": train_sft, "dpo": train_dpo, "ppo": train_ppo}[stage].run_stage()
        work = work._replace(rollout=2 * work.rows)
    predicted = memory.estimate(memory.SHAPES[model], work)
    return {"measured": taken - baseline, "baseline": baseline, **predicted}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--stage", nargs="+", default=None, choices=["sft", "dpo", "ppo", "sampling"])
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16", "float32"],
        choices=["bfloat16", "float32"],
        help="without instructions for bfloat16 a CPU is a hundred times slower in it",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print("RESULT " + json.dumps(run_case(args.model[0], json.loads(args.case))))
        return
    print("| model | stage | trained | precision | predicted MB | measured MB | ratio | highest at, MB of each part |")
    print("|---|---|---|---|---:|---:|---:|---|")
    worst = 0.0
    for model in args.model:
        for case in CASES:
            precision = "bfloat16" if case["half"] else "float32"
            if precision not in args.dtype or (args.stage and case["stage"] not in args.stage):
                continue
            command = [sys.executable, __file__, "--model", model, "--case", json.dumps(case)]
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **GIVE_BACK}, capture_output=True, text=True)
            result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not result:
                sys.exit(done.stderr[-3000:])
            found = json.loads(result[0][7:])
            ratio = found["total"] / found["measured"]
            worst = max(worst, abs(ratio - 1))
            trained = ("rank 16" if case["rank"] else "all") + (", checkpoints" if case["grad_checkpoint"] else "")
            parts = ", ".join(f"{name} {found[name] / 1e6:.0f}" for name in PARTS if found.get(name, 0) > 5e5)
            cells = (
                model,
                case["stage"],
                "-" if case["stage"] == "sampling" else trained,
                precision,
                f"{found['total'] / 1e6:.0f}",
                f"{found['measured'] / 1e6:.0f}",
                f"{ratio:.2f}",
                f"{found['at']}: {parts}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nLargest deviation: {worst:.0%}")


if __name__ == "__main__":
    main()
