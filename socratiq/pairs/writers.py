"""Who writes the rejected questions: any OpenAI-compatible server, or the local model itself.

A writer is handed requests and returns answers. It never decides whether an answer is good: make_pairs.py does, and
asks again. Two kinds of "again" are kept apart:

    transport   no answer came (429, 5xx, timeout, a connection dropped half-way): `OpenAIWriter` waits and resends;
                the waits are counted by `--max-retries`. A Retry-After of the server is obeyed, by all threads at once.
    content     an answer came, was paid for, and is no good: a new request that shows the earlier attempts, counted by
                `--max-attempts`.

The retries of the `openai` package are switched off (max_retries=0): it would retry a used-up quota, wait for one
thread only, and send requests that `--max-requests` never sees. Redirects are not followed: a POST with a key and
somebody's text goes where the user said and nowhere else.

Nothing here imports torch or openai before a writer is built.
"""

import hashlib
import json
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from socratiq.pairs.checks import Answer, Job, Request, digest, messages
from socratiq.run.errors import UserError, warn

MAX_RETRY_AFTER = 900.0  # seconds; a server that asks for more patience than this ends the run
MAX_BACKOFF = 60.0  # seconds between two tries without a Retry-After


class RowFailed(Exception):
    """No answer for this row; others may get theirs. `transient`: a later run may have more luck."""

    def __init__(self, reason: str, transient: bool):
        super().__init__(reason)
        self.transient = transient


class LimitReached(Exception):
    """--max-requests or --max-usd leaves no room for another request."""


class Halted(Exception):
    """The run is being stopped; this request was not sent."""


# ---------------------------------------------------------------------------------------------------------------------
# Money


