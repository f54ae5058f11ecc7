"""Answers to requests: asked for in parallel, on the disk before they are used, never asked for again."""

import hashlib
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from socratiq.run.errors import Stopped, UserError, bar, say
from socratiq.run.files import lock, to_json

GIVE_UP_AFTER = 5  # failures, one after the other, before the server is believed to be down
KEY = ("row", "model", "prompt", "attempt")


class Request(NamedTuple):
    """One text to be written. `body` holds what the answer depends on, as plain JSON, but for its longest length."""

    row: str  # digest of the row that it is for
    attempt: int  # 1, 2, ...
    body: dict


class Answer(NamedTuple):
    """A writer's answer. `finish`: the finish_reason of the API ("stop", "length" ...), "refusal", or "empty"."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoAnswer(Exception):
    """This request got no answer; others may get theirs, and a later run may get this one."""


class Refused(NoAnswer):
    """The server takes this very request neither today nor later: the text is too long, for example."""


class AnswerLog:
    """The answers so far, and their cost: an append-only file of JSON lines, open in one process at a time.

    An answer is found again by row, model, digest of the request body, and attempt. A last line that a kill cut in half
    is removed. `requests` and the tokens count earlier runs too; `prices` are US dollars for a million prompt tokens
    and a million answer tokens.
    Raises UserError if another process holds the file or a line cannot be read.
    """

    def __init__(self, path, model: str, max_requests=None, max_usd=None, prices=(0.0, 0.0)):
        self.path, self.model, self.prices = Path(path), model, prices
        self.max_requests, self.max_usd = max_requests, max_usd
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.answers: dict[tuple, Answer] = {}
        self.changing = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")  # noqa: SIM115  (open for the whole run: the lock lives with it)
        if not lock(self.file):
            raise UserError(f"{self.path}: another process writes there; wait for it or choose another --out")
        self.file.seek(0)
        *lines, rest = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(rest))
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
                key, answer = tuple(line[name] for name in KEY), Answer(*(line[name] for name in Answer._fields))
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{self.path} line {number}: no answer ({error!r}); remove the line") from None
            if line["model"] == model:
                self.requests += 1
                self._keep(key, answer)

    def _key(self, request: Request) -> tuple:
        return request.row, self.model, digest(request.body), request.attempt

    def _keep(self, key: tuple, answer: Answer) -> None:
        self.answers[key] = answer
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    @property
    def usd(self) -> float:
        return (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6

    def take(self, requests: int) -> str:
        """Count requests about to be made -> "", or the option that forbids them."""
        with self.changing:
            if self.max_requests is not None and self.requests + requests > self.max_requests:
                return f"--max-requests {self.max_requests}"
            if self.max_usd is not None and self.usd >= self.max_usd:
                return f"--max-usd {self.max_usd:g}"
            self.requests += requests
            return ""

    def get(self, request: Request) -> Answer | None:
        return self.answers.get(self._key(request))

    def add(self, requests: list[Request], answers: list[Answer]) -> None:
        """Append the answers that are new, and wait until they are on the disk. Threads may call it side by side."""
        with self.changing:
            for request, answer in zip(requests, answers, strict=True):
                key = self._key(request)
                if key not in self.answers:
                    line = to_json({**dict(zip(KEY, key, strict=True)), **answer._asdict()})
                    self.file.write(f"{line}\n".encode())
                    self._keep(key, answer)
            self.file.flush()
        os.fsync(self.file.fileno())


def digest(value) -> str:
    """Sixteen hexadecimal digits that stand for a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def ask_all(writer, requests: list[Request], log: AnswerLog, title: str) -> dict[str, str]:
    """Ask for every answer that the log lacks, each on the disk as soon as it is there -> row: why it has none.

    `writer` answers `writer.group` requests at once, in `writer.slots` threads. A group of which the log has only a
    part is asked for again as a whole: a local model rounds differently in a batch of another size.

    Raises UserError where going on is useless. Whatever is raised, a signal's Stopped too, comes after the requests
    under way have their answers on the disk, for they are paid for.
    """
    groups = [requests[i : i + writer.group] for i in range(0, len(requests), writer.group)]
    missing = [group for group in groups if any(log.get(request) is None for request in group)]
    stop, unanswered, failures = threading.Event(), {}, []

    def ask(group: list[Request]) -> None:
        limit = stop.is_set() or log.take(len(group))
        if limit:
            return unanswered.update({request.row: f"not asked: {limit}" for request in group})
        try:
            answers = writer.answers(group)
            log.add(group, answers)
            if any(answer.text.strip() or answer.finish != "length" for answer in answers):
                return failures.clear()
            failures.append("all tokens went before a word, as with reasoning models (make_pairs.py: --api-max-tokens)")
        except NoAnswer as failure:
            unanswered.update({request.row: f"no answer: {failure}" for request in group})
            if not isinstance(failure, Refused) or not log.answers:
                failures.append(str(failure))
        except BaseException:
            stop.set()
            raise
        in_a_row = list(failures)  # another thread may clear them
        if len(in_a_row) >= GIVE_UP_AFTER:
            stop.set()
            raise UserError(f"{len(in_a_row)} requests in a row came to nothing; the last: {in_a_row[-1]}")

    with ThreadPoolExecutor(writer.slots) as pool:
        try:
            for _ in bar(pool.map(ask, missing), total=len(missing), desc=title):
                pass
        except Stopped:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            say("finishing the requests under way (again to quit at once); the same command goes on from there")
            raise
        finally:
            stop.set()
    return unanswered
