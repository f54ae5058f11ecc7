"""A pair in the making: the row that needs a rejected question, what is asked for, what came back, what is wrong.

make_pairs.py runs the loop, writers.py carries the requests; here are the words that go out, the look at the words that
come in, and the log of answers on disk. No torch, no HTTP.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from socratiq.run.errors import UserError
from socratiq.run.files import lock, read_jsonl, to_json
from socratiq.scorer.gates import MARKUP, longest_run, words
from socratiq.taxonomy import TYPES, definition

# A longer text loses its tail in a request to a server: a slip in the data must not cost a fortune.
MAX_CONTEXT_CHARS = 12_000


# ---------------------------------------------------------------------------------------------------------------------
# What is asked and what came back


@dataclass
class Job:
    """One chosen question that needs a rejected counterpart. The questions written so far are in `attempts`."""

    row: str  # digest of context and question: the answers of a row are found again when other rows come or go
    index: int  # place in the data, which is the order of the pairs file
    source: str
    context: str
    type: str
    chosen: str
    chosen_score: float
    label: str = ""  # the type that the data gives the chosen question
    split: str = "train"
    other_types: list[str] = field(default_factory=list)
    attempts: list[dict] = field(default_factory=list)  # {"question", "score", "flaw"}
    rejected: str | None = None
    dropped: str | None = None  # reason, once the row is given up

    @property
    def settled(self) -> bool:
        return self.rejected is not None or self.dropped is not None

    def asked_type(self) -> str:
        """The type the next attempt asks for: round and round the other types, from a start that depends on the row."""
        return self.other_types[(int(self.row[:8], 16) + len(self.attempts)) % len(self.other_types)]


class Request(NamedTuple):
    """One question to be written. `body` is all that the answer depends on, and plain JSON."""

    row: str
    attempt: int  # 1, 2, ...
    body: dict


class Answer(NamedTuple):
    """What the writer said. `finish`: "stop", "length", "refusal", "content_filter" or "empty"."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def clean_question(text: str) -> str:
    """The question in an answer: one line, without bullets, quotes, labels, reasoning or invisible characters."""
    text = re.sub(r"\A(?:(?!<think>).)*?</think>", " ", text, flags=re.DOTALL)  # reasoning models think aloud, and
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)  # some templates open that for them
    lines = [_tidy(line) for line in text.splitlines()]
    lines = [line for line in lines if line]
    return next((line for line in lines if "?" in line), lines[0] if lines else "")


def _tidy(line: str) -> str:
    line = "".join(" " if c.isspace() else c for c in line if c.isspace() or unicodedata.category(c)[0] != "C")
    line = " ".join(line.split())
    line = re.sub(r"^(?:[-*•–]\s+|\(?\d{1,2}[.)]\s+)", "", line)
    line = re.sub(r"^\W{0,2}(?:critical )?question\W{0,2}:\W{0,2}\s*(?=\w)", "", line, flags=re.IGNORECASE)
    for left, right in ("**", "__", '""', "''", "“”", "‘’", "«»", "``"):
        while len(line) > 2 and line.startswith(left) and line.endswith(right):
            line = line[1:-1].strip()
    return line


def flaw(question: str, context: str, chosen: str = "") -> str:
    """Why this is not a well-formed question of its own about the text; "" if it is.

    The pair must differ in type, not in being a question: a rejected stub or statement would teach DPO the wrong thing.
    """
    said = words(question)
    if not said:
        return "empty"
    if MARKUP.search(question):
        return "echoes the template"
    if not question.endswith("?"):
        return "not a question"
    if question.count("?") > 1:
        return "more than one question"
    if len(said) < 3:
        return "too short"
    if len(said) > 60:
        return "too long"
    if said == words(chosen):
        return "equal to the chosen question"
    if chosen and _copies(said, words(chosen), 0.9):
        return "nearly equal to the chosen question"
    if _copies(said, words(context), 0.7):
        return "copies the text"
    return ""


def _copies(said: list[str], text: list[str], share: float) -> bool:
    """Does an unbroken run of at least `share` of the words, and no fewer than 4 of them, stand in the text?"""
    return longest_run(said, text) >= max(4, round(share * len(said)))


