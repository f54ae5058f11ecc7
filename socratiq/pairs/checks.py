"""One pair: its chosen question, the request for a rejected one, the check of the answer.

make_pairs.py runs the loop, writers.py carries the requests. No torch, no HTTP.
"""

import re
import unicodedata
from dataclasses import dataclass, field

from socratiq.data import Row
from socratiq.pairs.answers import Answer, digest
from socratiq.scorer.gates import MARK, MARKUP, count_words, longest_run, words
from socratiq.taxonomy import TYPES, definition

# A longer text loses its tail in a request to a server: a slip in the data must not cost a fortune.
MAX_CONTEXT_CHARS = 12_000
SYSTEM = (
    "You write critical questions about short texts. You answer with exactly one question, on one line, "
    "that ends in a question mark, and with nothing else."
)


@dataclass
class Job:
    """A question of the data that may be `chosen`; `dropped` says why it is not. `rejected` is found by attempts."""

    row: Row
    types: dict[str, tuple[float, float]]  # name -> strength of the question, and the highest opinion of it
    attempts: list[dict] = field(default_factory=list)  # {"question", "strength", "flaw", "type"}
    rejected: str = ""
    dropped: str = ""

    def __post_init__(self):
        # A digest of text and question: the answers of a row are found again when other rows come or go.
        self.key = digest([self.row.context, self.row.question])
        self.type = max(self.types, key=lambda name: self.types[name][0])  # the recognised type, the strongest
        self.strength = self.types[self.type][0]

    def without_pair(self) -> dict:
        """Why this row gave no pair, and all that was tried: a line of FILE.dropped.jsonl."""
        reason = self.dropped or f"no rejected question: {self.attempts[-1]['flaw']}"
        figures = {"type": self.type, "strength": round(self.strength, 4), "attempts": self.attempts}
        return {"reason": reason, **self.row._asdict(), **figures}

    def asked_type(self) -> str:
        """The type the next attempt asks for: round and round the other types, from a start that depends on the row.

        If the data knows one type only, the others of the table.
        """
        others = [name for name in self.types if name != self.type]
        others = others or [kind.name for kind in TYPES if kind.name != self.type]
        return others[(int(self.key[:8], 16) + len(self.attempts)) % len(others)]

    def attempt(self, answer: Answer) -> dict:
        """The next attempt, from an answer, with its flaw as far as reading alone can tell."""
        question = clean_question(answer.text)
        wrong = flaw(question, self.row.context, self.row.question)
        if wrong and answer.finish != "stop":
            wrong = f"finish_reason {answer.finish}: {wrong}"
        return {"question": question, "strength": None, "flaw": wrong, "type": self.asked_type()}


def clean_question(text: str) -> str:
    """The question in an answer: one line, without bullets, quotes, labels, reasoning or invisible characters."""
    text = re.sub(r"\A(?:(?!<think>).)*?</think>", " ", text, flags=re.DOTALL)  # reasoning models think aloud, and
    text = re.sub(r"<think>.*?(</think>|\Z)", " ", text, flags=re.DOTALL)  # some templates open that for them
    lines = [line for line in map(_tidy, text.splitlines()) if line]
    return next((line for line in lines if set(MARK) & set(line)), lines[0] if lines else "")


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

    def copies(text: str, share: float) -> bool:
        """Does an unbroken run of at least `share` of the words, and no fewer than 4 of them, stand in the text?"""
        return longest_run(said, words(text)) >= max(4, round(share * len(said)))

    rules = {
        "empty": not said,
        "echoes the template": MARKUP.search(question),
        "not a question": not question.endswith(tuple(MARK)),
        "more than one question": sum(map(question.count, MARK)) > 1,
        "too short": len(said) < 3,
        "too long": count_words(said) > 60,
        "equal to the chosen question": said == words(chosen),
        "nearly equal to the chosen question": copies(chosen, 0.9),
        "copies the text": copies(context, 0.7),
    }
    return next((name for name, broken in rules.items() if broken), "")


def messages(job: Job) -> list[dict]:
    """The conversation that asks a server for the next rejected question, earlier attempts included."""

    def explained(name: str) -> str:
        return f'"{name}" ({definition(name).rstrip(".")})' if definition(name) else f'"{name}"'

    asked = (
        f"Text:\n{job.row.context[:MAX_CONTEXT_CHARS]}\n\n"
        f"Ask one critical question about this text of the type {explained(job.asked_type())}.\n"
        f"It must clearly not be a question of the type {explained(job.type)}.\n"
        f"Use about {len(words(job.row.question))} words."
    )
    shown = [f"- {attempt['question']} ({attempt['flaw']})" for attempt in job.attempts if attempt["question"]]
    if shown:
        asked += "\n\nThese earlier tries did not do; write another question, unlike all of them:\n" + "\n".join(shown)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
