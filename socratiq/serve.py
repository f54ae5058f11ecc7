"""`python -m socratiq.ask --serve`: a page on this machine where one pastes a text and sees questions being written.

Meant for the person at this machine and for nobody else. It listens on 127.0.0.1 only. A web page elsewhere could still
make a browser send requests here, so every request must name this server as its Host (which stops DNS rebinding), must
not come from another origin, and must be JSON, which no foreign form can send. The page's content policy admits no
script but its own, and what a model writes is only ever set as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from socratiq.ask import MOST_SERVED
from socratiq.data import clean
from socratiq.run.errors import UserError
from socratiq.scorer.gates import GATES, LOW
from socratiq.taxonomy import definition

PAGE = Path(__file__).parent / "pages" / "ask.html"
LONGEST_BODY = 64 * 1024  # bytes of a request
LONGEST_TEXT = 20_000  # characters
PATIENCE = 120.0  # seconds a request waits for the one before it
BEAT = 0.08  # seconds between two looks at the questions in the making


class Refused(Exception):
    """A request that is answered with an error status and one line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """Holds the model; requests take turns at it."""

    daemon_threads = True

    def __init__(self, asker, args):
        self.asker, self.args, self.turn = asker, args, threading.Lock()
        super().__init__(("127.0.0.1", args.serve), Handler)
        self.hosts = hosts(self.server_address[1])
        page = PAGE.read_text(encoding="utf-8")
        script = page.split("<script>")[1].split("</script>")[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        self.page = page.encode()
        self.policy = (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def settings(self) -> dict:
        return {
            "model": self.asker.model.name,
            "ranked": self.asker.scorer is not None,
            "types": [{"name": name, "definition": definition(name)} for name in self.asker.types],
            "n": self.args.n,
            "most": MOST_SERVED,
            "temperature": min(2.0, self.args.temperature),
            "longest": LONGEST_TEXT,
            "gates": {name: gate.title for name, gate in GATES.items()},
            "low": LOW,
        }


def hosts(port: int) -> set[str]:
    """What a browser may write as Host to reach this server: of port 80, which is that of http, it says nothing."""
    names = {"127.0.0.1", "localhost"}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


class Handler(BaseHTTPRequestHandler):
    """GET / the page, GET /settings what it needs to know, POST /ask the questions, line by line as they grow."""

    server: Server
    server_version, sys_version = "socratiq", ""
    timeout = 30  # seconds a client may keep silent in the middle of a request

    def do_GET(self) -> None:
        try:
            self.check_sender()
            if self.path == "/":
                self.answer(200, "text/html; charset=utf-8", self.server.page)
            elif self.path == "/settings":
                self.answer(200, "application/json", json.dumps(self.server.settings()).encode())
            else:
                raise Refused(404, "there is only /")
        except Refused as refusal:
            self.refuse(refusal)

    def do_POST(self) -> None:
        try:
            self.check_sender()
            if self.path != "/ask":
                raise Refused(404, "there is only /ask")
            wish = read_wish(self.body(), self.server.asker)
            if not self.server.turn.acquire(timeout=PATIENCE):
                raise Refused(503, "the model is busy; try again")
        except Refused as refusal:
            self.refuse(refusal)
            return
        try:
            self.stream(wish)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # the page was closed or asks for something else: the work is dropped
        finally:
            self.server.turn.release()

    def check_sender(self) -> None:
        """Only pages that this server itself has served may talk to it."""
        host = self.headers.get("Host", "").lower()
        if host not in self.server.hosts:
            raise Refused(403, "this page is only served under its own address")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{host}":
            raise Refused(403, "requests from other sites are refused")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(403, "requests from other sites are refused")

    def body(self) -> bytes:
        if self.headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the request must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise Refused(411, "the request must say its length")
        if int(length) > LONGEST_BODY:
            raise Refused(413, f"the request is longer than {LONGEST_BODY} bytes")
        try:
            return self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(408, "the request broke off") from None

    def stream(self, wish: dict) -> None:
        """Lines of JSON: {"i": n, "text": so far}, ..., then {"types": ranked, "cut": bool} or {"error": line}."""
        asker, args = self.server.asker, self.server.args
        self.send_response(200)
        self.head("application/x-ndjson")
        growing: dict[int, str] = {}
        last = time.perf_counter()

        def on_text(i: int, text: str) -> None:
            nonlocal last
            growing[i] = text
            if time.perf_counter() - last > BEAT:
                self.say(*({"i": i, "text": text} for i, text in growing.items()))
                growing.clear()
                last = time.perf_counter()

        try:
            found = asker.ask(
                wish["text"], wish["types"], wish["n"], args.max_new_tokens, wish["temperature"], wish["seed"], on_text
            )
            self.say({"types": found, "cut": asker.is_cut(wish["text"])})
        except UserError as error:
            self.say({"error": str(error)})

    def say(self, *lines: dict) -> None:
        self.wfile.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.wfile.flush()

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.head(kind, len(content))
        self.wfile.write(content)

    def refuse(self, refusal: Refused) -> None:
        self.close_connection = True
        self.answer(refusal.status, "text/plain; charset=utf-8", f"{refusal}\n".encode())

    def head(self, kind: str, length: int | None = None) -> None:
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, *anything) -> None:
        """Texts and addresses are nobody's business, the terminal's included."""


def read_wish(body: bytes, asker) -> dict:
    """The checked request: {"text", "types", "n", "temperature", "seed"}. Raises Refused."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):  # the second: brackets within brackets, thousands deep
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(said, dict) or not isinstance(said.get("text"), str):
        raise Refused(400, 'the request must be {"text": "...", "types": [...], "n": 4, "temperature": 0.8}')
    text = clean(said["text"])
    if not text:
        raise Refused(400, "the text is empty; there is nothing to ask about")
    if len(text) > LONGEST_TEXT:
        raise Refused(413, f"the text has more than {LONGEST_TEXT:,} characters; give the passage to be questioned")
    types = said.get("types") or asker.types
    if not isinstance(types, list) or not all(isinstance(name, str) and name in asker.types for name in types):
        raise Refused(400, "the types must be a list of: " + ", ".join(asker.types))
    n, temperature, seed = said.get("n", 4), said.get("temperature", 0.8), said.get("seed")
    if type(n) is not int or not 1 <= n <= MOST_SERVED:
        raise Refused(400, f"n must be a whole number from 1 to {MOST_SERVED}")
    if type(temperature) not in (int, float) or not 0 <= temperature <= 2:
        raise Refused(400, "the temperature must be a number from 0 to 2")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**31):
        raise Refused(400, "the seed must be a whole number from 0 to 2147483647")
    seed = random.getrandbits(31) if seed is None else seed
    return {"text": text, "types": list(dict.fromkeys(types)), "n": n, "temperature": float(temperature), "seed": seed}


def serve(asker, args) -> None:
    """Serve until Ctrl-C. Raises UserError if the port is taken."""
    name = asker.model.name  # opened before anybody is told that it can be asked
    try:
        server = Server(asker, args)
    except OSError as error:
        raise UserError(f"--serve {args.serve}: the port cannot be used ({error.strerror}); choose another") from None
    print(f"http://127.0.0.1:{server.server_address[1]}/ asks {name}; Ctrl-C ends it", flush=True)
    with server:
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
