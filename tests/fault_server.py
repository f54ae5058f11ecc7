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

QUESTIONS = {  # two of each type, in words that a scorer fitted on the sample rows mostly recognises
    "Clarity": ["What exactly do you mean by that word?", "Could you explain what you mean by fair here?"],
    "Assumptions": ["Are you assuming that everybody wants the same?", "Why take for granted that people would obey?"],
    "Reasons and evidence": ["What evidence do you have for this claim?", "How do you know that this happens at all?"],
    "Implications and consequences": [
        "What would happen to small towns then?",
        "What would follow if everybody did so?",
    ],
    "Alternate viewpoints and perspectives": [
        "How would a teacher see this?",
        "Could others look at this differently?",
    ],
    "Cause to effect": ["Could something else have caused the change?", "Does the one really bring about the other?"],
    "Analogy": [
        "Are those two things really alike in this respect?",
        "Where does the comparison with ships break down?",
    ],
    "Fear appeal": ["How likely is the disaster that you warn of?", "Would the harm be as bad as you paint it?"],
    "Expert opinion": ["Is that doctor an expert in this very field?", "Do other experts agree with your professor?"],
}


class Seen(NamedTuple):
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict
    fault: str
    time: float


def good_question(body: dict) -> str:
    """A question of the type that was asked for."""
    text = "\n".join(message["content"] for message in body["messages"])
    asked = re.findall(r'of the type "([^"]+)"', text)
    bank = QUESTIONS.get(asked[0] if asked else "", ["What makes you so sure of all this?"])
    return bank[zlib.crc32(text.encode()) % len(bank)]


class FaultServer:
    """Listens from `with` to its end. `url` goes into --base-url; `requests` lists what came, in order.

    faults:  list of fault names, one per request in order of arrival, or a function (body, number) -> fault name
    answer:  function body -> text of a good answer
    target:  where "redirect" points to
    latency: seconds before a good answer
    """

    def __init__(self, faults=(), answer=good_question, target: str = "", latency: float = 0.0):
        self.faults, self.answer, self.target, self.latency = faults, answer, target, latency
        self.requests: list[Seen] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> "FaultServer":
        handler = type("BoundHandler", (Handler,), {"play": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def note(self, handler, body: dict) -> str:
        with self.lock:
            number = len(self.requests)
            if callable(self.faults):
                fault = self.faults(body, number)
            else:
                fault = self.faults[number] if number < len(self.faults) else "ok"
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.requests.append(Seen(handler.path, headers, body, fault, time.monotonic()))
            return fault


class Server(ThreadingHTTPServer):
    daemon_threads = True
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
        body = json.loads(raw or b"{}")
        play = self.play
        with play.lock:
            play.at_once += 1
            play.most_at_once = max(play.most_at_once, play.at_once)
        try:
            self.act(play.note(self, body), body)
        finally:
            with play.lock:
                play.at_once -= 1

    def act(self, fault: str, body: dict) -> None:
        play = self.play
        name, _, detail = fault.partition(" after ")  # "429 after 2": with Retry-After: 2
        headers = {"Retry-After": detail} if detail else {}
        if name == "ok":
            play.closing.wait(play.latency)
            self.send(200, completion(body, play.answer(body)))
        elif name in ERRORS:
            status, content = ERRORS[name]
            if name == "401":  # servers like to quote the key
                content = {**content, "message": f"Incorrect API key provided: {self.headers.get('authorization')}"}
            self.send(status, {"error": content}, headers)
        elif name == "slow":
            play.closing.wait(5)
            self.close_connection = True
        elif name == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
        elif name == "drop":
            whole = json.dumps(completion(body, play.answer(body))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[: len(whole) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif name in ANSWERS:
            text, finish, refusal = ANSWERS[name]
            self.send(200, completion(body, text, finish, refusal))
        elif name in BODIES:
            good = completion(body, play.answer(body))
            self.send(200, BODIES[name](good) if callable(BODIES[name]) else BODIES[name])
        elif name == "400 detail":  # as FastAPI words it
            self.send(400, {"detail": "Server is pinned to 'a'; requested 'b'."})
        elif name == "redirect":
            self.send(307, b"", {"Location": play.target + self.path})
        else:
            raise ValueError(f"no such fault: {fault}")

    def send(self, status: int, content, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def error(message: str, type: str | None = None, code: str | int | None = None, param: str | None = None) -> dict:
    return {"message": message, "type": type, "code": code, "param": param}


ERRORS = {  # name -> status and the error object that servers send with it
    "400": (400, error("bad parameter", "invalid_request_error")),
    "too long": (400, error("too many tokens", "invalid_request_error", "context_length_exceeded")),
    "max_tokens": (400, error("Unsupported parameter", "invalid_request_error", None, "max_tokens")),
    "400 content filter": (400, error("filtered", None, "content_filter")),
    "401": (401, error("", "invalid_request_error", "invalid_api_key")),
    "402": (402, error("Insufficient balance")),
    "403": (403, error("not in your country", "forbidden")),
    "404": (404, error("The model does not exist", "invalid_request_error", "model_not_found")),
    "429": (429, error("slow down", "requests", "rate_limit_exceeded")),
    "quota": (429, error("You exceeded your current quota", "insufficient_quota", "insufficient_quota")),
    "500": (500, error("oops", "server_error")),
    "503": (503, error("overloaded", "server_error")),
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
BODIES = {  # name -> what comes with status 200, or a function of the good body that makes it
    "empty choices": lambda good: {**good, "choices": []},
    "null choices": lambda good: {**good, "choices": None},
    "no usage": lambda good: {name: value for name, value in good.items() if name != "usage"},
    "invalid json": b'{"id": "x", "object": "chat.completion", "choices": [{"mess',
    "html": b"<html>gateway</html>",
    "json list": [1, 2, 3],
    "200 busy": {"error": error("provider is busy", None, 429)},
    "200 error": {"error": error("provider went away")},
    "200 no credit": {"error": error("add credit first", None, 402)},
}


def completion(body: dict, text, finish: str = "stop", refusal=None) -> dict:
    """A chat completion as OpenAI's API words it; tokens are counted as words."""
    sent = sum(len(message["content"].split()) for message in body.get("messages", []))
    back = len(text.split()) if isinstance(text, str) else 0
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": sent, "completion_tokens": back, "total_tokens": sent + back},
    }
