"""`ask` on the command line, in conversation and in the browser, with the tiny model."""

import http.client
import io
import json
import math
import socket
import sys
import threading
import types

import pytest

from socratiq import ask, serve
from socratiq.run.errors import UserError
from socratiq.scorer import gates

TEXT = "I think that dogs are good."


@pytest.fixture(scope="module")
def asker(inputs):
    from socratiq.evaluation.questions import Asker

    found = Asker("tiny", str(inputs / "scorer"), dtype="float32")
    assert found.model.name == "tiny"
    return found


@pytest.fixture
def typed(monkeypatch):
    """Standard input: not a terminal, with these bytes in it."""

    def put(content: bytes, terminal: bool = False):
        stream = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stream)

    return put


@pytest.fixture
def command(asker, inputs, monkeypatch, capsys):
    """Runs `ask` with the model that is open already; what it printed."""
    monkeypatch.setattr("socratiq.evaluation.questions.Asker", lambda *settings: asker)

    def run(*argv):
        ask.run([*argv, "--model", "tiny", "--scorer", str(inputs / "scorer"), "--max-new-tokens", "6", "--seed", "1"])
        return capsys.readouterr().out

    return run


# -------------------------------------------------------------------------------------------------------- what is asked


def test_questions_are_ranked_and_none_comes_twice(asker, monkeypatch):
    from socratiq.evaluation.questions import Task

    said = ["no question", "What do you mean by good dogs?", "Are dogs really like clouds?"]
    ranked = asker.ranked(Task(0, TEXT, "Clarity"), said)
    assert ranked[0]["question"] == said[1] and ranked[0]["strongest"] == "Clarity"
    assert [r["reward"] for r in ranked] == sorted((r["reward"] for r in ranked), reverse=True)
    assert ranked[0]["strength"] > 0.5 and ranked[0]["well_formed"]
    for record in ranked:
        strength, *gates = record["parts"].values()
        assert record["strength"] == strength and set(record["parts"]) >= {"strength", "form", "relatedness"}
        assert record["reward"] == pytest.approx(strength**0.5 * math.prod(gates), abs=0.01)  # parts are rounded
    answer = types.SimpleNamespace(text="Why?")
    monkeypatch.setattr(asker.model, "ask", lambda *_: [[answer, answer]])
    assert len(asker.ask(TEXT, ["Clarity"], 2, 6, 1.0, 0)[0]["questions"]) == 1


def test_without_a_scorer_nothing_is_ranked(asker):
    from socratiq.evaluation.questions import Asker, Task

    bare = Asker("tiny", None)
    assert len(bare.types) == 9
    assert bare.ranked(Task(0, TEXT, "Clarity"), ["b", "a"])[0] == {"question": "b", "well_formed": False}


@pytest.mark.parametrize(
    ("said", "type"),
    [
        ("Clarity", "Clarity"),
        ("clarification", "Clarity"),
        ("CLAR", "Clarity"),
        ("1", "Analogy"),
        ("comparison", "Analogy"),
    ],
)
def test_types_by_any_name(asker, said, type):
    assert asker.type_named(said) == type


@pytest.mark.parametrize(
    ("said", "hint"),
    [("Clairty", "did you mean 'Clarity'?"), ("xyz", "choose one of Analogy, Clarity"), ("3", "choose")],
)
def test_unknown_types_are_refused_with_a_hint(asker, said, hint):
    with pytest.raises(UserError) as problem:
        asker.type_named(said)
    assert hint in str(problem.value)


def test_the_text_so_far_is_told_as_it_grows(asker):
    told = []
    found = asker.ask(TEXT, ["Analogy", "Clarity"], 2, 5, 1.0, 3, lambda i, text: told.append((i, text)))
    last = dict(told)
    assert set(last) == {0, 1, 2, 3}
    assert {q["question"] for q in found[0]["questions"]} == {last[0], last[1]}
    assert {q["question"] for q in found[1]["questions"]} == {last[2], last[3]}
    assert asker.ask(TEXT, ["Analogy", "Clarity"], 2, 5, 1.0, 3) == found  # watching changes nothing


def test_long_texts_are_noticed(asker):
    assert not asker.is_cut(TEXT) and asker.is_cut(TEXT * 200)


# ---------------------------------------------------------------------------------------------------------- the command


def test_every_type_without_one_named(command):
    assert [line for line in command(TEXT).splitlines() if not line.startswith(" ")] == ["Analogy", "Clarity"]


def test_json_holds_all_that_was_drawn(command):
    found = json.loads(command(TEXT, "--json", "--n", "3", "--type", "clarity", "--type", "Clarity"))
    assert found["context"] == TEXT and found["model"] == "tiny"
    (of_type,) = found["types"]
    assert of_type["type"] == "Clarity" and 1 <= len(of_type["questions"]) <= 3
    assert set(of_type["questions"][0]) == {"question", "well_formed", "strength", "strongest", "reward", "parts"}


def test_the_best_are_shown(command):
    assert len(command(TEXT, "--type", "Clarity", "--n", "4").splitlines()) == 5
    assert len(command(TEXT, "--type", "Clarity", "--n", "4", "--show", "2").splitlines()) == 3