class Budget:
    """Counts requests, tokens and US dollars over all threads, and refuses the request that could pass a limit.

    A request is counted before it is sent, with a generous guess of its tokens, and settled when its answer names the
    true ones. A request that broke off may have been billed all the same: its guess stays counted.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        max_usd: float | None = None,
        usd_per_mtok_in: float = 0.0,
        usd_per_mtok_out: float = 0.0,
    ):
        self.max_requests, self.max_usd = max_requests, max_usd
        self.price = usd_per_mtok_in / 1e6, usd_per_mtok_out / 1e6
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.usd = self.reserved = 0.0
        self.changed = threading.Condition()

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return prompt_tokens * self.price[0] + completion_tokens * self.price[1]

    def spent(self, answer: Answer) -> None:
        """Count an answer as it is: one that an earlier run paid for, or one that cost nothing."""
        self.requests += 1
        self._add(answer)

    def open(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Take one request out of the budget -> dollars set aside for it. Raises LimitReached."""
        needed = self.cost(prompt_tokens, completion_tokens)
        with self.changed:
            # Money set aside for requests under way is mostly given back: wait for it before giving up.
            while self.max_usd is not None and self.usd + self.reserved + needed > self.max_usd and self.reserved > 0:
                self.changed.wait()
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise LimitReached(f"--max-requests {self.max_requests}")
            if self.max_usd is not None and self.usd + self.reserved + needed > self.max_usd:
                raise LimitReached(f"--max-usd {self.max_usd:g}")
            self.requests += 1
            self.reserved += needed
        return needed

    def close(self, reserved: float, answer: Answer | None = None, billed: bool = False) -> None:
        """Settle a request: by its answer, or as free, or (`billed`) as possibly paid for though nothing came back."""
        with self.changed:
            self.reserved -= reserved
            if answer is not None:
                self._add(answer)
            elif billed:
                self.usd += reserved
            self.changed.notify_all()

    def _add(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.usd += self.cost(answer.prompt_tokens, answer.completion_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# The two writers. Both have .model (the name in the answer log), .name (in the pairs), .slots (how many calls of
# .answers may run at once), .group (how many requests one call takes), .request(job) and .answers(requests).


class OpenAIWriter:
    """Asks an OpenAI-compatible server, one request a question, from as many threads as the caller runs.

    `base_url` None means the OPENAI_BASE_URL of the environment, else OpenAI's own address. `key` may be None for a
    server that wants none. `timeout` and `retry_delay` are seconds; the delay doubles with each retry.
    Raises UserError when going on is useless (wrong key, unknown model, used-up quota, a redirect), RowFailed when this
    request got no answer, LimitReached, and Halted after `halt` was set.
    """

    group = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        key: str | None = None,
        *,
        budget: Budget | None = None,
        concurrency: int = 8,
        max_tokens: int = 200,
        temperature: float | None = None,
        timeout: float = 120.0,
        max_retries: int = 8,
        retry_delay: float = 1.0,
    ):
        import openai

        key = (key or "").strip() or None
        if key and not re.fullmatch(
            r"[!-~]+", key
        ):  # the error of the HTTP library would print the header, key and all
            raise UserError("OPENAI_API_KEY holds spaces, line breaks or letters beyond ASCII; set it to the key alone")
        self.openai, self.key = openai, key
        self.model, self.name = model, f"openai:{model}"
        self.budget = budget or Budget()
        self.slots, self.max_tokens, self.temperature = concurrency, max_tokens, temperature
        self.max_retries, self.retry_delay = max_retries, retry_delay
        self.halt = threading.Event()
        self.pause_until = 0.0  # time.monotonic() before which nothing is sent: what a Retry-After asked for
        self.retries = 0  # requests sent again, over all threads
        try:
            self.client = openai.OpenAI(
                api_key=key or "none",
                base_url=base_url,
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultHttpxClient(follow_redirects=False, timeout=timeout),
            )
        except Exception as error:  # a malformed address
            raise UserError(f"--base-url {base_url}: {self.scrub(error)}") from None
        url = self.client.base_url
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"--base-url {base_url}: expected an address such as http://localhost:8000/v1")
        self.address = f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")
        if key and url.scheme == "http" and url.host not in ("localhost", "127.0.0.1", "::1"):
            warn(f"{self.address} is not https: the key travels in the clear")
        # OpenAI's newer models know only the new name of the limit, most other servers only the old one.
        self.limit_name = "max_completion_tokens" if url.host.endswith("openai.com") else "max_tokens"

    def request(self, job: Job) -> Request:
        body = {"messages": messages(job)}
        if self.temperature is not None:  # some models refuse any value but their own
            body["temperature"] = self.temperature
        return Request(job.row, len(job.attempts) + 1, body)

    def answers(self, requests: list[Request]) -> list[Answer]:
        return [self._ask(request) for request in requests]

    def _ask(self, request: Request) -> Answer:
        """One answer, over as many tries as the transport needs."""
        size = len(json.dumps(request.body["messages"], ensure_ascii=False).encode())
        for retry in range(self.max_retries + 1):
            while (pause := self.pause_until - time.monotonic()) > 0:  # another thread may prolong it meanwhile
                self._wait(pause)
            self._wait(0)
            reserved = self.budget.open(size // 2, self.max_tokens)  # never fewer tokens than the text has
            try:
                answer = read_completion(
                    self.client.chat.completions.create(
                        model=self.model, **request.body, **{self.limit_name: self.max_tokens}
                    ),
                    size,
                )
            except Exception as error:
                failure = self._judge(error)
                self.budget.close(reserved, failure.answer, failure.billed)
                if failure.answer is not None:
                    return failure.answer
                if failure.again and retry < self.max_retries:
                    self.retries += 1
                    self._back_off(retry, failure.retry_after)
                    continue
                raise failure.raises from None  # `from None`: the request in the chain carries the key
            self.budget.close(reserved, answer)
            return answer
        raise AssertionError("unreachable")

    def _back_off(self, retry: int, retry_after: float | None) -> None:
        if retry_after is not None:
            self.pause_until = max(self.pause_until, time.monotonic() + retry_after)
        else:
            delay = min(MAX_BACKOFF, self.retry_delay * 2**retry)
            self._wait(delay * random.uniform(0.75, 1.0))  # so that threads refused together do not return together

    def _wait(self, seconds: float) -> None:
        if self.halt.is_set() or self.halt.wait(max(0.0, seconds)):
            raise Halted

    def _judge(self, error: Exception) -> "Failure":
        """What to do about an exception of the openai package."""
        openai = self.openai
        if isinstance(error, openai.APITimeoutError):
            return Failure(RowFailed("the server took too long (--timeout)", True), again=True, billed=True)
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            reason = f"{type(cause).__name__} {self.scrub(cause)}" if cause else self.scrub(error)
            refused = type(cause).__name__ in ("ConnectError", "ConnectTimeout")  # nothing was sent
            return Failure(RowFailed(f"connection: {reason}", True), again=True, billed=not refused)
        if isinstance(error, openai.APIStatusError):
            return self._judge_status(error)
        if isinstance(error, (openai.OpenAIError, ValueError, BadBody)):  # 200, yet no completion in it
            return Failure(RowFailed(f"not a completion: {self.scrub(error)}", True), again=True, billed=True)
        if isinstance(error, (TypeError, AttributeError, LookupError)):  # 200, and JSON of an unheard-of shape
            return Failure(RowFailed(f"not a completion: {type(error).__name__}", True), again=True, billed=True)
        return Failure(error)

    def _judge_status(self, error) -> "Failure":
        status, code, kind = error.status_code, str(error.code or ""), str(error.type or "")
        said, where = self.scrub(server_words(error)), self.address
        if status == 401:
            hint = "the key in OPENAI_API_KEY was refused" if self.key else "it wants a key: set OPENAI_API_KEY"
            return Failure(UserError(f"{where} answered 401: {hint}"))
        if status == 402 or USED_UP & {code, kind}:
            name = code or kind or "payment required"
            return Failure(UserError(f"{where}: the quota of this account is used up ({self.scrub(name)}); top it up"))
        if status == 403:
            return Failure(UserError(f"{where} answered 403, this key may not do that: {said}"))
        if status in (404, 405):
            return Failure(
                UserError(
                    f"{where} answered {status}: no model {self.model!r} there (--api-model), or --base-url is wrong"
                )
            )
        if 300 <= status < 400:
            target = self.scrub(error.response.headers.get("location", "another address")).split("?")[0]
            return Failure(
                UserError(
                    f"{where} redirects to {target}, which was not followed; if you trust it, give it as --base-url"
                )
            )
        if "content_filter" in (code, kind) or "content_policy_violation" in (code, kind):
            return Failure(answer=Answer("", "content_filter"))
        if status in (408, 409, 425, 429) or status >= 500:
            pause = retry_after(error.response.headers)
            if pause is not None and pause > MAX_RETRY_AFTER:
                return Failure(
                    UserError(f"{where} answered {status} and asks to come back in {pause:.0f} seconds; do so")
                )
            return Failure(RowFailed(f"the server answered {status}: {said}", True), again=True, retry_after=pause)
        return Failure(RowFailed(f"the server answered {status}: {said}", False))

    def scrub(self, value) -> str:
        """A short, printable text in which neither this key nor anything that looks like one is left."""
        text = str(value)
        if self.key:
            text = text.replace(self.key, "***")
        text = re.sub(r"\b(sk|pk|key)-[\w*.-]{4,}", "***", text)
        text = "".join(c if c.isprintable() else " " for c in text)
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:197] + "..."

    def close(self) -> None:
        self.client.close()


