"""Every stage asks every type of question about every held-out text; the base model then reads all the questions.

One model is in memory at a time, and each is opened once. A question is a record, a dict with "context" (the number of
its text), "type", "question" and "eos" (whether the end-of-sequence token was drawn).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from socratiq.batch import make_batch
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import token_logprobs
from socratiq.prompts import decode, encode_completion, encode_prompt
from socratiq.run.errors import UserError, bar
from socratiq.sampling import sample
from socratiq.training import derive_seed, generator

SAMPLED_AT_ONCE, READ_AT_ONCE = 96, 16  # questions; prompts


class Task(NamedTuple):
    """Ask one type of question about one text."""

    number: int  # of the text
    context: str
    type: str


def choose_tasks(held_out_rows, types: list[str], limit: int, seed: int) -> list[Task]:
    """A task for every type and each of at most `limit` held-out texts, drawn at random."""
    contexts = list(dict.fromkeys(row.context for row in held_out_rows))
    drawn = torch.randperm(len(contexts), generator=generator(seed, "evaluated texts"))[:limit].tolist()
    return [Task(number, contexts[i], name) for number, i in enumerate(sorted(drawn)) for name in types]


def ask_people(held_out_rows, tasks: list[Task]) -> list[dict]:
    """The records of the human questions of each task, without those that a human called bad."""
    found = []
    for task in tasks:
        for row in held_out_rows:
            if (row.context, row.type) == (task.context, task.type) and row.preference != "rejected":
                found.append({"context": task.number, "type": task.type, "question": row.question, "eos": True})
    return found


def ask_models(models: dict[str, str], tasks: list[Task], records: dict[str, list[dict]], args) -> None:
    """Add the records of each stage to `records`. The base model comes last, for it reads the questions of all."""
    for stage in sorted(models, key=lambda stage: stage == "base"):
        try:
            tokenizer = load_tokenizer(models[stage])
            policy = load_policy(models[stage], args.device, args.dtype, trainable=False, plain=args.plain)
        except UserError as error:
            raise UserError(str(error).replace("--model", f"--{stage}")) from None
        records[stage] = ask(policy, tokenizer, tasks, args, f"{stage} asks")
        if stage == "base":
            read(policy, tokenizer, tasks, [record for of_stage in records.values() for record in of_stage], args)
        del policy  # the next one may need the room


def ask(policy, tokenizer, tasks: list[Task], args, title: str) -> list[dict]:
    """--samples-per-prompt records for each task. A question depends on seed, text and type, not on the other tasks."""
    records, samples, eos = [], args.samples_per_prompt, tokenizer.eos_token_id
    at_once = max(1, SAMPLED_AT_ONCE // samples)
    for start in bar(range(0, len(tasks), at_once), desc=title):
        some = tasks[start : start + at_once]
        prompts = [encode_prompt(tokenizer, task.context, task.type, args.max_prompt_tokens) for task in some]
        seeds = [derive_seed(args.seed, "ask", task.context, task.type) for task in some]
        completions = sample(policy, prompts, samples, args.max_new_tokens, eos, args.temperature, seeds)
        for task, row in zip(some, completions, strict=True):
            for ids in row:
                question = {"question": decode(tokenizer, ids), "eos": ids[-1] == eos}
                records.append({"context": task.number, "type": task.type, **question})
    return records


@torch.no_grad()
def read(policy, tokenizer, tasks: list[Task], records: list[dict], args) -> None:
    """Add "base_nats" to each record, minus the log-prob of the question given its prompt, and "base_tokens".

    All questions of a task share one prompt, which is run once (socratiq/batch.py). Texts are tokenised anew, so that
    a stage may have another vocabulary.
    """
    of_task: dict[tuple, list[dict]] = {(task.number, task.type): [] for task in tasks}
    for record in records:
        of_task[record["context"], record["type"]].append(record)
    for start in bar(range(0, len(tasks), READ_AT_ONCE), desc="base reads all"):
        some = tasks[start : start + READ_AT_ONCE]
        prompts = [encode_prompt(tokenizer, task.context, task.type, args.max_prompt_tokens) for task in some]
        groups = [of_task[task.number, task.type] for task in some]
        rows = [[encode_record(tokenizer, record) for record in group] for group in groups]
        width = max(map(len, rows))  # every row of a batch has the same K
        batch = make_batch(prompts, [row + [[]] * (width - len(row)) for row in rows])
        logprobs = token_logprobs(policy, batch.to(policy.device))["logprobs"].sum(-1).tolist()  # (B, K)
        for group, ids, sums in zip(groups, rows, logprobs, strict=True):
            for record, tokens, logprob in zip(group, ids, sums):  # noqa: B905  (sums of a filled row are longer)
                record |= {"base_nats": round(-logprob, 4), "base_tokens": len(tokens)}


def encode_record(tokenizer, record: dict) -> list[int]:
    """Token ids of a question, with EOS where it was drawn or where there is nothing else."""
    ids = encode_completion(tokenizer, record["question"])
    return ids if record["eos"] or len(ids) == 1 else ids[:-1]