def test_text_from_a_file_and_from_standard_input(command, tmp_path, typed):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n")
    typed(TEXT.encode())
    said = command(TEXT)
    assert command("--file", str(file)) == said == command()
    typed(TEXT.encode(), terminal=True)
    assert command("-") == said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", "not UTF-8 text \\(byte 3\\)"),
        (b"a" * 1_000_001, "more than 1,000,000 bytes"),
        ("é".encode() * 500_001, "more than 1,000,000 bytes"),  # read up to the middle of a character
    ],
)
def test_texts_that_cannot_be_read(command, tmp_path, typed, content, problem):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        command("--file", str(tmp_path / "text.txt"))
    typed(content)
    with pytest.raises(UserError, match=f"standard input.*{problem}"):
        command()


def test_missing_files_and_models_are_one_line(command, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be read"):
        command("--file", str(tmp_path / "none.txt"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished model in runs"):
        ask.run([TEXT])


def test_the_last_finished_stage_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "config.json").write_text("{}")
    assert ask.find_model(ask.parse_arguments([TEXT])) == ("runs/sft", None)
    assert capsys.readouterr().err.count("warning:") == 2  # no ppo, no scorer
    (tmp_path / "runs" / "scorer").mkdir()
    assert ask.find_model(ask.parse_arguments([TEXT]))[1] == "runs/scorer"
    assert ask.find_model(ask.parse_arguments([TEXT, "--model", "smollm2"])) == ("smollm2", "runs/scorer")


SERVED = [
    ["--type", "Clarity"],
    ["--n", "9"],
    ["--show", "2"],
    ["--seed", "0"],
    ["--json"],
    ["--file", "a"],
]  # for the command line


@pytest.mark.parametrize(
    "argv", [["a", "--file", "b"], ["--n", "0"], ["--serve", "99999"], *(["--serve", "0", *more] for more in SERVED)]
)
def test_arguments_that_contradict_each_other(argv):
    with pytest.raises(SystemExit) as stop:
        ask.parse_arguments(argv)
    assert stop.value.code == 2


def test_questions_grow_on_a_terminal_and_leave_only_the_ranked_ones(command, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    said = command(TEXT, "--type", "Clarity", "--n", "3")
    assert "\x1b[3A\x1b[J" in said  # three lines drawn, then gone
    assert said.split("\x1b[J")[1].startswith("Clarity\n  0.")


def test_a_model_cannot_move_the_cursor():
    assert ask.plain("a\x1b[2Jb\nc\x07 \u202ed") == "a [2Jb c d"
    found = [{"type": "Clarity", "questions": [{"question": "\x1b]0;x\x07why?", "well_formed": True}]}]
    assert "\x1b" not in ask.show(found, None)


def test_what_speaks_against_a_question_stands_behind_it():
    good = {"question": "Why?", "strength": 0.9, "strongest": "Clarity", "parts": {"strength": 0.9, "form": 1.0}}
    far = good | {"parts": {"strength": 0.9, "form": 0.6, "relatedness": 0.1, "probe": 0.01}}
    other = far | {"strongest": "Analogy"}
    found = [{"type": "Clarity", "questions": [good, far, other]}]
    assert ask.show(found, None).splitlines() == [
        "Clarity",
        "  0.90  Why?",
        "  0.90  Why?  (low relatedness to the text, 0.10)",
        "  0.90  Why?  (reads as Analogy; low relatedness to the text, 0.10)",
    ]
    folded = ask.show(found, None, 40).splitlines()
    assert max(map(len, folded)) <= 40 and folded[3] == "        text, 0.10)"


def test_a_conversation(asker, monkeypatch, capsys):
    lines = iter(["Clarity", "I think that", "dogs are good.", "", "Clarity", "2", "all", "", "   ", "Cats too.", ""])

    def answer(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked = []
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(ask, "ask_once", lambda asker, context, types, args: asked.append((context, types)) or [])
    ask.converse(asker, ["Analogy"], ask.parse_arguments([]))
    both = ["Analogy", "Clarity"]
    text = "I think that\ndogs are good."
    assert capsys.readouterr().out.count("paste a text first") == 1
    assert asked[:4] == [(text, ["Clarity"]), (text, ["Clarity"]), (text, ["Clarity"]), (text, both)]
    assert asked[-1] == ("Cats too.", both)


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def server(asker):
    args = ask.parse_arguments(["--serve", "0", "--max-new-tokens", "6"])
    with serve.Server(asker, args) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def request(server, method="POST", path="/ask", body=None, **headers):
    """(status, headers, body) of one request, with the headers of a well-behaved page unless they are given."""
    port = server.server_address[1]
    content = body if isinstance(body, bytes) else json.dumps(body or {"text": TEXT, "n": 2, "seed": 1}).encode()
    sent = {"Host": f"127.0.0.1:{port}", "Content-Type": "application/json", "Content-Length": str(len(content))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(content if method == "POST" else None)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_only_this_machine_is_listened_to(server):
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_is_whole_and_admits_no_other_script(server):
    status, headers, page = request(server, "GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "frame-ancestors 'none'" in policy
    assert page.count("<script") == 1 and "innerHTML" not in page and "http" not in page.replace("http-equiv", "")
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert '"range" min="0" max="2"' in page  # as wide as what --temperature and a request may be
    settings = json.loads(request(server, "GET", "/settings")[2])
    assert [kind["name"] for kind in settings["types"]] == ["Analogy", "Clarity"]
    # Which gates there are, and which are low, it is told, so that it says what `ask` says.
    assert settings["gates"]["order"] == "word order" and settings["low"] == gates.LOW
    assert "word order" not in page and "0.7" not in page


def test_questions_come_in_growing_and_then_ranked(server, asker, monkeypatch):
    monkeypatch.setattr("socratiq.serve.BEAT", 0)  # every token is sent, however fast the machine
    status, headers, body = request(server)
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200 and headers["Content-Type"] == "application/x-ndjson"
    assert lines[0].keys() == {"i", "text"}
    assert lines[-1] == {"types": asker.ask(TEXT, asker.types, 2, 6, 0.8, 1), "cut": False}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "evil.example:{port}", "", None])
def test_other_hosts_are_refused(server, host):
    host = host and host.format(port=server.server_address[1])
    for method, path in (("GET", "/"), ("GET", "/settings"), ("POST", "/ask")):
        assert request(server, method, path, Host=host)[0] == 403


def test_the_port_of_http_goes_without_saying(server, monkeypatch):
    monkeypatch.setattr(server, "hosts", serve.hosts(80))
    for host in ("127.0.0.1", "localhost", "127.0.0.1:80"):
        assert request(server, Host=host, Origin=f"http://{host}")[0] == 200
    for host in ("evil.example", "127.0.0.1:81"):
        assert request(server, Host=host)[0] == 403
    assert request(server, Host="127.0.0.1", Origin="http://evil.example")[0] == 403


def test_localhost_is_this_machine_too(server):
    assert request(server, "GET", "/", Host=f"LOCALHOST:{server.server_address[1]}")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": None}, 411),
        ({"Content_Length": "-5"}, 411),
        ({"Content_Length": "9999999999"}, 413),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_requests_of_other_sites_and_broken_ones(server, headers, status):
    port = server.server_address[1]
    found, _, said = request(server, **{name: value and value.format(port=port) for name, value in headers.items()})
    assert found == status, said


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b"[" * 60_000, 400),
        ({"text": 5}, 400),
        ({"text": " \n"}, 400),
        ({"text": "a" * 20_001}, 413),
        ({"text": TEXT, "types": ["Nonsense"]}, 400),
        ({"text": TEXT, "types": "Clarity"}, 400),
        ({"text": TEXT, "types": [["Clarity"]]}, 400),
        ({"text": TEXT, "n": 9}, 400),
        ({"text": TEXT, "n": True}, 400),
        ({"text": TEXT, "n": 1.5}, 400),
        ({"text": TEXT, "temperature": 3}, 400),
        ({"text": TEXT, "temperature": float("nan")}, 400),
        ({"text": TEXT, "temperature": "1"}, 400),
        ({"text": TEXT, "seed": -1}, 400),
        ({"text": TEXT, "seed": 2**40}, 400),
    ],
)
def test_wishes_that_cannot_be_met(server, body, status):
    found, headers, said = request(server, body=body)
    assert found == status and said.count("\n") == 1
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/x", 404), ("GET", "/../etc", 404), ("POST", "/", 404), ("PUT", "/", 501)]
)
def test_there_is_nothing_else(server, method, path, status):
    assert request(server, method, path)[0] == status


