"""Who writes the rejected questions: the SFT model, or any OpenAI-compatible server.

A writer is handed requests and returns answers; make_pairs.py decides whether they are good. Both have `.model` (the
name in the log of answers), `.name` (in the pairs), `.slots` (calls of `.answers` at once), `.group` (requests a call),
`.body(job)` and `.answers(requests)`.
"""

import json
import os
import re

import openai

from socratiq.pairs.answers import Answer, NoAnswer, Refused, Request, digest
from socratiq.pairs.checks import Job, messages
from socratiq.prompts import decode, encode_prompt
from socratiq.run.errors import UserError
from socratiq.sampling import sample

NO_COMPLETION = 599  # the status we give to a body that is no chat completion, though it came with status 200
HOPELESS = {
    401: "the key in OPENAI_API_KEY is missing or was refused",
    402: "the quota of this account is used up",
    403: "this key may not do that",
    404: "there is no model {model!r}, or --base-url is wrong",
}
USED_UP = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}
LIMITS = ["max_tokens", "max_completion_tokens"]  # newer models of OpenAI know only the second, most servers the first
TEMPERATURE = 0.5  # of the local writer


class OpenAIWriter:
    """Asks an OpenAI-compatible server, one request a question.

    Transport is the `openai` package's: it waits and sends again (429, 5xx, a time-out, a dropped connection) up to
    `max_retries` times, obeys Retry-After up to two minutes, and gives up after `timeout` seconds of silence. Redirects
    are not followed: a POST with a key and somebody's text goes where the user said and nowhere else.

    `base_url` None means the environment's OPENAI_BASE_URL, else OpenAI's own address; the key is the environment's
    OPENAI_API_KEY, which a server at another address may do without. The temperature is left to the server, for some
    models refuse any but their own. `client` goes to the openai package: timeout in seconds, max_retries. Raises
    UserError where going on is useless (no key, wrong key, unknown model, used-up quota, a redirect), and NoAnswer
    where this request got none.
    """

    group = 1

    def __init__(self, model: str, base_url=None, concurrency=8, max_tokens=200, **client):
        self.model, self.name, self.slots = model, f"openai:{model}", concurrency
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key or base_url or os.environ.get("OPENAI_BASE_URL")):
            raise UserError("set OPENAI_API_KEY, or give --base-url of a server that wants no key")
        if self.key and not re.fullmatch("[!-~]+", self.key):  # the HTTP library's error would print the key
            raise UserError("OPENAI_API_KEY holds spaces, line breaks or letters beyond ASCII; set it to the key alone")
        http = openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"response": [judge_body]})
        try:
            client = {"max_retries": 8, **client, "http_client": http}
            self.client = openai.OpenAI(api_key=self.key or "none", base_url=base_url, **client)
            url = self.client.base_url
            if url.scheme not in ("http", "https") or not url.host:
                raise ValueError("expected an address such as http://localhost:8000/v1")
        except Exception as error:  # of several kinds, from several packages
            raise UserError(f"--base-url {base_url}: {self.scrub(error)}") from None
        self.address = f"{url.scheme}://{url.netloc.decode()}{url.path}".rstrip("/")
        self.max_tokens, self.limits = max_tokens, LIMITS

    def body(self, job: Job) -> dict:
        return {"messages": messages(job)}

    def answers(self, requests: list[Request]) -> list[Answer]:
        try:
            return [self._ask(request.body) for request in requests]
        except openai.APIStatusError as error:
            raise self._judge(error) from None
        except openai.APITimeoutError:
            raise NoAnswer("the server took too long (make_pairs.py: --timeout)") from None
        except openai.OpenAIError as error:
            raise NoAnswer(f"connection: {self.scrub(error.__cause__ or error)}") from None
        except (TypeError, AttributeError, LookupError):  # JSON of a shape that no server should send
            raise NoAnswer("not a completion") from None

    def _ask(self, body: dict) -> Answer:
        create, (name, other) = self.client.chat.completions.with_raw_response.create, self.limits
        try:
            response = create(model=self.model, **body, **{name: self.max_tokens})
        except openai.BadRequestError as error:
            if error.param != name and other not in str(error):
                raise
            response = create(model=self.model, **body, **{other: self.max_tokens})
            self.limits = [other, name]
        return read_completion(response.http_response.json(), len(json.dumps(body)))

    def _judge(self, error: openai.APIStatusError) -> Exception:
        """The exception to raise for a status that means "no"; the one from openai would show the key."""
        status = error.status_code
        words = error.body.get("message") if isinstance(error.body, dict) else None
        said = self.scrub(words or error.response.text)
        if status in HOPELESS:
            return UserError(f"{self.address}: {HOPELESS[status].format(model=self.model)} ({said})")
        if status < 400:
            target = self.scrub(error.response.headers.get("location")).split("?")[0]
            return UserError(f"{self.address} redirects to {target}, which was not followed; give it as --base-url")
        if status == NO_COMPLETION:
            return NoAnswer(f"not a completion: {said}")
        transient = status in (408, 409, 429) or status >= 500
        return (NoAnswer if transient else Refused)(f"the server answered {status}: {said}")

    def scrub(self, value) -> str:
        """A short, printable text in which neither this key nor anything that looks like one is left."""
        text = str(value).replace(self.key or "***", "***")
        text = re.sub(r"\b(sk|pk|key)-[\w*.-]{4,}", "***", text)
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def judge_body(response) -> None:
    """Make an error in disguise a plain one before the openai package looks at it, so that it retries what it should.

    A status 200 whose body is no completion gets the code of the error in it, or one that is tried again. A used-up
    quota comes with status 429, as if waiting helped, and gets 402.
    """
    response.read()
    try:
        body = response.json()
    except ValueError:  # a proxy's page, or half an answer
        body = None
    body = body if isinstance(body, dict) else {}
    error = body.get("error") if isinstance(body.get("error"), dict) else {}
    code = str(error.get("code"))
    if response.status_code == 200 and "choices" not in body:
        response.status_code = int(code) if re.fullmatch("[45][0-9][0-9]", code) else NO_COMPLETION
    if {code, error.get("type")} & USED_UP:
        response.status_code = 402