USED_UP = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}


@dataclass
class Failure:
    """What became of a try: raise `raises` (at once, or when `again` has been tried often enough), or take `answer`."""

    raises: Exception | None = None
    answer: Answer | None = None
    again: bool = False
    retry_after: float | None = None  # seconds the server asked for
    billed: bool = False  # it may have cost money all the same


def server_words(error) -> str:
    """What the server said of an error, in OpenAI's form ({"error": {"message": ...}}) or in any other."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return body["message"]
    try:
        return error.response.text or str(error)
    except Exception:  # a body that never came, or that no encoding reads
        return str(error)


class BadBody(Exception):
    """Status 200, but no chat completion."""


def read_completion(completion, size: int) -> Answer:
    """An `Answer` from what the openai package returned. `size` (bytes sent) stands in for a missing token count."""
    choices = getattr(completion, "choices", None)
    if choices is None and getattr(completion, "object", None) != "chat.completion":
        raise BadBody(f"{type(completion).__name__} without choices")
    text, finish = "", "empty"
    if choices:
        message, finish = choices[0].message, choices[0].finish_reason or "stop"
        text = (message.content if message else "") or ""
        if message is not None and getattr(message, "refusal", None):
            text, finish = message.refusal, "refusal"
    if not isinstance(text, str):
        raise BadBody("content that is not text")
    usage = getattr(completion, "usage", None)
    sent = getattr(usage, "prompt_tokens", None)
    back = getattr(usage, "completion_tokens", None)
    sent = sent if isinstance(sent, int) else size // 4
    return Answer(text, str(finish), sent, back if isinstance(back, int) else len(text) // 4)


def retry_after(headers) -> float | None:
    """Seconds a server asks to wait, from retry-after-ms or Retry-After (a number or a date), or None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError):
        return None