SYSTEM = (
    "You write critical questions about short texts. You answer with exactly one question, on one line, "
    "that ends in a question mark, and with nothing else."
)


def messages(job: Job) -> list[dict]:
    """The conversation that asks a server for the next rejected question, earlier attempts included."""
    asked = _instruction(job, job.asked_type())
    conversation = [{"role": "system", "content": SYSTEM}]
    text = job.context[:MAX_CONTEXT_CHARS]
    conversation.append({"role": "user", "content": f"Text:\n{text}\n\n{asked}"})
    shown = [attempt for attempt in job.attempts if attempt["question"]]
    if shown:
        listed = "\n".join(f"- {a['question']} ({a['flaw']})" for a in shown)
        conversation[-1]["content"] += (
            f"\n\nThese earlier tries did not do; write another question, unlike all of them:\n{listed}"
        )
    return conversation


def _instruction(job: Job, other: str) -> str:
    def explained(name: str) -> str:
        return f'"{name}" ({definition(name).rstrip(".")})' if definition(name) else f'"{name}"'

    return (
        f"Ask one critical question about this text of the type {explained(other)}.\n"
        f"It must clearly not be a question of the type {explained(job.type)}.\n"
        f"Use about {len(words(job.chosen))} words."
    )


def other_types(type: str, types: Iterable[str]) -> list[str]:
    """What a rejected question may be asked as: the data's other types, or the table's if the data knows one only."""
    return [t for t in types if t != type] or [kind.name for kind in TYPES if kind.name != type]


# ---------------------------------------------------------------------------------------------------------------------
# Answers on disk


KEY = ("row", "model", "prompt", "attempt")


class AnswerLog:
    """The answers so far, append-only, one JSON line each; an answer is on the disk before its row goes on.

    Keyed by row, model, digest of the request body, and attempt. Opened by one process at a time. A last line that a
    kill cut in half is removed. An answer that was cut off at a lower limit than the present `max_tokens` is asked for
    again. Raises UserError if another process holds the file or a line cannot be read.
    """

    def __init__(self, path: str | Path, model: str, max_tokens: int = 0):
        self.path, self.model = Path(path), model
        self.cut_short: list[tuple[tuple, Answer]] = []  # paid for, and asked for again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab")  # noqa: SIM115  (open for the whole run: the lock lives with it)
        self._lock()
        self.answers: dict[tuple, Answer] = {}
        for number, line in enumerate(read_jsonl(self.path, repair=True), 1):
            missing = [name for name in (*KEY, *Answer._fields) if name not in line]
            if missing or not isinstance(line["text"], str):
                raise UserError(f"{self.path} line {number}: no field {(missing or ['text'])[0]!r}; remove the line")
            key, answer = tuple(line[name] for name in KEY), Answer(*(line[name] for name in Answer._fields))
            if answer.finish == "length" and 0 < answer.completion_tokens < max_tokens:
                self.cut_short.append((key, answer))
            else:
                self.answers[key] = answer
        self._lock()  # again: closing the file after reading it has given the lock up

    def _lock(self) -> None:
        if not lock(self.file):
            raise UserError(f"{self.path}: another make_pairs.py writes there; wait for it or choose another --out")

    def get(self, request: Request) -> Answer | None:
        return self.answers.get(self._key(request))

    def add(self, pairs: Iterable[tuple[Request, Answer]]) -> None:
        """Append what is new; one sync for all of it. What was there stays as it is."""
        lines = []
        for request, answer in pairs:
            key = self._key(request)
            if key not in self.answers:
                self.answers[key] = answer
                lines.append(to_json({**dict(zip(KEY, key, strict=True)), **answer._asdict()}))
        if lines:
            self.file.write("".join(line + "\n" for line in lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def paid(self) -> list[Answer]:
        """Every answer of this model in the file, used or not."""
        return [answer for key, answer in [*self.answers.items(), *self.cut_short] if key[1] == self.model]

    def _key(self, request: Request) -> tuple:
        return request.row, self.model, digest(request.body), request.attempt

    def close(self) -> None:
        self.file.close()


def digest(value) -> str:
    """Sixteen hexadecimal digits that stand for a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