def read_completion(body: dict, size: int) -> Answer:
    """The answer in a chat completion. `size`, of what was sent, stands in for a missing count of tokens."""
    choice = (body["choices"] or [{"finish_reason": "empty"}])[0]
    message = choice.get("message") or {}
    text, finish = message.get("content") or "", str(choice.get("finish_reason") or "stop")
    if isinstance(text, list):  # [{"type": "thinking", ...}, {"type": "text", "text": "Why?"}]
        text = "".join(part["text"] for part in text if part["type"] == "text")
    if message.get("refusal"):
        text, finish = message["refusal"], "refusal"
    usage = body.get("usage") or {}
    tokens = usage.get("prompt_tokens") or size // 4, usage.get("completion_tokens") or len(text) // 4
    return Answer(text.strip().encode(errors="ignore").decode(), finish, *tokens)  # no halves of surrogate pairs


class LocalWriter:
    """The SFT model itself, sampled with the prompt of another type.

    `settings`: seed, max_prompt_tokens, max_new_tokens. Each request has a seed of its own, made of the
    seed, the row and the attempt.
    """

    slots, name, address = 1, "local", "no server"

    def __init__(self, policy, tokenizer, model: str, batch_size: int, settings: dict):
        self.policy, self.tokenizer, self.model = policy, tokenizer, f"local:{model}"
        self.group, self.settings = batch_size, settings

    def body(self, job: Job) -> dict:
        return {"context": job.row.context, "type": job.asked_type(), **self.settings}

    def answers(self, requests: list[Request]) -> list[Answer]:
        tokenizer, eos, settings = self.tokenizer, self.tokenizer.eos_token_id, self.settings
        longest = settings["max_prompt_tokens"]
        prompts = [encode_prompt(tokenizer, r.body["context"], r.body["type"], longest) for r in requests]
        seeds = [int(digest([settings["seed"], r.row, r.attempt])[:15], 16) for r in requests]
        options = {"eos_id": eos, "temperature": TEMPERATURE, "seeds": seeds}
        completions = sample(self.policy, prompts, 1, settings["max_new_tokens"], **options)
        return [
            Answer(decode(tokenizer, ids), "stop" if eos in ids else "length", len(prompt), len(ids))
            for prompt, (ids,) in zip(prompts, completions, strict=True)
        ]
