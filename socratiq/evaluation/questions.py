"""Let models ask, and let models read what was asked: the machinery behind `evaluate` and `ask`.

A task is one text and one type. Reading gives log pi(y_t | prompt, y_<t) for every token of every question of a task,
whoever asked it: the questions of all stages and of people hang on one prompt, which is run once (socratiq/batch.py).
"""

from __future__ import annotations

import difflib
import sys
from functools import cached_property
from typing import NamedTuple

import torch

from socratiq.batch import make_batch
from socratiq.evaluation.measures import well_formed
from socratiq.models import load_policy, load_tokenizer
from socratiq.policy import token_logprobs
from socratiq.prompts import decode, encode_completion, encode_prompt
from socratiq.run.errors import UserError, bar, warn
from socratiq.sampling import sample
from socratiq.taxonomy import TYPES, display_name
from socratiq.training import derive_seed

READ_AT_ONCE = 16  # tasks: more would take memory and no less time


class Task(NamedTuple):
    """Ask one type of question about one text."""

    place: int  # number of the text
    context: str
    type: str
    human: list[str] = []  # noqa: RUF012  (what people asked here; never changed)


class Answer(NamedTuple):
    """A question as a model asked it."""

    text: str
    ids: list[int]  # token ids, EOS included if it was drawn
    ended: bool  # it was drawn


class Model:
    """A frozen policy, its tokenizer, and how it is asked. `option` is what messages call it: "--sft"."""

    def __init__(self, name: str, option: str = "--model", device="auto", dtype="auto", max_prompt_tokens: int = 512):
        self.name, self.max_prompt_tokens = name, max_prompt_tokens
        try:
            self.tokenizer = load_tokenizer(name)
            self.policy = load_policy(name, device, dtype, trainable=False)
        except UserError as error:
            raise UserError(str(error).replace("--model", option)) from None

    def prompt(self, task: Task) -> list[int]:
        return encode_prompt(self.tokenizer, task.context, task.type, self.max_prompt_tokens)

    def ask(
        self, tasks: list[Task], samples: int, max_new_tokens: int, temperature: float, seed: int, on_token=None
    ) -> list[list[Answer]]:
        """`samples` questions for each task. What is drawn depends on seed, text and type, not on the other tasks."""
        eos = self.tokenizer.eos_token_id
        completions = sample(
            self.policy,
            [self.prompt(task) for task in tasks],
            samples,
            max_new_tokens,
            eos,
            temperature=temperature,
            seeds=[derive_seed(seed, "ask", task.context, task.type) for task in tasks],
            on_token=on_token,
        )
        return [[Answer(decode(self.tokenizer, ids), ids, ids[-1] == eos) for ids in row] for row in completions]

    def human(self, tasks: list[Task]) -> list[list[Answer]]:
        """The human questions of each task in this model's tokens."""
        return [[Answer(text, encode_completion(self.tokenizer, text), True) for text in task.human] for task in tasks]

    @torch.no_grad()
    def read(self, tasks: list[Task], answers: dict[str, list[list[Answer]]], batch_size: int, desc: str):
        """Log-probs of all answers to all tasks, whoever gave them.

        answers: by name, answers[name][task] a list of any length -> by name, one (tokens,) tensor an answer, in the
        order of tasks and answers.
        """
        found: dict[str, list[torch.Tensor]] = {name: [] for name in answers}
        batch_size = min(batch_size, READ_AT_ONCE)
        for start in bar(range(0, len(tasks), batch_size), desc=desc):
            some = range(start, min(start + batch_size, len(tasks)))
            rows = [[answer.ids for rows in answers.values() for answer in rows[t]] for t in some]
            width = max(1, max(len(row) for row in rows))
            rows = [row + [[]] * (width - len(row)) for row in rows]  # every row of a batch has the same K
            batch = make_batch([self.prompt(tasks[t]) for t in some], rows)
            logprobs = token_logprobs(self.policy, batch.to(self.policy.device))["logprobs"].cpu()
            for t, row in zip(some, logprobs, strict=True):
                place = 0
                for name, rows in answers.items():
                    for answer in rows[t]:
                        found[name].append(row[place, : len(answer.ids)])
                        place += 1
        return found


class Readings(NamedTuple):
    """Log-probs by stage: one tensor an answer, one number a token."""

    own: dict[str, list[torch.Tensor]]  # the stage's questions by the stage itself
    human: dict[str, list[torch.Tensor]]  # the human questions by the stage
    base: dict[str, list[torch.Tensor]]  # the stage's (and the human) questions by the base model
    sft: dict[str, list[torch.Tensor]]  # the stage's questions by the SFT model


