"""An OpenAI-compatible chat server on loopback that misbehaves on command. Standard library only.

    with FaultServer(["429", "drop", "ok"]) as server:      one fault per request, then "ok" for ever
        ... server.url, server.requests ...

Its good answers depend on the request alone, so two runs that ask the same get the same.
"""

import json
import re
import socket
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

QUESTIONS = {  # two of each type that tests/test_make_pairs.py asks for, in words that its scorer recognises
    "Clarity": ["What exactly do you mean by that word?", "Could you explain what you mean by fair here?"],
    "Analogy": [
        "Are those two things really alike in this respect?",
        "Where does the comparison with ships break down?",
    ],
    "Fear appeal": ["How likely is the disaster that you warn of?", "Would the harm be as bad as you paint it?"],
}


class Seen(NamedTuple):
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict
    fault: str


def good_question(body: dict) -> str:
    """A question of the type that was asked for."""
    text = "\n".join(message["content"] for message in body["messages"])
    asked = re.findall(r'of the type "([^"]+)"', text)
    bank = QUESTIONS.get(asked[0] if asked else "", ["What makes you so sure of all this?"])
    return bank[zlib.crc32(text.encode()) % len(bank)]


class FaultServer:
    """Listens from `with` to its end. `url` goes into --base-url; `requests` lists what came, in order.

    faults:  names of faults, one per request in order of arrival
    answer:  function body -> text of a good answer
    target:  where "redirect" points to
    latency: seconds before a good answer
    """

    def __init__(self, faults=(), answer=good_question, target: str = "", latency: float = 0.0):
        self.faults, self.answer, self.target, self.latency = faults, answer, target, latency
        self.requests: list[Seen] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "FaultServer":
        handler = type("BoundHandler", (Handler,), {"play": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request, client_address):  # a client that was killed is no news
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    play: FaultServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        length = int(self.headers.get("content-length", 0))
        raw = self.rfile.read(length)
        if len(raw) < length:  # the client was killed while it was asking
            self.close_connection = True
            return
        body, play = json.loads(raw), self.play
        headers = {name.lower(): value for name, value in self.headers.items()}
        with play.lock:
            number = len(play.requests)
            fault = play.faults[number] if number < len(play.faults) else "ok"
            play.requests.append(Seen(self.path, headers, body, fault))
        self.act(fault, body)

    def act(self, name: str, body: dict) -> None:
        play = self.play
        good = completion(body, play.answer(body))
        if name == "ok":
            time.sleep(play.latency)
            self.send(200, good)
        elif name in RESPONSES:
            self.send(*RESPONSES[name])
        elif name in ANSWERS:
            self.send(200, completion(body, *ANSWERS[name]))
        elif name in CHANGED:
            self.send(200, {**good, **CHANGED[name]})
        elif name == "redirect":
            self.send(307, b"", {"Location": play.target + self.path})
        else:
            self.close_connection = True
            if name == "slow":
                time.sleep(5)
            elif name == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            elif name == "drop":  # half an answer
                self.send(200, good, cut=True)
            else:
                raise ValueError(f"no such fault: {name}")

    def send(self, status: int, content, headers: dict | None = None, cut: bool = False) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        data = data.replace(b"$KEY", self.headers.get("authorization", "").encode())
        self.send_response(status)
        for header, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)


def error(message: str, type: str | None = None, code: str | int | None = None, param: str | None = None) -> dict:
    return {"error": {"message": message, "type": type, "code": code, "param": param}}


RESPONSES = {  # name -> status and body; servers like to quote the key
    "400": (400, error("bad parameter", "invalid_request_error")),
    "400 detail": (400, {"detail": "Server is pinned to 'a'; requested 'b'."}),  # as FastAPI words it
    "too long": (400, error("too many tokens", "invalid_request_error", "context_length_exceeded")),
    "max_tokens": (400, error("Unsupported parameter", "invalid_request_error", None, "max_tokens")),
    "400 content filter": (400, error("filtered", None, "content_filter")),
    "401": (401, error("Incorrect API key provided: $KEY", "invalid_request_error", "invalid_api_key")),
    "402": (402, error("Insufficient balance")),
    "403": (403, error("not in your country", "forbidden")),
    "404": (404, error("The model does not exist", "invalid_request_error", "model_not_found")),
    "429": (429, error("slow down", "requests", "rate_limit_exceeded")),
    "quota": (429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota")),
    "500": (500, error("oops", "server_error")),
    "503": (503, error("overloaded", "server_error")),
    "invalid json": (200, b'{"id": "x", "object": "chat.completion", "choices": [{"mess'),
    "html": (200, b"<html>gateway</html>"),
    "json list": (200, [1, 2, 3]),
    "200 busy": (200, error("provider is busy", None, 429)),
    "200 error": (200, error("provider went away")),
    "200 no credit": (200, error("add credit first", None, 402)),
}
CHANGED = {  # name -> what is different in a good body
    "empty choices": {"choices": []},
    "null choices": {"choices": None},
    "no usage": {"usage": None},
}
ANSWERS = {  # name -> content, finish reason and refusal of an answer that holds no question
    "empty content": ("", "stop", None),
    "null content": (None, "stop", None),
    "cut off": ("What would", "length", None),
    "wordless": ("", "length", None),
    "refusal": (None, "stop", "I cannot help with that."),
    "content filter": ("", "content_filter", None),
    "parts": ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Why is that so?"}], "stop", None),
    "odd content": ({"a": 1}, "stop", None),
}


def completion(body: dict, text, finish: str = "stop", refusal=None) -> dict:
    """A chat completion as OpenAI's API words it; tokens are counted as words."""
    sent = sum(len(message["content"].split()) for message in body.get("messages", []))
    back = len(text.split()) if isinstance(text, str) else 0
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    usage = {"prompt_tokens": sent, "completion_tokens": back, "total_tokens": sent + back}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body.get("model", "")}
    return {**head, "choices": choices, "usage": usage}