def test_a_closed_page_frees_the_model(server, asker, monkeypatch):
    begun, drawn = threading.Event(), []

    def endless(context, types, samples, length, temperature, seed, on_text):
        for step in range(100_000):
            drawn.append(step)
            on_text(0, "word " * 500)
            begun.set()
        return []

    monkeypatch.setattr(serve, "BEAT", 0)
    with monkeypatch.context() as patch:
        patch.setattr(asker, "ask", endless)
        content = json.dumps({"text": TEXT}).encode()
        head = f"POST /ask HTTP/1.1\r\nHost: 127.0.0.1:{server.server_address[1]}\r\nContent-Type: application/json\r\n"
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
            assert begun.wait(10)
        assert server.turn.acquire(timeout=10)  # the page is gone, so is the work
        server.turn.release()
    assert len(drawn) < 100_000
    assert request(server)[0] == 200


def test_a_busy_model_says_so(server, monkeypatch):
    monkeypatch.setattr(serve, "PATIENCE", 0.05)
    with server.turn:
        status, _, said = request(server)
    assert status == 503 and "busy" in said


def test_a_port_that_is_taken_is_one_line(server, asker):
    args = ask.parse_arguments(["--serve", str(server.server_address[1])])
    with pytest.raises(UserError, match="the port cannot be used"):
        serve.serve(asker, args)