class LocalWriter:
    """The SFT model itself, sampled with the prompt of another type.

    Below temperature 1 by default: a small model's plain samples are often half nonsense, and pairs of sense and
    nonsense teach DPO to write sense, not to write the type.

    Each request has a seed of its own, made of the seed, the row and the attempt. Requests come in fixed groups all the
    same, and a group of which a killed run left only some answers is sampled whole again: another batch shape rounds
    differently, and one token drawn differently is another question.
    """

    slots = 1

    def __init__(
        self,
        policy,
        tokenizer,
        model: str,
        *,
        budget: Budget | None = None,
        seed: int = 0,
        batch_size: int = 16,
        temperature: float = 0.5,
        max_prompt_tokens: int = 512,
        max_new_tokens: int = 64,
    ):
        self.policy, self.tokenizer = policy, tokenizer
        self.budget = budget or Budget()  # costs nothing, but is counted
        self.model, self.name = f"local:{model}", "local"
        self.group = batch_size
        self.settings = {
            "seed": seed,
            "temperature": temperature,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
        }
        self.halt = threading.Event()

    def request(self, job: Job) -> Request:
        body = {"context": job.context, "type": job.asked_type(), **self.settings}
        return Request(job.row, len(job.attempts) + 1, body)

    def answers(self, requests: list[Request]) -> list[Answer]:
        from socratiq.prompts import decode, encode_prompt
        from socratiq.sampling import sample

        if self.halt.is_set():
            raise Halted
        s = self.settings
        prompts = [
            encode_prompt(self.tokenizer, r.body["context"], r.body["type"], s["max_prompt_tokens"]) for r in requests
        ]
        eos = self.tokenizer.eos_token_id
        completions = sample(
            self.policy,
            prompts,
            samples_per_prompt=1,
            max_new_tokens=s["max_new_tokens"],
            eos_id=eos,
            temperature=s["temperature"],
            seeds=[int(digest([s["seed"], r.row, r.attempt])[:15], 16) for r in requests],
        )
        answers = [
            Answer(decode(self.tokenizer, ids), "stop" if ids and ids[-1] == eos else "length", len(prompt), len(ids))
            for prompt, (ids,) in zip(prompts, completions, strict=True)
        ]
        for answer in answers:
            self.budget.spent(answer)
        return answers

    def close(self) -> None:
        pass


def fingerprint(folder: str | Path) -> str:
    """A name for the weights in a folder, so that a model trained anew does not inherit the answers of the old one."""
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not files:
        return str(folder)
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()[:16]