def ask_all(models: dict[str, str], tasks: list[Task], args) -> tuple[dict[str, list[list[Answer]]], Readings]:
    """Answers by stage ("human" among them, first), and what the models think of them. One model in memory at a time.

    Each model is opened once to ask; base and SFT are opened once more, to read what all have asked.
    """
    answers: dict[str, list[list[Answer]]] = {"human": [[] for _ in tasks]}
    own, human, vocabularies = {}, {}, {}

    def opened(stage):
        return Model(models[stage], f"--{stage}", args.device, args.dtype, args.max_prompt_tokens)

    for stage in models:
        model = opened(stage)
        said: list[list[Answer]] = []
        with bar(total=len(tasks), desc=f"{stage} asks") as progress:
            for start in range(0, len(tasks), args.batch_size):
                some = tasks[start : start + args.batch_size]
                said += model.ask(some, args.samples_per_prompt, args.max_new_tokens, args.temperature, args.seed)
                progress.update(len(some))
        people = model.human(tasks)
        found = model.read(tasks, {stage: said, "human": people}, args.batch_size, f"{stage} reads")
        own[stage], human[stage] = found[stage], found["human"]
        answers[stage], vocabularies[stage] = said, model.tokenizer.get_vocab()
        if stage == next(iter(models)):
            answers["human"] = people
        del model  # the next one may need the room

    alike = [stage for stage in models if vocabularies[stage] == vocabularies[next(iter(models))]]
    if len(alike) < len(models):
        warn(f"only {', '.join(alike)} share a vocabulary; the others get no perplexity under base and no KL to SFT")
    by = {}
    for reader in ("base", "sft"):
        others = {stage: answers[stage] for stage in alike if stage != reader}
        by[reader] = {reader: own[reader], "human": human[reader]} if reader in alike else {}
        if reader in alike and others:
            by[reader] |= opened(reader).read(tasks, others, args.batch_size, f"{reader} reads all")
    return answers, Readings(own, human, by["base"], by["sft"])


# --- the finished model put to use ----------------------------------------------------------------------------------


class Asker:
    """A model with the scorer that ranks what it asks. `scorer` is a folder; without one nothing is ranked."""

    def __init__(self, model: str, scorer: str | None, device="auto", dtype="auto", max_prompt_tokens: int = 512):
        from socratiq.scorer.scorer import Scorer

        self.scorer = Scorer.load(scorer) if scorer else None
        self.settings = (model, "--model", device, dtype, max_prompt_tokens)
        names = [kind.name for kind in TYPES]
        found = self.scorer.types if self.scorer else names
        self.types = sorted(found, key=lambda name: (names.index(name) if name in names else len(names), name))

    @cached_property
    def model(self) -> Model:
        """Opened when it is first needed: a mistyped type should not wait for it."""
        from socratiq.scorer.language_model import open_language_model

        if self.scorer is not None:  # a scorer that was fitted with a language model ranks better with it
            _, _, device, dtype, _ = self.settings
            partner = open_language_model(self.scorer.settings.get("model", "none"), device, dtype)
            self.scorer.with_language_model(partner)
        return Model(*self.settings)

    def type_named(self, said: str) -> str:
        """The type somebody means: any spelling, how it begins, or its number in `.types`. Raises UserError if none."""
        said = " ".join(said.split())
        if said.isdecimal() and 1 <= int(said) <= len(self.types):
            return self.types[int(said) - 1]
        name = display_name(said)
        begun = [known for known in self.types if said and known.lower().startswith(said.lower())]
        if name not in self.types and len(begun) == 1:
            return begun[0]
        if name not in self.types:
            near = difflib.get_close_matches(name, self.types, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(self.types)}"
            raise UserError(f"--type {said!r}: there is no such type; {hint}")
        return name

    def is_cut(self, context: str) -> bool:
        """Whether the text is longer than the prompt may be, so that its tail will not be read."""
        longest = self.model.max_prompt_tokens
        return len(encode_prompt(self.model.tokenizer, context, self.types[0], sys.maxsize)) > longest

    def ask(
        self,
        context: str,
        types: list[str],
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_text=None,
    ) -> list[dict]:
        """For each type {"type", "questions"}, the best question first, the same question only once.

        A question is {"question", "well_formed"} and, with a scorer, "strength" of the type, the "strongest" type,
        "reward", by which they are ranked, and the "parts" of that by name. on_text(i, text) is called with the text so
        far of sample i, which is number i % samples of type i // samples; what it raises ends the work.
        """
        tasks, written = [Task(0, context, type) for type in types], {}

        def on_token(i: int, token: int) -> None:
            written.setdefault(i, []).append(token)
            on_text(i, decode(self.model.tokenizer, written[i]))

        rows = self.model.ask(tasks, samples, max_new_tokens, temperature, seed, on_token if on_text else None)
        return [
            {"type": task.type, "questions": self.ranked(task, list(dict.fromkeys(answer.text for answer in row)))}
            for task, row in zip(tasks, rows, strict=True)
        ]

    def ranked(self, task: Task, questions: list[str]) -> list[dict]:
        found = [{"question": text, "well_formed": well_formed(text, task.context)} for text in questions]
        if self.scorer is None:
            return found
        contexts = [task.context] * len(questions)
        rewards, parts = self.scorer.graded(contexts, questions, [task.type] * len(questions))
        strengths = self.scorer.strengths(contexts, questions)  # after: what graded has read is remembered
        for i, (record, strength) in enumerate(zip(found, strengths.tolist(), strict=True)):
            record["strength"] = round(strength[self.scorer.types.index(task.type)], 4)
            record["strongest"] = self.scorer.types[max(range(len(strength)), key=strength.__getitem__)]
            record["reward"] = round(rewards[i].item(), 4)
            record["parts"] = {name: round(values[i].item(), 4) for name, values in parts.items()}
        return sorted(found, key=lambda record: -record["reward"])
